"""The divergence from the base model in the loss, and the parts of the loss in Trainer's log."""

import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import TRAINING, VOCABULARY, decide, load, token_ids, wide_config
from transformers import AutoTokenizer, Trainer, TrainingArguments

from peft_moice import BalanceLossMixin, KeepCloseMixin
from peft_moice.training import divergence_from_base
from peft_moice.training.callback import MoICECallback

WEIGHT = 3.0
TOKENS = 32


class CloseTrainer(KeepCloseMixin, Trainer):
    pass


class CloseBalancedTrainer(KeepCloseMixin, BalanceLossMixin, Trainer):
    pass


class BalancedCloseTrainer(BalanceLossMixin, KeepCloseMixin, Trainer):
    pass


PARTS = ("loss/task", "loss/balance", "loss/divergence")


def decided(llama: str, coef: float = 0.0, **config) -> torch.nn.Module:
    model = get_peft_model(load(llama), wide_config(router_aux_loss_coef=coef, **config))
    decide(model)
    model.get_output_embeddings().weight.data *= 20  # so that angles matter to the text
    return model


def text(length: int = TOKENS + 1) -> torch.Tensor:
    """With one token more than a stretch, there is only one stretch to draw."""
    return token_ids(1, length, seed=5)[0]


def by_hand(model, ids: torch.Tensor) -> float:
    """Sum over the vocabulary of p (log p - log q), mean over tokens, in float64."""
    with torch.no_grad():
        log_q = model(ids).logits.double().log_softmax(-1)
        with model.disable_adapter():
            log_p = model(ids).logits.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def trainer_of(trainer_class, model, folder, rows: int = 8, **arguments):
    keep = {name: arguments.pop(name) for name in list(arguments) if name.startswith("keep_")}
    keep = {"keep_text": text(), "keep_weight": WEIGHT, "keep_tokens": TOKENS, **keep}
    ids = token_ids(rows, 14)
    defaults = {**TRAINING, "per_device_train_batch_size": rows, "optim": "sgd", "learning_rate": 0.1}
    return trainer_class(
        model=model,
        args=TrainingArguments(str(folder), **{**defaults, **arguments}),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        **keep,
    )


def log_of(trainer) -> dict[str, float]:
    """What Trainer logs first."""
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize("tuner", ["moice", "lora"])
def test_the_value_is_that_computed_by_hand(llama, tuner):
    if tuner == "moice":
        model = decided(llama, coef=0.5)
    else:
        torch.manual_seed(0)
        model = get_peft_model(load(llama), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    ids = torch.stack([text(20), text(21)[1:]])
    value = divergence_from_base(model.eval(), model, ids)
    expected = by_hand(model, ids)
    assert expected > 1e-3
    assert value.item() == pytest.approx(expected, rel=1e-4)
    value.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.slow
def test_the_loss_is_the_sum_of_its_parts(llama, tmp_path):
    model = decided(llama, coef=0.5)
    ids = token_ids(8, 14)
    model.train()
    with torch.no_grad():  # with the number of predictions, every sequence is balanced on its own, as in Trainer
        outputs = model(ids, labels=ids, num_items_in_batch=ids[:, 1:].numel())
    balance = 0.5 * outputs.aux_loss.item()
    divergence = WEIGHT * by_hand(model.eval(), text()[None, :TOKENS])
    logged = log_of(trainer_of(CloseBalancedTrainer, model, tmp_path))
    assert logged["loss/balance"] == pytest.approx(balance, rel=1e-4)
    assert logged["loss/divergence"] == pytest.approx(divergence, rel=1e-4)
    assert logged["loss/task"] == pytest.approx(outputs.loss.item() - balance, rel=1e-4)
    assert logged["loss"] == pytest.approx(sum(logged[part] for part in PARTS))


@pytest.mark.slow
def test_the_order_of_mixins_and_passes_aside_change_nothing(llama, tmp_path, recwarn):
    """The balance loss is that of the batch alone: the text for the divergence is not balanced, and nobody warns."""
    logs = []
    for trainer_class in (CloseBalancedTrainer, BalancedCloseTrainer):
        trainer = trainer_of(trainer_class, decided(llama, coef=0.5), tmp_path)
        trainer.add_callback(MoICECallback(trainer))
        trainer.train()
        logs.append(trainer.state.log_history)
    balanced = trainer_of(CloseBalancedTrainer, decided(llama, coef=0.5), tmp_path, keep_weight=0.0)
    balanced.add_callback(MoICECallback(balanced))
    balanced.train()
    assert logs[0][0] == pytest.approx(logs[1][0], rel=1e-5)
    assert logs[0][0]["loss/balance"] == pytest.approx(balanced.state.log_history[0]["loss/balance"], rel=1e-6)
    for name in ("moice/entropy", "moice/max_load", "moice/balance_loss"):
        assert logs[0][1][name] == balanced.state.log_history[1][name], name
    assert not [warning for warning in recwarn if "balance loss" in str(warning.message)]


@pytest.mark.slow
def test_noise_in_the_embeddings_is_no_divergence(llama, tmp_path):
    """NEFTune draws it anew for every pass, unless both draw the same."""
    plain, noisy = (
        log_of(trainer_of(CloseTrainer, decided(llama), tmp_path, neftune_noise_alpha=alpha)) for alpha in (None, 5.0)
    )
    assert noisy["loss/divergence"] == pytest.approx(plain["loss/divergence"], rel=0.5)


@pytest.mark.slow
def test_a_training_that_ended_between_two_logs_adds_nothing_to_the_next(llama, tmp_path):
    trainer = trainer_of(CloseBalancedTrainer, decided(llama, coef=0.5), tmp_path, learning_rate=0.0)
    trainer.args.max_steps, trainer.args.logging_steps = 3, 2
    logs = []
    for _ in range(2):
        random.seed(0)
        logs.append(log_of(trainer))
    for name in ("loss", *PARTS):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("cut", [(2, 4), (1, 8)])
def test_accumulation_changes_neither_steps_nor_logs(llama, tmp_path, cut):
    def run(batch: int, accumulation: int):
        cut = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        model = decided(llama, coef=0.5)
        trainer = trainer_of(CloseBalancedTrainer, model, tmp_path, max_steps=2, logging_steps=2, **cut)
        log = log_of(trainer)
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
        return weights, log

    (weights, log), (expected, expected_log) = run(*cut), run(8, 1)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)
    for name in ("loss", *PARTS):
        assert log[name] == pytest.approx(expected_log[name], rel=1e-4), name


@pytest.mark.slow
def test_a_loss_that_is_a_mean_over_micro_batches(llama, tmp_path):
    """Where the model takes no number of items, Trainer divides the loss by the accumulation, and the log agrees."""

    def run(batch: int, accumulation: int) -> dict[str, float]:
        cut = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = trainer_of(CloseTrainer, decided(llama), tmp_path, **cut)
        trainer.model_accepts_loss_kwargs = False
        return log_of(trainer)

    whole, cut = run(8, 1), run(2, 4)
    for name in ("loss", "loss/divergence", "grad_norm"):
        assert cut[name] == pytest.approx(whole[name], rel=1e-4), name


@pytest.mark.slow
def test_it_keeps_the_model_close(llama, tmp_path):
    def divergence_after(weight: float) -> float:
        torch.manual_seed(0)
        model = get_peft_model(load(llama), wide_config(router_aux_loss_coef=0.0, init_weights="identity"))
        model.get_output_embeddings().weight.data *= 20
        trainer = trainer_of(CloseTrainer, model, tmp_path, keep_weight=weight, optim="adamw_torch", max_steps=12)
        trainer.train()
        return by_hand(model.eval(), text()[None])

    assert divergence_after(30.0) < 0.5 * divergence_after(0.0)


@pytest.mark.slow
def test_nothing_is_added_or_logged_without_weight_or_in_evaluation(llama, tmp_path):
    without = trainer_of(CloseTrainer, decided(llama), tmp_path, keep_weight=0.0, keep_text=None)
    assert not [name for name in log_of(without) if name.startswith("loss/")]
    trainer = trainer_of(CloseTrainer, decided(llama).eval(), tmp_path)
    ids = token_ids()
    inputs = {"input_ids": ids, "labels": ids}
    expected = trainer.model(**inputs).loss.item()
    loss, outputs = trainer.compute_loss(trainer.model.eval(), inputs, return_outputs=True)
    assert loss.item() == outputs.loss.item() == pytest.approx(expected)


def test_text_is_tokenized_by_the_trainer(llama, tmp_path):
    words = [f"w{2 + index % (VOCABULARY - 2)}" for index in range(40)]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    trainer = CloseTrainer(
        model=decided(llama), args=args, processing_class=tokenizer, keep_text=" ".join(words), keep_tokens=16
    )
    assert trainer.keep_ids.tolist() == [int(word[1:]) for word in words]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep_text": None}, ValueError, "needs more than 32 tokens of ordinary text .* there are 0"),
        ({"keep_text": [5] * 32}, ValueError, "there are 32"),
        ({"keep_text": "w5 w6"}, TypeError, "no `processing_class`"),
        ({"keep_text": torch.ones(1, 99, dtype=torch.long)}, TypeError, r"not Tensor with the shape \(1, 99\)"),
        ({"keep_text": torch.ones(99)}, TypeError, "not Tensor with .* torch.float32"),
        ({"keep_text": ["w5", "w6"]}, TypeError, "has to be one text, or the ids .*, not list. Join several"),
        ({"keep_weight": -1.0}, ValueError, "`keep_weight` -1.0 has to be finite and at least 0"),
        ({"keep_weight": float("nan")}, ValueError, "`keep_weight` nan has to be finite"),
        ({"keep_tokens": 1}, ValueError, "`keep_tokens` 1 at least 2"),
    ],
)
def test_bad_input(llama, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        trainer_of(CloseTrainer, decided(llama), tmp_path, **options)


def test_a_model_without_an_adapter_is_refused(llama, tmp_path):
    with pytest.raises(TypeError, match="needs a PEFT model"):
        trainer_of(CloseTrainer, load(llama), tmp_path).train()


@pytest.mark.slow
def test_with_trl(llama, tmp_path):
    """SFTTrainer computes the loss outside the model, and logs by itself."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    class CloseSFTTrainer(KeepCloseMixin, BalanceLossMixin, trl.SFTTrainer):
        pass

    def run(batch: int, accumulation: int) -> dict[str, float]:
        random.seed(0)
        cut = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = CloseSFTTrainer(
            model=load(llama),
            args=trl.SFTConfig(str(tmp_path), bf16=False, gradient_checkpointing=False, **{**TRAINING, **cut}),
            train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in token_ids(4, 14).tolist()]),
            processing_class=AutoTokenizer.from_pretrained(llama, eos_token="w4"),
            peft_config=wide_config(router_aux_loss_coef=0.5),
            keep_text=text(),
            keep_weight=WEIGHT,
            keep_tokens=TOKENS,
        )
        decide(trainer.model)
        trainer.model.get_output_embeddings().weight.data *= 20
        expected = WEIGHT * by_hand(trainer.model.eval(), text()[None, :TOKENS])
        logged = log_of(trainer)
        assert logged["loss/divergence"] == pytest.approx(expected, rel=1e-4)
        return logged

    whole, cut = run(4, 1), run(1, 4)
    for name in ("loss", *PARTS, "grad_norm"):
        assert cut[name] == pytest.approx(whole[name], rel=1e-3), name
