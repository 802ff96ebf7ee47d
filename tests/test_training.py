"""The balance loss on every path to a trained model."""

import copy
import pickle
import warnings

import pytest
import torch
from peft import get_peft_model
from tiny_models import SHAPE, decide, load, save_tiny_model, token_ids, wide_config
from transformers import AutoModelForCausalLM, MixtralConfig

from peft_moice import MoICEModel
from peft_moice.router import balance_loss
from peft_moice.training import add_balance_loss

COEF = 0.5


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


def adapted(llama: str, way: str = "get_peft_model", **overrides) -> torch.nn.Module:
    config = wide_config(router_aux_loss_coef=COEF, **overrides)
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


@pytest.mark.parametrize("way", ["get_peft_model", "without task type", "add_adapter"])
def test_reaches_the_loss(llama, way):
    ids = token_ids()
    plain, trained, balance = loss_without_and_with(adapted(llama, way), input_ids=ids, labels=ids)
    assert balance > 0
    torch.testing.assert_close(trained, plain + COEF * balance)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_reaches_the_loss_of_copies(llama, copy_of):
    ids = token_ids()
    plain, trained, balance = loss_without_and_with(copy_of(adapted(llama)), input_ids=ids, labels=ids)
    torch.testing.assert_close(trained, plain + COEF * balance)


def test_reaches_the_first_element_of_a_tuple(llama):
    model, ids = adapted(llama), token_ids()
    outputs = model(input_ids=ids, labels=ids)
    assert torch.equal(model(input_ids=ids, labels=ids, return_dict=False)[0], outputs.loss)


def test_positional_inputs(llama):
    model, ids = adapted(llama, "add_adapter"), token_ids()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    assert torch.equal(model(ids, mask, labels=ids).loss, model(input_ids=ids, attention_mask=mask, labels=ids).loss)


def test_has_gradients_only_in_the_routers(llama):
    model, ids = adapted(llama), token_ids()
    model(input_ids=ids, labels=ids).aux_loss  # noqa: B018
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == ("moice_router" in name), name


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
        for layer in (module for module in model.modules() if hasattr(module, "router_specs")):
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


def test_accumulated_micro_batches_weigh_as_one_batch(llama):
    """With `num_items_in_batch`, as Trainer passes it, a micro-batch adds its share of the batch's tokens."""
    model, ids = adapted(llama), token_ids(4, 14)
    num_items = torch.tensor(ids[:, 1:].numel())
    balance = [balance_loss(list(model(part, output_router_logits=True).router_logits), 2) for part in ids.split(1)]
    losses = [model(input_ids=part, labels=part, num_items_in_batch=num_items).loss for part in ids.split(1)]
    model.eval()
    plain = [model(input_ids=part, labels=part, num_items_in_batch=num_items).loss for part in ids.split(1)]
    torch.testing.assert_close(sum(losses) - sum(plain), COEF * sum(balance) / 4)


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


def test_a_missing_loss_is_said(llama):
    model, ids = adapted(llama), token_ids()
    with pytest.warns(UserWarning, match="returned no loss, so the balance loss of MoICE was not added"):
        model(input_ids=ids)
    quiet = adapted(llama)
    for layer in (module for module in quiet.modules() if hasattr(module, "router_specs")):
        layer.router_specs["default"][0].router_aux_loss_coef = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet(input_ids=ids)


def test_gradient_checkpointing_leaves_loss_and_gradients(llama):
    ids = token_ids()
    results = []
    for checkpointing in (False, True):
        model = adapted(llama)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        outputs = model(input_ids=ids, labels=ids)
        outputs.loss.backward()
        results.append([outputs.loss, *(p.grad for p in model.parameters() if p.requires_grad)])
        kept = [m.router_logits for m in model.modules() if hasattr(m, "router_logits")]
        assert kept == [None] * len(kept), "the recomputed pass left router logits behind"
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_router_logits_of_a_mixture_of_experts_model_are_left_alone():
    torch.manual_seed(0)
    config = MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), wide_config()).eval()
    outputs = model(input_ids=token_ids(), output_router_logits=True)
    assert len(outputs.router_logits) == len(outputs.moice_router_logits) == 3
    assert outputs.router_logits[0].shape[-1] == 4
    assert outputs.moice_router_logits[0].shape == (2, 4, 14, 4)


def test_all_experts_kept_is_said_in_the_log(llama, caplog):
    with caplog.at_level("INFO", logger="peft_moice.model"):
        get_peft_model(load(llama), wide_config(top_k=None))
    assert "the balance loss is a constant without gradient" in caplog.text


def test_hooks_are_registered_once(llama):
    model = adapted(llama)
    model.add_adapter("b", wide_config())
    base = model.get_base_model()
    for hooks in (base._forward_hooks, base._forward_pre_hooks):
        assert len(hooks) == len(set(hooks.values()))
    assert add_balance_loss in base._forward_hooks.values()
    assert isinstance(model.base_model, MoICEModel)
