"""The balance loss on every path to a trained model."""

import copy
import dataclasses
import gc
import pickle
import threading
import warnings
import weakref
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from representatives import slow_but
from tiny_models import SHAPE, WIDE, decide, layers_of, load, tiny_encoder_decoder, token_ids, wide_config
from torch.utils import _pytree as pytree
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    MixtralConfig,
    T5GemmaForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from versions import needs_adapter_verbs_of_transformers

from peft_moice import collect_balance_loss
from peft_moice.routing.mixture import LayerMixture
from peft_moice.routing.router import balance_loss, select_experts
from peft_moice.training import add_balance_loss

COEF = 0.5


ADD_ADAPTER = pytest.param("add_adapter", marks=needs_adapter_verbs_of_transformers)


def adapted(llama: str, way: str = "get_peft_model", **overrides) -> torch.nn.Module:
    config = wide_config(**{"router_aux_loss_coef": COEF, **overrides})
    model = load(llama)
    if way == "add_adapter":
        model.add_adapter(config)
    else:
        config.task_type = None if way == "without task type" else "CAUSAL_LM"
        model = get_peft_model(model, config)
    decide(model)
    return model.train()


def loss_without_and_with(model: torch.nn.Module, **inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The language-model loss alone, the loss in training, and the balance loss computed from the router logits."""
    trained = model(**inputs, output_router_logits=True)
    mask = inputs.get("attention_mask")
    model.eval()
    with torch.no_grad():
        plain = model(**inputs).loss
    model.train()
    return plain, trained.loss, balance_loss(list(trained.router_logits), 2, mask)


@pytest.mark.parametrize("way", ["get_peft_model", "without task type", ADD_ADAPTER])
def test_reaches_the_loss(llama, way):
    ids = token_ids()
    plain, trained, balance = loss_without_and_with(adapted(llama, way), input_ids=ids, labels=ids)
    assert balance > 0
    torch.testing.assert_close(trained, plain + COEF * balance)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_reaches_the_loss_of_copies(llama, copy_of):
    ids = token_ids()
    twin = copy_of(adapted(llama))
    plain, trained, balance = loss_without_and_with(twin, input_ids=ids, labels=ids)
    torch.testing.assert_close(trained, plain + COEF * balance)
    unloaded = twin.unload()
    assert add_balance_loss not in unloaded._forward_hooks.values()
    assert torch.equal(unloaded.train()(input_ids=ids, labels=ids).loss, load(llama)(input_ids=ids, labels=ids).loss)


class Wrapper(torch.nn.Module):
    """A module of one's own around a model, adapted as a whole."""

    def __init__(self, model: torch.nn.Module, returned):
        super().__init__()
        self.model, self.returned = model, returned

    def forward(self, input_ids, labels=None):
        return self.returned(self.model(input_ids, labels=labels))


class LossLast(NamedTuple):
    logits: torch.Tensor
    loss: torch.Tensor


@pytest.mark.parametrize(
    "returned, loss_of",
    [
        (lambda outputs: outputs.loss, lambda outputs: outputs),
        (lambda outputs: {"loss": outputs.loss, "logits": outputs.logits}, lambda outputs: outputs["loss"]),
        (lambda outputs: (outputs.loss, outputs.logits), lambda outputs: outputs[0]),
        (lambda outputs: LossLast(outputs.logits, outputs.loss), lambda outputs: outputs.loss),
        (lambda outputs: SimpleNamespace(loss=outputs.loss), lambda outputs: outputs.loss),
    ],
    ids=["scalar", "dict", "tuple", "named tuple", "object"],
)
def test_reaches_the_loss_of_a_module_of_ones_own(llama, returned, loss_of):
    ids = token_ids()
    expected = adapted(llama)(input_ids=ids, labels=ids)
    model = get_peft_model(Wrapper(load(llama), returned), wide_config(task_type=None, router_aux_loss_coef=COEF))
    decide(model)
    outputs = model.train()(ids, labels=ids)
    torch.testing.assert_close(loss_of(outputs), expected.loss)
    if isinstance(outputs, dict):
        torch.testing.assert_close(outputs["aux_loss"], expected.aux_loss)


@needs_adapter_verbs_of_transformers
def test_positional_inputs(llama):
    model, ids = adapted(llama, "add_adapter"), token_ids()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    assert torch.equal(model(ids, mask, labels=ids).loss, model(input_ids=ids, attention_mask=mask, labels=ids).loss)


def test_training_follows_a_pass_in_inference_mode(llama):
    model, ids = adapted(llama), token_ids()
    with torch.inference_mode():
        model(input_ids=ids)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "moice_router" in name)


def test_is_the_coefficient_times_the_balance_gradient(llama):
    ids = token_ids()
    gradients = []
    for coef in (0.0, COEF):
        model = adapted(llama)
        for layer in layers_of(model):
            layer.router_specs["default"][0].router_aux_loss_coef = coef
        outputs = model(input_ids=ids, labels=ids, output_router_logits=True)
        if coef == 0.0:
            outputs.loss = outputs.loss + COEF * balance_loss(list(outputs.router_logits), 2)
        outputs.loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


def test_padding_does_not_count(llama):
    model = adapted(llama)
    ids = token_ids(2, 14)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    # The last padding token predicts the first real one, so that label is left out, too.
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 6] = -100
    plain, trained, balance = loss_without_and_with(model, input_ids=ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(trained, plain + COEF * balance)
    other = ids.clone()
    other[0, :6] = 7
    again = model(input_ids=other, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(again, trained)


def test_the_mask_of_tokens_behind_a_cache_is_its_end(llama):
    """Here the padding lies in the cache, where no router of this pass stands."""
    model, ids = adapted(llama), token_ids(2, 14)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        cache = model.eval()(ids[:, :8], attention_mask=mask[:, :8], use_cache=True).past_key_values
    outputs = model.train()(
        ids[:, 8:], attention_mask=mask, past_key_values=cache, labels=ids[:, 8:], output_router_logits=True
    )
    torch.testing.assert_close(outputs.aux_loss, balance_loss(list(outputs.router_logits), 2).detach())


def test_every_active_adapter_has_its_own(llama):
    model, ids = adapted(llama), token_ids()
    model.add_adapter("b", wide_config(base_multipliers=[1.0, 3.0], top_k=1, router_aux_loss_coef=2.0))
    decide(model, "b", seed=1)
    model.base_model.set_adapter(["default", "b"])
    outputs = model.train()(input_ids=ids, labels=ids, output_router_logits=True)
    assert outputs.router_logits.keys() == {"default", "b"}
    extra = COEF * balance_loss(list(outputs.router_logits["default"]), 2)
    extra = extra + 2.0 * balance_loss(list(outputs.router_logits["b"]), 1)
    torch.testing.assert_close(outputs.loss, model.eval()(input_ids=ids, labels=ids).loss + extra)


def test_is_absent_from_evaluation_and_where_adapters_are_disabled(llama):
    model, ids = adapted(llama), token_ids()
    with model.disable_adapter():
        disabled = model(input_ids=ids, labels=ids)
    assert torch.equal(disabled.loss, load(llama)(input_ids=ids, labels=ids).loss)
    model.eval()
    outputs = model(input_ids=ids, labels=ids)
    assert not hasattr(outputs, "aux_loss")
    assert not hasattr(outputs, "router_logits")


def test_the_constant_of_all_experts_is_reported_but_not_added_and_said_in_the_log(llama, caplog):
    with caplog.at_level("INFO", logger="peft_moice.tuner.model"):
        model, ids = adapted(llama, top_k=None), token_ids()
    assert "the balance loss is a constant without gradient" in caplog.text
    outputs = model(input_ids=ids, labels=ids)
    assert torch.equal(outputs.loss, model.eval()(input_ids=ids, labels=ids).loss)
    torch.testing.assert_close(outputs.aux_loss, torch.tensor(4.0))


@pytest.mark.parametrize("checkpointing", [None, "reentrant"])
def test_frozen_routers_add_nothing_to_the_loss_nor_to_other_gradients(llama, checkpointing):
    ids, results = token_ids(), []
    for coef in (0.0, COEF):
        model = adapted(llama, router_aux_loss_coef=coef).requires_grad_(False)
        use_checkpointing(model, checkpointing)
        for layer in layers_of(model):
            layer.q_proj.requires_grad_(True)
        outputs = model(input_ids=ids, labels=ids)
        outputs.loss.backward()
        results.append([outputs.loss, *gradients_of(model)])
    assert outputs.aux_loss > 1.0
    assert all(torch.equal(actual, expected) for actual, expected in zip(*results, strict=True))


def test_training_an_adapter_that_was_loaded_frozen_is_said(llama, tmp_path):
    adapted(llama).save_pretrained(tmp_path)
    ids = token_ids()
    frozen = PeftModel.from_pretrained(load(llama), tmp_path)
    use_checkpointing(frozen, "non-reentrant")
    with pytest.warns(UserWarning, match=r"routers of \['default'\].*is_trainable=True"):
        frozen.train()(input_ids=ids, labels=ids)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The model is in training mode")
        with torch.no_grad():
            frozen(input_ids=ids, labels=ids)
        with frozen.disable_adapter():
            frozen(input_ids=ids, labels=ids)
        # Prompts may be trained through a model whose weights are frozen.
        embeddings = frozen.get_input_embeddings()(ids).detach().requires_grad_()
        frozen(inputs_embeds=embeddings, labels=ids).loss.backward()
        frozen.eval()(input_ids=ids, labels=ids)
        trainable = PeftModel.from_pretrained(load(llama), tmp_path, is_trainable=True)
        trainable.train()(input_ids=ids, labels=ids)
        below = get_peft_model(load(llama), LoraConfig(target_modules=["q_proj"]))
        stacked = PeftModel.from_pretrained(below, tmp_path)
        below.base_model.requires_grad_(True)
        stacked.train()(input_ids=ids, labels=ids)


@pytest.mark.parametrize("checkpointing", [None, "non-reentrant"])
def test_a_loss_computed_outside_the_model_is_said(llama, checkpointing):
    """Of a model without labels, but only if a balance loss is left out."""
    model, ids = adapted(llama), token_ids()
    use_checkpointing(model, checkpointing)
    for named in (True, False):
        with pytest.warns(UserWarning, match="the balance loss of MoICE has no part in it"):
            model(input_ids=ids, return_dict=named)[0].logsumexp(-1).mean().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        outputs = model(input_ids=ids, labels=ids)
        (outputs.loss + outputs.logits.logsumexp(-1).mean()).backward()
        for silent in (adapted(llama, router_aux_loss_coef=0.0), adapted(llama, top_k=None)):
            if checkpointing:
                use_checkpointing(silent, checkpointing)
            silent(input_ids=ids).logits.logsumexp(-1).mean().backward()
        with torch.no_grad():
            model(input_ids=ids)
        model.eval()(input_ids=ids)


def use_checkpointing(model: torch.nn.Module, kind: str | None) -> None:
    if kind is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})


def gradients_of(model: torch.nn.Module) -> list[torch.Tensor]:
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("order", ["one pass", "two passes, one backward", "two passes, two backwards"])
def test_gradient_checkpointing_leaves_loss_and_gradients(llama, order):
    ids = token_ids(4)
    results = []
    for checkpointing in (None, "non-reentrant"):
        model = adapted(llama)
        use_checkpointing(model, checkpointing)
        parts = ids.split(4 if order == "one pass" else 2)
        outputs = [model(input_ids=part, labels=part) for part in parts]
        # Trainer, GradScaler and accumulation scale losses.
        losses = [scale * output.loss for scale, output in zip((8.0, 3.0), outputs, strict=False)]
        if order == "two passes, one backward":
            losses = [sum(losses)]
        for loss in losses:
            loss.backward()
        results.append([*losses, *gradients_of(model)])
        assert not any(layer.recorder for layer in layers_of(model)), "records or gradients were left behind"
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_reentrant_checkpointing_would_lose_the_balance_gradient(llama):
    """It runs a layer without a graph, and again in the backward pass."""
    ids, way_out = token_ids(), r'gradient_checkpointing_kwargs=\{"use_reentrant": False\}'
    model = adapted(llama)
    use_checkpointing(model, "reentrant")
    with pytest.raises(ValueError, match=way_out):
        model(input_ids=ids, labels=ids)
    with collect_balance_loss(model) as balance:
        model(input_ids=ids)
    with pytest.raises(ValueError, match=way_out):
        balance.loss()
    expected, silent = (adapted(llama, router_aux_loss_coef=0.0) for _ in range(2))
    use_checkpointing(silent, "reentrant")
    for without_balance in (expected, silent):
        without_balance(input_ids=ids, labels=ids).loss.backward()
    for actual, wanted in zip(gradients_of(silent), gradients_of(expected), strict=True):
        torch.testing.assert_close(actual, wanted)


SEQUENCE_LENGTHS = (14, 9, 14, 5, 11, 7, 14, 3)
ANSWER_LENGTHS = (13, 4, 6, 4, 1, 6, 9, 2)
"""Predicted tokens of each sequence; the rest carries the label -100."""


def batch_of(sequences: range, packed: bool) -> dict[str, torch.Tensor]:
    """Some of eight sequences, padded to a rectangle or packed into one row."""
    all_ids = token_ids(8, 14)
    rows = [all_ids[i, : SEQUENCE_LENGTHS[i]] for i in sequences]
    labels = [row.clone() for row in rows]
    for i, row in zip(sequences, labels, strict=True):
        row[: -ANSWER_LENGTHS[i]] = -100
    if packed:
        positions = torch.cat([torch.arange(len(row)) for row in rows])
        packed = {"input_ids": torch.cat(rows), "labels": torch.cat(labels), "position_ids": positions}
        # With a cache, transformers would let the packed sequences see each other.
        return {**{name: value[None] for name, value in packed.items()}, "use_cache": False}
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ones = [torch.ones_like(row) for row in rows]
    return {"input_ids": pad(rows), "labels": pad(labels, padding_value=-100), "attention_mask": pad(ones)}


def accumulated(model: torch.nn.Module, rows_per_pass: int, packed: bool = False) -> list[torch.Tensor]:
    """Loss and gradients of one step of eight sequences, with `num_items_in_batch` as Trainer gives it."""
    num_items, total = torch.tensor(sum(ANSWER_LENGTHS)), 0.0
    for first in range(0, 8, rows_per_pass):
        loss = model(**batch_of(range(first, first + rows_per_pass), packed), num_items_in_batch=num_items).loss
        loss.backward()
        total = total + loss.detach()
    return [total, *gradients_of(model)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows_per_pass", slow_but([2], [1, 2, 4, 8]))
@pytest.mark.parametrize("overrides", [{}, {"top_k": 1, "router_scope": "head"}])
def test_a_step_does_not_depend_on_how_its_batch_is_cut(llama, rows_per_pass, packed, overrides):
    expected = accumulated(adapted(llama, **overrides), 8)
    for actual, wanted in zip(accumulated(adapted(llama, **overrides), rows_per_pass, packed), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


def test_part_of_a_batch_balances_every_sequence_on_its_own(llama):
    model = adapted(llama)
    batch = batch_of(range(8), packed=False)
    with_balance = model(**batch, num_items_in_batch=torch.tensor(50), output_router_logits=True)
    logits, mask = with_balance.router_logits, batch["attention_mask"]
    expected = sum(
        ANSWER_LENGTHS[i] / 50 * balance_loss([layer[i : i + 1] for layer in logits], 2, mask[i : i + 1])
        for i in range(8)
    )
    plain = model.eval()(**batch, num_items_in_batch=torch.tensor(50)).loss
    torch.testing.assert_close(with_balance.loss - plain, COEF * expected)


@pytest.mark.parametrize("num_items", [0, torch.tensor(0)])
def test_a_batch_that_predicts_nothing_teaches_nothing(llama, num_items):
    model, ids = adapted(llama), token_ids()
    with collect_balance_loss(model) as balance:
        model(input_ids=ids)
    loss = balance.loss(torch.full_like(ids, -100), num_items)
    loss.backward()
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients_of(model))


def test_labels_of_whole_sequences(llama):
    """Every sequence counts by its labels, whatever its length, in a part of a batch of 14 labels as well."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3)
    model = get_peft_model(base, wide_config(task_type="SEQ_CLS", router_aux_loss_coef=COEF)).train()
    decide(model)
    batch = batch_of(range(8), packed=False)
    batch["labels"] = torch.tensor([0, 1, 2, -100, 0, 1, 2, 0])
    outputs = model(**batch, num_items_in_batch=torch.tensor(14), output_router_logits=True)
    logits, mask = outputs.router_logits, batch["attention_mask"]
    balances = [balance_loss([layer[i : i + 1] for layer in logits], 2, mask[i : i + 1]) for i in range(8) if i != 3]
    plain = model.eval()(**batch, num_items_in_batch=torch.tensor(14)).loss
    torch.testing.assert_close(outputs.loss - plain, COEF * torch.stack(balances).sum() / 14)


def test_labels_of_tokens_are_not_shifted(llama):
    """Token classification predicts the label at its own place, so the first one of a sequence counts."""
    torch.manual_seed(0)
    base = AutoModelForTokenClassification.from_pretrained(llama, num_labels=3)
    base.dropout.p = 0.0
    model = get_peft_model(base, wide_config(task_type="TOKEN_CLS", router_aux_loss_coef=COEF)).train()
    decide(model)
    ids = token_ids(2, 9)
    labels = (ids % 3).clone()
    labels[0, 1:] = -100
    outputs = model(input_ids=ids, labels=labels, output_router_logits=True)
    parts = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(10))
    balances = [balance_loss([layer[i : i + 1] for layer in outputs.router_logits], 2) for i in range(2)]
    plain = model.eval()(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(outputs.loss - plain, COEF * balance_loss(list(outputs.router_logits), 2))
    torch.testing.assert_close(parts.aux_loss, ((balances[0] + 9 * balances[1]) / 10).detach())


@pytest.fixture(scope="module")
def t5gemma() -> T5GemmaForConditionalGeneration:
    return tiny_encoder_decoder(sliding_window=16)


@pytest.mark.parametrize("source_length", [5, 9])
def test_routers_of_a_decoder_behind_an_encoder_count_the_tokens_of_the_targets(t5gemma, source_length):
    """Sources are as long as the targets or shorter, and padded otherwise."""
    model = get_peft_model(copy.deepcopy(t5gemma), wide_config(task_type="SEQ_2_SEQ_LM", router_aux_loss_coef=COEF))
    decide(model)
    source, target = token_ids(2, source_length), token_ids(2, 9, seed=1)
    source_mask = torch.ones_like(source)
    source_mask[1, 2:] = 0
    target[0, 4:] = -100
    batch = {"input_ids": source, "attention_mask": source_mask, "labels": target}
    outputs = model.train()(**batch, output_router_logits=True)
    assert all(logits.shape[-2] == 9 for logits in outputs.router_logits)
    # The decoder reads a start token and the targets, the last one excepted.
    target_mask = torch.ones_like(target)
    target_mask[0, 5:] = 0
    balance = balance_loss(list(outputs.router_logits), 2, target_mask)
    plain = model.eval()(**batch).loss
    torch.testing.assert_close(outputs.loss - plain, COEF * balance, rtol=1e-5, atol=1e-6)
    explicit = model.train()(**batch, decoder_attention_mask=target_mask, num_items_in_batch=torch.tensor(13))
    rows = [balance_loss([x[i : i + 1] for x in outputs.router_logits], 2, target_mask[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(explicit.aux_loss, ((4 * rows[0] + 9 * rows[1]) / 13).detach())


def test_balance_loss_for_losses_computed_outside_the_model(llama):
    inside = adapted(llama)
    expected = accumulated(inside, 2)
    model, num_items, total = adapted(llama), torch.tensor(sum(ANSWER_LENGTHS)), 0.0
    use_checkpointing(model, "non-reentrant")
    for first in range(0, 8, 2):
        batch = batch_of(range(first, first + 2), packed=False)
        labels = batch.pop("labels")
        with collect_balance_loss(model) as balance:
            logits = model(**batch).logits
            with torch.no_grad():
                model(**batch)  # such as the reference of DPO, which has no part in the loss
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        loss = loss / num_items + balance.loss(labels, num_items)
        loss.backward()
        total = total + loss.detach()
    for actual, wanted in zip([total, *gradients_of(model)], expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_a_loss_computed_from_hidden_states_has_the_balance_loss_of_the_decoder(llama):
    model, batch = adapted(llama), batch_of(range(8), packed=False)
    labels, num_items = batch.pop("labels"), torch.tensor(sum(ANSWER_LENGTHS))
    with collect_balance_loss(model) as whole:
        model(**batch)
    expected = whole.loss(labels, num_items)
    expected.backward()
    gradients = gradients_of(model)
    decoder = model.get_base_model().model
    with collect_balance_loss(model) as balance:
        decoder(**batch)
    loss = balance.loss(labels, num_items)
    loss.backward()
    assert torch.equal(loss, expected)
    assert all(torch.equal(*pair) for pair in zip(gradients_of(model), gradients, strict=True))
    with pytest.warns(UserWarning, match="the balance loss of MoICE has no part in it"):
        decoder(**batch)
    twin = copy.deepcopy(decoder)
    assert len(decoder(**batch, output_router_logits=True).router_logits) == len(layers_of(model))
    model.unload()
    assert not decoder._forward_hooks
    assert twin(**batch).aux_loss > 0


def test_a_decoder_alone_counts_its_own_tokens(t5gemma):
    model = get_peft_model(copy.deepcopy(t5gemma), wide_config(task_type="SEQ_2_SEQ_LM", router_aux_loss_coef=COEF))
    decide(model)
    ids, mask = token_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    base = model.train().get_base_model().model
    states = base.encoder(input_ids=ids).last_hidden_state
    outputs = base.decoder(ids, attention_mask=mask, encoder_hidden_states=states, output_router_logits=True)
    torch.testing.assert_close(outputs.aux_loss, balance_loss(list(outputs.router_logits), 2, mask).detach())


def test_collecting_needs_an_adapter(llama):
    with pytest.raises(ValueError, match="has no MoICE adapter"), collect_balance_loss(load(llama)):
        pass


def test_autocast_computes_the_balance_loss_in_float32(llama):
    """From the logits that autocast gives, with no further rounding; bfloat16 could not even count the rows."""
    model, ids = adapted(llama), token_ids(2, 100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(input_ids=ids, labels=ids, output_router_logits=True)
    assert outputs.router_logits[0].dtype == torch.bfloat16
    assert torch.equal(outputs.aux_loss, balance_loss(list(outputs.router_logits), 2).detach())
    outputs.loss.backward()
    assert all(g.dtype == torch.float32 and g.abs().max() > 0 for g in gradients_of(model))


@pytest.mark.slow
def test_passes_are_freed_without_the_garbage_collector(llama):
    model, ids = adapted(llama), token_ids()
    use_checkpointing(model, "non-reentrant")
    gc.collect()
    gc.disable()
    try:
        outputs = model(input_ids=ids, labels=ids, output_router_logits=True)
        kept = [weakref.ref(outputs.logits), weakref.ref(outputs.router_logits[0])]
        outputs.loss.backward()
        del outputs
        assert [ref() for ref in kept] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("inner", [False, True])
def test_a_pass_that_breaks_off_leaves_nothing_recording(llama, error, inner):
    model, ids = adapted(llama), token_ids()
    expected = model(ids, labels=ids).loss

    def break_off(*_):
        raise error

    handle = layers_of(model)[1].register_forward_hook(break_off)
    with pytest.raises(error):
        (model.get_base_model().model if inner else model)(input_ids=ids)
    handle.remove()
    if error is ZeroDivisionError:
        assert not any(layer.recorder for layer in layers_of(model))
    assert torch.equal(model(ids, labels=ids).loss, expected)
    assert not hasattr(model.eval()(input_ids=ids), "router_logits")
    assert not any(layer.recorder for layer in layers_of(model))


def replica_of(module: torch.nn.Module) -> torch.nn.Module:
    """As `nn.DataParallel` makes them for its threads, on the device and with the parameters of the original."""
    replica = module._replicate_for_data_parallel()
    replica._parameters = module._parameters
    replica._modules.update({name: replica_of(child) for name, child in module._modules.items() if child is not None})
    return replica


def test_replicas_have_passes_of_their_own(llama):
    """One waits in the middle of its pass until the other's is over."""
    model, ids, losses = adapted(llama), token_ids(), []
    expected = model(ids, labels=ids).loss
    inside, over = threading.Event(), threading.Event()

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            over.wait()

    layers_of(model)[0].register_forward_hook(wait)
    first, second = replica_of(model), replica_of(model)
    thread = threading.Thread(target=lambda: losses.append(first(ids, labels=ids).loss))
    thread.start()
    inside.wait()
    losses.append(second(ids, labels=ids).loss)
    over.set()
    thread.join()
    assert len(losses) == 2 and all(torch.equal(loss, expected) for loss in losses)


@pytest.mark.parametrize("implementation", ["native", "delegated"])
def test_the_gradient_of_the_identity_scale_is_that_of_finite_differences(llama, implementation):
    """The output of a layer is linear in its scales, so that a difference over a step of 1 is exact."""
    model, calls = adapted(llama, init_weights="identity", implementation=implementation), []
    layer = layers_of(model)[0]
    scale = layer.moice_router["default"].identity_scale
    scale.data.zero_()
    layer.register_forward_pre_hook(lambda *call: calls.append(call[1:]), with_kwargs=True)
    model(token_ids(), use_cache=False)

    def weighted_output() -> torch.Tensor:
        output = layer(*calls[0][0], **calls[0][1])[0]
        return (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum()

    start = weighted_output()
    (actual,) = torch.autograd.grad(start, scale)
    scale.data += 1
    assert actual.sum().abs() > 0.05  # far above the tolerance
    torch.testing.assert_close(actual.sum(), (weighted_output() - start).detach(), rtol=1e-3, atol=1e-4)


def test_an_identity_scale_that_learns_picks_the_chosen_experts_and_the_own_angle(llama):
    """So its training costs K + 1 attentions at most, not N."""
    model = adapted(llama, init_weights="identity")
    layer = layers_of(model)[0]
    layer.moice_router["default"].identity_scale.data.zero_()
    query = torch.randn(2, 4, 5, 16, generator=torch.Generator().manual_seed(0))
    mixture = LayerMixture(layer.shares(), layer.rope)
    gating = mixture.gate(query, mixture.rope_bases())
    expected = select_experts(layer.moice_router["default"](query), 2) > 0
    expected[..., WIDE.index(1.0)] = True
    assert torch.equal(gating.picked, expected)
    assert expected.sum(-1).max() == 3 == mixture.call_of_pass(0, (torch.zeros(2, 5, 32),), {}).top_k
    layer.moice_router.requires_grad_(False)
    assert mixture.gate(query, mixture.rope_bases()).picked is None


@pytest.mark.parametrize(
    "rebuilt",
    [
        lambda outputs: pytree.tree_unflatten(*reversed(pytree.tree_flatten(outputs))),
        lambda outputs: type(outputs)(dict(outputs)),
        lambda outputs: pickle.loads(pickle.dumps(outputs)),
        copy.copy,
        copy.deepcopy,
        dataclasses.replace,
    ],
    ids=["pytree", "mixed precision", "pickle", "copy", "deepcopy", "replace"],
)
def test_outputs_made_anew_keep_our_entries(llama, rebuilt):
    with torch.no_grad():
        outputs = adapted(llama)(token_ids(), labels=token_ids(), output_router_logits=True, use_cache=False)
    twin = rebuilt(outputs)
    assert isinstance(twin, CausalLMOutputWithPast)
    assert list(twin) == list(outputs) == ["loss", "logits", "router_logits", "aux_loss"]
    assert torch.equal(twin["aux_loss"], outputs.aux_loss)
    assert all(map(torch.equal, twin.router_logits, outputs.router_logits))


def test_router_logits_of_a_mixture_of_experts_model_are_left_alone():
    torch.manual_seed(0)
    config = MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), wide_config()).eval()
    outputs = model(input_ids=token_ids(), output_router_logits=True)
    assert len(outputs.router_logits) == len(outputs.moice_router_logits) == 3
    assert outputs.router_logits[0].shape[-1] == 4
    assert outputs.moice_router_logits[0].shape == (2, 4, 14, 4)
