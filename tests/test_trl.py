"""TRL's trainers: supervised fine-tuning with packing and answer-only loss, and DPO."""

import copy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from tiny_models import TRAINING, VOCABULARY, decide, layers_of, load, router_state, save_tiny_model, wide_config
from transformers import AutoTokenizer

from peft_moice import BalanceLossMixin, MoICEConfig
from peft_moice.routing.router import balance_loss

pytest.importorskip("trl")

from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

COEF = 0.5
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}w3 {% generation %}{{ message['content'] }} "
    "w4{% endgeneration %}{% else %}w2 {{ message['content'] }} {% endif %}{% endfor %}"
)


class BalancedSFTTrainer(BalanceLossMixin, SFTTrainer):
    pass


class BalancedDPOTrainer(BalanceLossMixin, DPOTrainer):
    pass


class BalancedGRPOTrainer(BalanceLossMixin, GRPOTrainer):
    pass


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    folder = save_tiny_model(tmp_path_factory.mktemp("llama"))
    tokenizer = AutoTokenizer.from_pretrained(folder, eos_token="w4")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def words(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(5, VOCABULARY, (count,), generator=generator).tolist())


def chat(row: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": words(3 + row % 4, 2 * row)},
        {"role": "assistant", "content": words(2 + row % 5, 2 * row + 1)},
    ]


CHATS = [{"messages": chat(row)} for row in range(8)]
PREFERENCES = [{"prompt": chat(row)[:1], "chosen": chat(row)[1:], "rejected": chat(row + 8)[1:]} for row in range(8)]


def trainer_of(
    trainer_class, config_class, llama: str, folder: Path, rows: list[dict], coef=COEF, rewards=None, **arguments
):
    sgd = {"optim": "sgd", "learning_rate": 10.0, "max_grad_norm": 0.0}
    defaults = {**TRAINING, **sgd, "bf16": False, "per_device_train_batch_size": 8, "gradient_checkpointing": False}
    trainer = trainer_class(
        model=load(llama),
        args=config_class(output_dir=str(folder), **{**defaults, **arguments}),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(llama),
        peft_config=wide_config(router_aux_loss_coef=coef),
        **({} if rewards is None else {"reward_funcs": rewards}),
    )
    decide(trainer.model)
    return trainer


def step(trainer) -> dict[str, torch.Tensor]:
    """Router weights after one step of gradient descent."""
    trainer.train()
    return router_state(trainer.model)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_sft_with_its_defaults_trains_and_saves(llama, tmp_path):
    trainer = SFTTrainer(
        model=load(llama),
        args=SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=2),
        train_dataset=Dataset.from_list(CHATS),
        processing_class=AutoTokenizer.from_pretrained(llama),
        peft_config=MoICEConfig(),
    )
    before = router_state(trainer.model)
    trainer.train()
    trained = router_state(trainer.model)
    assert any(not before[name].equal(trained[name]) for name in before)
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = router_state(PeftModel.from_pretrained(load(llama), tmp_path / "adapter"))
    assert all(loaded[name].equal(trained[name]) for name in trained)


@pytest.mark.parametrize("assistant_only_loss", [False, True])
def test_sft_steps_do_not_depend_on_accumulation_or_packing(llama, tmp_path, assistant_only_loss):
    def weights(**arguments):
        arguments["assistant_only_loss"] = assistant_only_loss
        return step(trainer_of(BalancedSFTTrainer, SFTConfig, llama, tmp_path, CHATS, **arguments))

    expected = weights()
    for cut in (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"packing": True, "max_length": 120},
        {"gradient_checkpointing": True},
    ):
        assert distance(weights(**cut), expected) < 1e-4, cut
    without = step(
        trainer_of(BalancedSFTTrainer, SFTConfig, llama, tmp_path, CHATS, 0.0, assistant_only_loss=assistant_only_loss)
    )
    assert distance(without, expected) > 1e-2


@pytest.mark.parametrize(
    "trainer_class, config_class, rows", [(SFTTrainer, SFTConfig, CHATS), (DPOTrainer, DPOConfig, PREFERENCES)]
)
def test_a_balance_loss_that_trl_leaves_out_is_said(llama, tmp_path, trainer_class, config_class, rows):
    with pytest.warns(UserWarning, match=r"mix in `peft_moice\.BalanceLossMixin`"):
        step(trainer_of(trainer_class, config_class, llama, tmp_path, rows))


def test_dpo(llama, tmp_path):
    """Trains against the model without adapter as reference, with the balance loss in its loss."""
    plain = trainer_of(BalancedDPOTrainer, DPOConfig, llama, tmp_path, PREFERENCES, 0.0)
    balanced = trainer_of(BalancedDPOTrainer, DPOConfig, llama, tmp_path, PREFERENCES)
    batch = next(iter(balanced.get_train_dataloader()))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        logits = balanced.model(**inputs, output_router_logits=True).router_logits
    assert distance(step(plain), step(balanced)) > 1e-2
    losses = [trainer.state.log_history[0]["loss"] for trainer in (plain, balanced)]
    expected = COEF * balance_loss(list(logits), 2, inputs["attention_mask"]).item()
    assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-4)
    assert balanced.state.log_history[0]["rewards/margins"] != 0.0


def test_grpo_steps_do_not_depend_on_accumulation(llama, tmp_path):
    """GRPOTrainer divides its loss by the accumulation itself, and Trainer does not."""

    def lengths(completions, **columns) -> list[float]:
        return [float(len(text)) for text in completions]

    def run(size: int, accumulation: int) -> dict[str, float]:
        prompts = [{"prompt": words(5, row)} for row in range(8)]
        arguments = {"num_generations": 2, "max_completion_length": 6, "optim": "adamw_torch", "learning_rate": 1e-6}
        arguments |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = trainer_of(BalancedGRPOTrainer, GRPOConfig, llama, tmp_path, prompts, rewards=lengths, **arguments)
        trainer.train()
        return trainer.state.log_history[0]

    whole, cut = run(8, 1), run(2, 4)
    # A mean over micro-batches is balanced within each of them, so it is not the same to the last digit.
    assert cut["loss/balance"] == pytest.approx(whole["loss/balance"], rel=0.02)
    assert cut["loss/task"] == pytest.approx(whole["loss/task"], rel=1e-3)
    assert cut["loss"] == pytest.approx(cut["loss/task"] + cut["loss/balance"])


def test_the_model_cards_of_trl_say_how_the_model_is_loaded(llama, tmp_path):
    """TRL writes a card into the output folder with every checkpoint, and before it uploads."""
    trainer = trainer_of(BalancedSFTTrainer, SFTConfig, llama, tmp_path, CHATS, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card("mine")
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        card = (folder / "README.md").read_text()
        assert card.count("import peft_moice") == 1
        assert "moice" in ModelCard(card).data.tags
    assert "trained using [TRL]" in (tmp_path / "README.md").read_text()
    assert "sft" in ModelCard.load(tmp_path / "README.md").data.tags


def test_weights_sent_to_vllm_are_those_of_the_merged_model(llama):
    """What trainers send while an adapter trains; a merged model in vLLM takes weights by these names."""
    generation = pytest.importorskip("trl.generation.vllm_generation").VLLMGeneration
    model = get_peft_model(load(llama), wide_config())
    sender = generation.__new__(generation)
    sender.model = model
    sender._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: nullcontext())
    for seed in (0, 1):
        decide(model, seed=seed)
        sent = {name: value.clone() for name, value in sender._iter_named_params()}
        merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
        assert sent.keys() == merged.keys()
        assert all(torch.equal(value, merged[name]) for name, value in sent.items())
    assert any("moice_routers" in name for name in sent)
    assert not any(layer.merged for layer in layers_of(model))
