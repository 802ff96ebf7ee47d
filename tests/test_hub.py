"""Pushing to the Hub and loading from it, against a hub that lives in a local cache, read without network."""

import hashlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard, RepoUrl
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import decide, load, logits_of, router_state, token_ids, wide_config

from peft_moice import MoICEConfig, push_to_hub, write_model_card
from peft_moice.hub import push

ROOT = Path(__file__).parents[1]
BASE_ID = "tiny/llama"


class FakeHub:
    """Writes what is uploaded where a download would have left it: blobs, snapshots and refs of the local cache."""

    def __init__(self, home: Path):
        self.home = home
        self.created: list[dict] = []
        self.branches: set[tuple[str, str]] = set()
        self.token = None

    def __call__(self, token=None) -> "FakeHub":
        self.token = token
        return self

    def create_repo(self, repo_id: str, **options) -> RepoUrl:
        self.created.append({"repo_id": repo_id, **options})
        repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool = False) -> None:
        assert exist_ok and not branch.startswith("refs/"), "the Hub would refuse"
        self.branches.add((repo_id, branch))

    def upload_folder(self, *, repo_id, folder_path, commit_message=None, revision=None, create_pr=None):
        if revision is not None and not revision.startswith("refs/") and (repo_id, revision) not in self.branches:
            raise ValueError(f"404 Client Error. Revision Not Found: {revision}")
        files = {str(f.relative_to(folder_path)): f for f in Path(folder_path).rglob("*") if f.is_file()}
        contents = {name: file.read_bytes() for name, file in files.items()}
        commit = hashlib.sha1(repr(sorted(contents.items())).encode()).hexdigest()
        repo = self.home / "hub" / f"models--{repo_id.replace('/', '--')}"
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "blobs").mkdir(exist_ok=True)
        reference = repo / "refs" / (revision or "main")
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
        for name, content in contents.items():
            blob = repo / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            link = repo / "snapshots" / commit / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/{commit}", commit=commit)

    def file(self, repo_id: str, name: str, revision: str = "main") -> Path:
        repo = self.home / "hub" / f"models--{repo_id.replace('/', '--')}"
        return repo / "snapshots" / (repo / "refs" / revision).read_text() / name

    def run(self, code: str) -> subprocess.CompletedProcess:
        """Run `code` in a fresh process that sees this hub's cache and no network."""
        environment = {**os.environ, "HF_HOME": str(self.home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
            environment.pop(variable, None)
        command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
        return subprocess.run(command, env=environment, cwd=self.home, capture_output=True, text=True)


@pytest.fixture
def fake_hub(tmp_path, llama, monkeypatch):
    fake = FakeHub(tmp_path / "home")
    fake.upload_folder(repo_id=BASE_ID, folder_path=llama)
    monkeypatch.setattr(push, "HfApi", fake)
    return fake


@pytest.mark.slow
def test_a_pushed_adapter_loads_by_repo_id_in_every_way(fake_hub, adapted, tmp_path):
    push_to_hub(adapted, "me/needle", base_model=BASE_ID)
    torch.save({"input_ids": token_ids(), "logits": logits_of(adapted)}, tmp_path / "expected.pt")
    run = fake_hub.run(f"""
        import torch, peft_moice
        from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

        torch.set_num_threads(1)
        expected = torch.load({str(tmp_path / "expected.pt")!r})

        def check(model):
            with torch.no_grad():
                assert torch.equal(model(expected["input_ids"]).logits, expected["logits"])

        config = PeftConfig.from_pretrained("me/needle")
        assert type(config) is peft_moice.MoICEConfig
        assert config.base_model_name_or_path == "{BASE_ID}"
        check(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{BASE_ID}"), "me/needle"))
        check(AutoPeftModelForCausalLM.from_pretrained("me/needle"))
        check(AutoModelForCausalLM.from_pretrained("me/needle"))
        model = AutoModelForCausalLM.from_pretrained("{BASE_ID}")
        model.load_adapter("me/needle")
        check(model)
        tokenizer = AutoTokenizer.from_pretrained("{BASE_ID}")
        generator = pipeline("text-generation", model="me/needle", tokenizer=tokenizer)
        check(generator.model)
        answer = generator("w3 w4 w5", max_new_tokens=2, do_sample=False, return_full_text=False)[0]["generated_text"]
        assert len(answer.split()) == 2
        print("all loaded")
    """)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == "all loaded"


@pytest.mark.slow
def test_the_snippet_in_the_card_runs(fake_hub, adapted):
    push_to_hub(adapted, "me/needle", base_model=BASE_ID)
    card = fake_hub.file("me/needle", "README.md").read_text()
    snippet = card.split("```python\n")[1].split("```")[0]
    assert snippet.startswith("import peft_moice")
    run = fake_hub.run(snippet + "print(type(model.base_model).__name__, len(tokenizer))")
    assert run.stdout.split() == ["MoICEModel", "64"], run.stderr[-2000:]


def test_the_adapter_stands_at_the_top_whatever_it_is_called(fake_hub, llama):
    model = get_peft_model(load(llama), wide_config(), adapter_name="one").eval()
    model.add_adapter("two", wide_config(top_k=1))
    decide(model, "two")
    url = push_to_hub(model, "needle", adapter_name="two", base_model=BASE_ID, private=True, token="secret")
    assert fake_hub.created == [{"repo_id": "needle", "private": True, "exist_ok": True}]
    assert fake_hub.token == "secret"
    assert url.startswith("https://huggingface.co/me/needle/commit/")
    snapshot = fake_hub.file("me/needle", "README.md").parent
    assert {file.name for file in snapshot.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert "from_pretrained('me/needle')" in (snapshot / "README.md").read_text()
    stored = load_file(snapshot / "adapter_model.safetensors")
    for key, weight in router_state(model, "two").items():
        assert torch.equal(stored[key.replace(".two.", ".")], weight)
    # The model in memory keeps the name of the folder it came from.
    assert model.peft_config["two"].base_model_name_or_path == llama
    assert not model.peft_config["two"].inference_mode


def test_pushing_to_a_branch(fake_hub, adapted):
    push_to_hub(adapted, "me/needle", base_model=BASE_ID)
    decide(adapted, seed=5)
    push_to_hub(adapted, "me/needle", base_model=BASE_ID, revision="longer")
    push_to_hub(adapted, "me/needle", base_model=BASE_ID, revision="refs/pr/1")
    assert fake_hub.branches == {("me/needle", "longer")}
    main, longer = (fake_hub.file("me/needle", "adapter_model.safetensors", branch) for branch in ("main", "longer"))
    assert main.read_bytes() != longer.read_bytes()


def test_the_card(adapted, tmp_path):
    recipe = {"steps": 100, "learning rate": 1e-2, "optimizer": "AdamW"}
    evaluation = [
        {"position": "first", "base": 1.0, "with MoICE": 1.0},
        {"position": "middle", "base": 0.1, "with MoICE": 0.95},
    ]
    path = write_model_card(
        adapted, tmp_path, repo_id="me/needle", base_model=BASE_ID, recipe=recipe, evaluation=evaluation
    )
    card = ModelCard.load(path)
    assert card.data.library_name == "peft"
    assert card.data.base_model == BASE_ID
    assert card.data.pipeline_tag == "text-generation"
    assert {"moice", "long-context", f"base_model:adapter:{BASE_ID}"} <= set(card.data.tags)
    own = adapted.config.rope_parameters["rope_theta"]
    angles = ", ".join(f"{own * multiple:g}" for multiple in (1, 0.25, 0.5, 4))
    assert f"| {angles} (1, 0.25, 0.5, 4 times the first) |" in card.text
    assert "| 2 of 4 per head and token |" in card.text
    assert "| learning rate | 0.01 |" in card.text
    assert "| position | base | with MoICE |\n| --- | --- | --- |\n| first | 1 | 1 |\n" in card.text
    assert "| middle | 0.1 | 0.95 |" in card.text
    assert "| Router parameters | 432 |" in card.text


def test_a_card_without_recipe_and_evaluation(adapted, tmp_path):
    text = write_model_card(adapted, tmp_path, base_model=BASE_ID).read_text()
    assert "## Training" not in text and "## Evaluation" not in text
    assert f"from_pretrained('{tmp_path}')" in text


def test_evaluation_as_markdown(adapted, tmp_path):
    text = write_model_card(adapted, tmp_path, base_model=BASE_ID, evaluation="See *the paper*.").read_text()
    assert "## Evaluation\n\nSee *the paper*.\n" in text


def test_the_card_names_angles_by_layer_type_and_routers_of_a_mean(llama, tmp_path):
    model = get_peft_model(load(llama), wide_config(), adapter_name="one")
    model.add_adapter("two", wide_config(base_multipliers=[1.0, 3.0], router_scope="head"))
    model.add_weighted_adapter(["one", "two"], [0.75, 0.25], "both")
    text = write_model_card(model, tmp_path, adapter_name="both", base_model=BASE_ID).read_text()
    assert "Router 1 of 2, share 0.75: Base angles" in text
    assert "Router 2 of 2, share 0.25: Base angles (`rope_theta`) | 10000, 30000 (1, 3 times" in text


def test_the_card_replaces_any_other(adapted, tmp_path):
    (tmp_path / "README.md").write_text("# Notes\n")
    write_model_card(adapted, tmp_path, base_model=BASE_ID)
    assert "import peft_moice" in (tmp_path / "README.md").read_text()
    assert "Notes" not in (tmp_path / "README.md").read_text()


def test_a_local_base_model_is_not_named_in_the_card(adapted, llama, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="peft_moice.hub.push"):
        card = ModelCard.load(write_model_card(adapted, tmp_path))
    assert llama in caplog.text and "base_model" in caplog.text
    assert card.data.base_model is None
    assert llama not in card.content
    assert "PeftModel.from_pretrained(base_model" in card.text


def test_a_model_without_a_task(llama, tmp_path):
    model = get_peft_model(load(llama), MoICEConfig())
    card = ModelCard.load(write_model_card(model, tmp_path, base_model=BASE_ID))
    assert card.data.pipeline_tag is None
    assert "PeftModel.from_pretrained(base_model" in card.text


def test_what_cannot_be_pushed(adapted, llama):
    with pytest.raises(TypeError, match="LlamaForCausalLM"):
        push_to_hub(load(llama), "me/needle")
    with pytest.raises(ValueError, match="typo"):
        push_to_hub(adapted, "me/needle", adapter_name="typo")
    lora = get_peft_model(load(llama), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="default"):
        push_to_hub(lora, "me/needle")
    adapted.add_adapter("second", wide_config())
    adapted.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="adapter_name"):
        push_to_hub(adapted, "me/needle")


def test_rows_that_are_no_table(adapted, tmp_path):
    with pytest.raises(ValueError, match="columns"):
        write_model_card(adapted, tmp_path, base_model=BASE_ID, evaluation=[{"a": 1}, {"b": 2}])
