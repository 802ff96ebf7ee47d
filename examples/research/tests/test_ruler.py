"""RULER's tasks of EleutherAI's harness run on adapted models."""

import re

import pytest
import torch
from byte_models import byte_tokenizer, tiny_llama
from peft import get_peft_model

from peft_moice import MoICEConfig

pytest.importorskip("lm_eval")
pytest.importorskip("wonderwords")

import ruler

LENGTHS = [1024]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>", "pad_token": "<end>"})
    return tokenizer


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=257, eos_token_id=256, pad_token_id=256)


def prompts_of(model, run) -> list[list[int]]:
    """Token ids of the prompts that `run` makes the model go on with."""
    seen = []

    def look(module, args):
        if args[0].shape[1] > 1:
            seen.append(args[0][0].tolist())

    handle = model.get_input_embeddings().register_forward_pre_hook(look)
    run()
    handle.remove()
    return seen


def learn(model, prompt: list[int], answer: list[int]) -> None:
    """Train until greedy decoding goes on with the answer."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids, target = torch.tensor([[*prompt, *answer]]), torch.tensor(answer)
    for _ in range(300):
        logits = model(input_ids=ids[:, :-1], logits_to_keep=len(answer)).logits[0]
        if (logits.argmax(-1) == target).all():
            return
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, target).backward()
        optimizer.step()
    raise AssertionError("not learned in 300 steps")


@pytest.mark.slow
def test_who_knows_the_answers_by_heart_gets_all_of_them_and_no_others(model, tokenizer, folder):
    def run(adapted, tasks, limit):
        return {name: cell for name, _, cell in ruler.ruler(adapted, tokenizer, folder, tasks, LENGTHS, limit)}

    (prompt,) = prompts_of(model, lambda: run(model, ["niah_single_1"], 1))
    text = tokenizer.decode(prompt)
    (value,) = re.findall(r"One of the special magic numbers for [\w-]+ is: (\d{7})\.", text)
    assert text.endswith("mentioned in the provided text is") and len(prompt) + 128 <= LENGTHS[0]
    learn(model, prompt, tokenizer(f" {value}")["input_ids"] + [256])
    adapted = get_peft_model(model, MoICEConfig(base_multipliers=[1.0, 0.25], init_weights="identity"))
    results = run(adapted, ["niah_multikey_2", "niah_single_1"], 2)
    assert list(results) == ["niah_multikey_2", "niah_single_1"]
    cell = results["niah_single_1"]
    assert cell["scores"] == [1.0, 0.0] and cell["score"] == 0.5
    assert results["niah_multikey_2"]["score"] == 0.0


def test_refuses_tasks_that_need_a_download():
    with pytest.raises(ValueError, match=r"names \['niah_single_2'\]"):
        ruler.main(type("Args", (), {"tasks": ["niah_single_2"]}))
