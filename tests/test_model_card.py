"""Model cards: that nothing they quote becomes markup or code, and that they come into the cards of others."""

import ast
import re

import pytest
from huggingface_hub import ModelCard
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from representatives import slow_but
from tiny_models import adapted_model, load, two_adapters
from transformers import Trainer, TrainingArguments

from peft_moice import MoICECallback, MoICEConfig
from peft_moice.hub.card import adapter_part, plain, put_card, python_string, table, values_table
from peft_moice.hub.push import add_to_card
from peft_moice.routing.spec import RouterSpec

SPEC = RouterSpec([1e4, 2e4], 1, 2, "layer", "silu")
NASTY = [
    "a\n---\nlicense: mit\n---\n# Title",
    "x\n```\n<script>alert(1)</script>",
    '"); import os; os.system("true',
    "<!-- peft_moice -->",
    "<!-- peft_moice: what stands up to the next such mark is written anew by saving -->",
    "| a | b |\n| --- | --- |",
    "[text](javascript:alert(1))",
    "*&#42;_~~x~~\\",
    "\u2028\u0085\x0c## Heading\r# Heading",
    "tags: [a, b]\n- &anchor *alias",
]


def blocks_of(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@given(st.text(max_size=60) | st.sampled_from(NASTY), st.text(max_size=60) | st.sampled_from(NASTY))
@example(NASTY[0], NASTY[1])
def test_names_stay_names(base_model, source):
    honest = adapter_part([SPEC], base_model="me/model", is_causal_lm=True, source="me/adapter").as_card()
    part = adapter_part([SPEC], base_model=base_model, is_causal_lm=True, source=source)
    for card in (part.as_card(), part.merged_into(honest)):
        parsed = ModelCard(card)
        assert parsed.data.base_model == (base_model or ("me/model" if card != part.as_card() else None))
        assert set(parsed.data.to_dict()) <= {
            "base_model",
            "library_name",
            "pipeline_tag",
            "tags",
            "peft_moice_version",
        }
        # The same headings, blocks, tables and marks as with names that are harmless.
        for pattern in (r"^#+ ", r"^```", r"^\|", r"<!--", r"(?<!\\)<", r"^---$"):
            found = len(re.findall(pattern, parsed.text, re.MULTILINE))
            assert found == len(re.findall(pattern, ModelCard(honest).text, re.MULTILINE)), (pattern, parsed.text)
        (code,) = blocks_of(parsed.text)
        calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
        assert [call.args[-1].value for call in calls if base_model] == ([source, base_model] if base_model else [])


@pytest.mark.slow
@given(st.text() | st.sampled_from(NASTY))
def test_literals_are_what_they_quote(text):
    assert ast.literal_eval(python_string(text)) == text
    assert "`" not in python_string(text) and "\n" not in python_string(text)


@pytest.mark.slow
@given(st.text() | st.sampled_from(NASTY))
def test_text_on_one_line_that_markdown_shows_as_it_is(text):
    line = plain(text)
    assert "\n" not in line and "\r" not in line
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_\[\]<>#|~&$!]", line)


def test_tables_escape_what_they_hold():
    assert values_table({"a|b": "<b>\nx"}) == "|  | value |\n| --- | --- |\n| a\\|b | \\<b\\> x |"
    assert table([{"x": 0.1234567, "y_": 3}]) == "| x | y\\_ |\n| --- | --- |\n| 0.123457 | 3 |"


def part(base_model="me/model"):
    return adapter_part([SPEC], base_model=base_model, is_causal_lm=True)


def test_the_part_comes_before_the_first_section_of_another_card(tmp_path):
    metadata = "---\nlicense: mit\ntags:\n- mine\nbase_model: me/model\n---\n\n"
    card = metadata + "# My model\n\nIt is good.\n\n## Data\n\nMuch.\n"
    (tmp_path / "README.md").write_text(card)
    put_card(tmp_path, part())
    once = (tmp_path / "README.md").read_text()
    merged = ModelCard(once)
    assert merged.data.license == "mit"
    assert merged.data.tags == ["mine", "moice", "long-context", "base_model:adapter:me/model"]
    order = ["# My model", "It is good.", "import peft_moice", "## Versions", "## Data", "Much."]
    assert sorted(order, key=merged.text.index) == order
    put_card(tmp_path, part())
    assert (tmp_path / "README.md").read_text() == once


def test_another_adapter_replaces_the_part_and_nothing_else(tmp_path):
    put_card(tmp_path, part())
    with (tmp_path / "README.md").open("a") as card:
        card.write("\n## Notes\n\nMine.\n")
    other = RouterSpec([1e4, 3e4, 7e4], 2, 2, "head", "silu")
    put_card(tmp_path, adapter_part([other], base_model="me/other", is_causal_lm=True))
    text = (tmp_path / "README.md").read_text()
    assert "10000, 30000, 70000" in text and "10000, 20000" not in text
    assert text.count("import peft_moice") == 1
    assert text.endswith("## Notes\n\nMine.\n")
    assert ModelCard(text).data.base_model == "me/other"


def test_a_card_that_cannot_be_read_stays(tmp_path, caplog):
    (tmp_path / "README.md").write_text("---\n: [\n---\nMine.\n")
    with caplog.at_level("WARNING", logger="peft_moice.hub.card"):
        put_card(tmp_path, part())
    assert (tmp_path / "README.md").read_text() == "---\n: [\n---\nMine.\n"
    assert "stays as it is" in caplog.text


def assert_says_how(card: str, angles: str = "10000, 2500, 5000, 40000 (1, 0.25, 0.5, 4 times the first)") -> None:
    assert card.count("import peft_moice") == 1
    assert f"| {angles} |" in card and "| 2 of 4 per head and token |" in card
    assert "[More Information Needed]" not in card
    assert {"moice", "long-context"} <= set(ModelCard(card).data.tags)
    assert ModelCard(card).data.library_name == "peft"


def test_save_pretrained(llama, adapted, tmp_path):
    for _ in range(2):
        adapted.save_pretrained(tmp_path / "adapter")
        card = (tmp_path / "adapter" / "README.md").read_text()
        assert_says_how(card)
        assert llama not in card and str(tmp_path) not in card
    (tmp_path / "adapter" / "README.md").write_text(card + "\n## Evaluation\n\nGood.\n")
    adapted.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "README.md").read_text() == card + "\n## Evaluation\n\nGood.\n"


def test_each_of_several_adapters_has_its_card(llama, tmp_path):
    two_adapters(llama, base_multipliers=[1.0, 2.0, 3.0, 4.0]).save_pretrained(tmp_path)
    assert_says_how((tmp_path / "one" / "README.md").read_text())
    assert_says_how(
        (tmp_path / "two" / "README.md").read_text(), "10000, 20000, 30000, 40000 (1, 2, 3, 4 times the first)"
    )


def test_a_config_whose_angles_are_open_writes_no_card(tmp_path):
    MoICEConfig(task_type="CAUSAL_LM").save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_cards_of_other_tuners_are_left_alone(llama, tmp_path):
    lora = get_peft_model(load(llama), LoraConfig(target_modules=["q_proj"]))
    add_to_card(lora, tmp_path)
    add_to_card(load(llama), tmp_path)
    assert not list(tmp_path.iterdir())


def test_trainer(llama, tmp_path):
    """`trainer.push_to_hub` saves, then writes a card of its own, then uploads."""
    model = adapted_model(llama)
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(model, arguments)
    trainer.save_model()
    assert_says_how((tmp_path / "README.md").read_text())
    trainer.create_model_card(model_name="mine")
    assert "import peft_moice" not in (tmp_path / "README.md").read_text()
    trainer.add_callback(MoICECallback(trainer))
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert_says_how(card)
    assert "# mine" in card and "### Training hyperparameters" in card
    trainer.save_model()
    assert_says_how((tmp_path / "README.md").read_text())


@pytest.mark.parametrize("name", slow_but(NASTY[:1], NASTY))
def test_a_base_model_with_a_nasty_name_survives_saving(llama, tmp_path, name):
    model = adapted_model(llama)
    model.peft_config["default"].base_model_name_or_path = name
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == name
    assert len(blocks_of(card.text)) == 1
