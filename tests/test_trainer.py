"""transformers' Trainer: equal steps however they are cut, resuming, evaluation, and the callback's logs."""

from functools import partial
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny_models import (
    TRAINING,
    decide,
    layers_of,
    load,
    router_state,
    save_tiny_model,
    token_ids,
    two_adapters,
    wide_config,
)
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from peft_moice import BalanceLossMixin
from peft_moice.routing.router import balance_loss, select_experts
from peft_moice.training.callback import MoICECallback
from peft_moice.training.hooks import hooks_of

pytestmark = pytest.mark.slow

SGD = {"optim": "sgd", "learning_rate": 10.0, "max_grad_norm": 0.0}
"""Without normalization, so that a gradient of the wrong size shows."""
DRIFT = "moice/drift"


class BalancedTrainer(BalanceLossMixin, Trainer):
    pass


def rows(count: int = 32) -> list[dict[str, list[int]]]:
    """Sequences of 4 to 14 tokens, of which the later half is predicted."""
    sequences = []
    for i, ids in enumerate(token_ids(count, 14)):
        length = 4 + i * 7 % 11
        sequences.append({"input_ids": ids[:length], "labels": ids[:length].clone()})
        sequences[-1]["labels"][: length // 2] = -100
    return sequences


def padded(sequences: list[dict]) -> dict[str, torch.Tensor]:
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ids = [row["input_ids"] for row in sequences]
    return {
        "input_ids": pad(ids),
        "labels": pad([row["labels"] for row in sequences], padding_value=-100),
        "attention_mask": pad([torch.ones_like(row) for row in ids]),
    }


def adapted(llama: str, **overrides) -> torch.nn.Module:
    model = get_peft_model(load(llama), wide_config(**{"router_aux_loss_coef": 0.5, **overrides}))
    decide(model)
    return model


def arguments_of(folder: Path, **overrides) -> TrainingArguments:
    defaults = {**TRAINING, "max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 0.05, "seed": 0}
    return TrainingArguments(output_dir=str(folder), **{**defaults, **overrides})


def trainer_of(model, folder: Path, trainer_class=Trainer, loss_func=None, **arguments) -> Trainer:
    return trainer_class(
        model=model,
        args=arguments_of(folder, **arguments),
        train_dataset=rows(),
        eval_dataset=rows(5),
        data_collator=padded,
        compute_loss_func=loss_func,
    )


def trained(llama: str, folder: Path, trainer_class=Trainer, loss_func=None, **arguments) -> dict[str, torch.Tensor]:
    """Router weights after two steps of SGD."""
    model = adapted(llama)
    trainer_of(model, folder, trainer_class, loss_func, **SGD, **arguments).train()
    return router_state(model)


@pytest.fixture(scope="module")
def expected(llama, tmp_path_factory) -> dict[str, torch.Tensor]:
    return trained(llama, tmp_path_factory.mktemp("expected"))


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def cross_entropy(outputs, labels, num_items_in_batch=None) -> torch.Tensor:
    logits = outputs["logits"][:, :-1].float().flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def test_the_balance_loss_shows_in_these_steps(llama, tmp_path, expected):
    """Without it, the steps that the tests below compare would differ far beyond their tolerance."""
    model = adapted(llama, router_aux_loss_coef=0.0)
    trainer_of(model, tmp_path, **SGD).train()
    assert max((value - expected[name]).abs().max() for name, value in router_state(model).items()) > 1e-2


@pytest.mark.parametrize("size, accumulation", [(1, 8), (2, 4)])
def test_steps_do_not_depend_on_accumulation(llama, tmp_path, expected, size, accumulation):
    arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    assert_equal(trained(llama, tmp_path, **arguments), expected, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing(llama, tmp_path, expected):
    assert_equal(trained(llama, tmp_path, gradient_checkpointing=True), expected)
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="use_reentrant"):
        trained(llama, tmp_path, **reentrant)


def test_mixin_changes_nothing_where_the_model_computes_the_loss(llama, tmp_path, expected):
    assert_equal(trained(llama, tmp_path, BalancedTrainer), expected)


@pytest.mark.parametrize("arguments", [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}])
def test_mixin_serves_loss_functions(llama, tmp_path, expected, arguments):
    """The model's own loss, written outside the model: the same steps, balance loss included."""
    weights = trained(llama, tmp_path, BalancedTrainer, cross_entropy, **arguments)
    assert_equal(weights, expected, rtol=1e-4, atol=1e-6)


def test_mixin_takes_no_step_with_a_gradient_that_is_not_finite(llama, tmp_path):
    model = adapted(llama)
    before = {name: value.clone() for name, value in router_state(model).items()}
    trainer = trainer_of(model, tmp_path, BalancedTrainer, lambda outputs, *_, **__: outputs["logits"].sum() / 0)
    with pytest.raises(RuntimeError, match="gradient of step 1 is not finite"):
        trainer.train()
    assert_equal(router_state(model), before)


def test_mixin_serves_label_smoothing(llama, tmp_path):
    model = adapted(llama)
    trainer = trainer_of(model, tmp_path, BalancedTrainer, label_smoothing_factor=0.3, max_steps=1, **SGD)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    trainer.train()

    by_hand = adapted(llama).train()
    optimizer = torch.optim.SGD([p for p in by_hand.parameters() if p.requires_grad], lr=SGD["learning_rate"])
    labels = batch.pop("labels")
    num_items = labels[:, 1:].ne(-100).sum()
    outputs = by_hand(**batch, output_router_logits=True)
    loss = LabelSmoother(epsilon=0.3)({"logits": outputs.logits}, labels, shift_labels=True)
    for row in range(8):
        share = labels[row, 1:].ne(-100).sum() / num_items
        logits = [layer[row : row + 1] for layer in outputs.router_logits]
        loss = loss + 0.5 * share * balance_loss(logits, 2, batch["attention_mask"][row : row + 1])
    loss.backward()
    optimizer.step()
    assert_equal(router_state(model), router_state(by_hand))


def test_label_smoothing_without_the_mixin_is_said(llama, tmp_path):
    with pytest.warns(UserWarning, match=r"mix in `peft_moice\.BalanceLossMixin`"):
        trained(llama, tmp_path, label_smoothing_factor=0.3, max_steps=1)


def test_resuming_equals_the_straight_run_bitwise(llama, tmp_path):
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}
    arguments["gradient_accumulation_steps"] = 2
    straight, resumed = adapted(llama), adapted(llama)
    trainer_of(straight, tmp_path / "straight", **arguments).train()
    trainer = trainer_of(resumed, tmp_path / "resumed", **arguments)
    trainer.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert trainer.state.global_step == 6
    for name, value in router_state(straight).items():
        assert torch.equal(value, router_state(resumed)[name]), name


def test_torch_compile(tmp_path):
    """One graph, the same step, and the same logs from the callback."""
    folder, weights, logs = save_tiny_model(tmp_path / "model", num_hidden_layers=1), [], []
    for arguments in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        model = adapted(folder)
        trainer = trainer_of(model, tmp_path, max_steps=1, **SGD, **arguments)
        trainer.add_callback(MoICECallback(trainer))
        trainer.train()
        weights.append(router_state(model))
        logs.append(next(entry for entry in trainer.state.log_history if "moice/drift" in entry))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_equal(*weights, rtol=1e-4, atol=1e-6)
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)


def test_bf16(llama, tmp_path):
    """Autocast leaves router weights in float32, and moves them as float32 would to within rounding.

    With all experts kept: where some are dropped, rounding changes which.
    """
    moves = []
    for bf16 in (False, True):
        model = adapted(llama, top_k=None)
        start = router_state(model)
        trainer_of(model, tmp_path, bf16=bf16, max_steps=1, **SGD).train()
        assert all(value.dtype == torch.float32 for value in router_state(model).values())
        moves.append(torch.cat([(value - start[name]).flatten() for name, value in router_state(model).items()]))
    assert torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.99


def test_callback_logs_what_the_routers_do(llama, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = adapted(llama)
    arguments = {"report_to": "tensorboard", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = trainer_of(model, tmp_path, logging_strategy="steps", max_steps=3, **arguments)
    trainer.args.logging_dir = str(tmp_path / "runs")
    trainer.add_callback(MoICECallback(trainer))
    collected, masks = [], []
    for layer in layers_of(model):
        layer.moice_router["default"].register_forward_hook(lambda *call: collected.append(call[2].detach()))
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"].bool()), with_kwargs=True
    )
    trainer.train()

    def rows_of(step: int) -> list[torch.Tensor]:
        """Logits `[1, 1, rows, N]` of each of three layers, over the four passes of a step."""
        passes = slice(4 * step, 4 * step + 4)
        of_layers = [zip(collected[layer::3][passes], masks[passes], strict=True) for layer in range(3)]
        return [
            torch.cat([logits.transpose(1, 2)[mask].flatten(0, 1) for logits, mask in parts])[None, None]
            for parts in of_layers
        ]

    def mean_gates(step: int) -> torch.Tensor:
        return torch.stack([select_experts(rows, 2).mean((0, 1, 2)) for rows in rows_of(step)])

    histories = [entry for entry in trainer.state.log_history if "moice/balance_loss" in entry]
    assert [entry["step"] for entry in histories] == [1, 2, 3]
    assert not any("layer" in key for entry in trainer.state.log_history for key in entry)
    last, pooled = histories[-1], torch.cat(rows_of(2), dim=2)
    assert last["moice/balance_loss"] == pytest.approx(balance_loss([pooled], 2).item(), rel=1e-5)
    entropy = torch.special.entr(pooled.softmax(-1)).sum(-1).mean().item()
    assert last["moice/entropy"] == pytest.approx(entropy, rel=1e-5)
    drift = (mean_gates(2) - mean_gates(0)).abs().sum(-1).mean().item() / 2
    assert drift > 1e-3 and histories[0][DRIFT] == 0.0
    assert last[DRIFT] == pytest.approx(drift, rel=1e-4)

    events = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent))
    events.Reload()
    for index, rows in enumerate(rows_of(2)):
        picks = torch.nn.functional.one_hot(rows.topk(2).indices, 4).sum(-2).float().mean((0, 1, 2))
        expected = {"balance_loss": balance_loss([rows], 2)}
        expected |= {f"load_{expert}": picks[expert] for expert in range(4)}
        expected |= {f"gate_{expert}": mean_gates(2)[index, expert] for expert in range(4)}
        for name, value in expected.items():
            logged = events.Scalars(f"train/moice/layer_{index:02d}/{name}")[-1].value
            assert logged == pytest.approx(value.item(), rel=1e-5)


def test_callback_says_once_what_trains_and_changes_nothing(llama, tmp_path, expected, caplog):
    model = adapted(llama)
    trainer = trainer_of(model, tmp_path, **SGD)
    trainer.add_callback(MoICECallback(trainer))
    with caplog.at_level("INFO", logger="peft_moice"):
        trainer.train()
    assert_equal(router_state(model), expected, rtol=0, atol=0)
    assert hooks_of(model).observer is None
    trainable, total = model.get_nb_trainable_parameters()
    (line,) = [record.message for record in caplog.records if record.message.startswith("training ")]
    assert line.startswith(f"training {trainable:,} of {total:,} parameters ({trainable / total:.3%}); ")
    assert "routers in 3 layers: rope_theta 10000 times 1, 0.25, 0.5, 4, K = 2 of 4" in line


def test_callback_resumes_its_drift(llama, tmp_path):
    histories = []
    for resume in (None, "checkpoint-2"):
        arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": True}
        trainer = trainer_of(adapted(llama), tmp_path, **arguments)
        trainer.add_callback(MoICECallback(trainer))
        trainer.train(resume_from_checkpoint=str(tmp_path / resume) if resume else None)
        histories.append([entry for entry in trainer.state.log_history if "moice/drift" in entry][2:])
    assert histories[0] == histories[1]
    assert len(histories[0]) == 2


@pytest.mark.parametrize("length", [{"max_steps": 6}, {"num_train_epochs": 1.5, "max_steps": -1}])
def test_callback_logs_at_the_end_of_every_epoch(llama, tmp_path, length):
    """Epochs of four steps, the last of which is cut off."""
    trainer = trainer_of(adapted(llama), tmp_path, logging_strategy="epoch", **length)
    trainer.add_callback(MoICECallback(trainer))
    trainer.train()
    logged = [[entry["step"] for entry in trainer.state.log_history if name in entry] for name in ("loss", DRIFT)]
    assert logged == [[4, 6], [4, 6]]


def test_callback_of_a_second_training_starts_anew(llama, tmp_path):
    """As a user trains one adapter after the other with the same trainer."""
    model = two_adapters(llama)
    trainer = trainer_of(model, tmp_path)
    trainer.add_callback(MoICECallback(trainer))
    for adapter_name in ("one", "two"):
        before = {name: router_state(model, name) for name in ("one", "two")}
        model.set_adapter(adapter_name)
        trainer.optimizer = None  # Trainer keeps it, with the weights of the adapter before
        trainer.train()
        drifts = [entry[DRIFT] for entry in trainer.state.log_history if DRIFT in entry]
        assert drifts[0] == 0 < drifts[1]
        changed = {
            name: any(not torch.equal(value, before[name][key]) for key, value in router_state(model, name).items())
            for name in ("one", "two")
        }
        assert changed == {"one": adapter_name == "one", "two": adapter_name == "two"}
