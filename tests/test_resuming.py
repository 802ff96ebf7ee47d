"""Training on from what was saved, and with gradient checkpointing."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import decide, load, router_state, token_ids, wide_config


def train_step(model, optimizer, seed=0):
    optimizer.zero_grad()
    ids = token_ids(seed=seed)
    model(ids, labels=ids).loss.backward()
    optimizer.step()


def test_training_resumes_from_a_loaded_adapter(llama, tmp_path):
    def trainer_of(model):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.SGD(parameters, lr=0.5)

    model = get_peft_model(load(llama), wide_config()).train()
    decide(model)
    start = router_state(model)
    train_step(model, trainer_of(model))
    model.save_pretrained(tmp_path)
    train_step(model, trainer_of(model), seed=1)
    assert all(not torch.equal(weight, start[name]) for name, weight in router_state(model).items())

    resumed = PeftModel.from_pretrained(load(llama), tmp_path, is_trainable=True).train()
    assert {name for name, p in resumed.named_parameters() if p.requires_grad} == set(router_state(resumed))
    assert not resumed.peft_config["default"].inference_mode
    train_step(resumed, trainer_of(resumed), seed=1)
    for name, weight in router_state(model).items():
        assert torch.equal(router_state(resumed)[name], weight)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_gradient_checkpointing_changes_nothing(bases, family, use_reentrant):
    # The balance loss under reentrant checkpointing is not this test's subject.
    coefficient = 0.0 if use_reentrant else 0.3
    model = get_peft_model(load(bases[family]), wide_config(router_aux_loss_coef=coefficient)).train()
    decide(model)

    def loss_and_gradients():
        model.zero_grad()
        loss = model(token_ids(), labels=token_ids(), use_cache=False).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected_loss, expected = loss_and_gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    loss, gradients = loss_and_gradients()
    assert torch.equal(loss, expected_loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
