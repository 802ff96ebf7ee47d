"""Options and fixtures of the test-suite."""

import pytest
import torch
from hypothesis import settings
from peft import PeftModel, get_peft_model
from tiny_models import FAMILIES, OTHER, adapted_model, decide, load, save_tiny_model, wide_config

# Property tests draw the same examples in every run, so that a failure can be had again, and are not judged by time.
settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")


def pytest_addoption(parser):
    parser.addoption(
        "--all-families",
        action="store_true",
        help="check every feature on every family that transformers knows, for .ci/make_support_matrix.py",
    )


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, str]:
    """Folders of one tiny model per family, which tests only read."""
    return {family: save_tiny_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="session")
def llama(bases) -> str:
    return bases["llama"]


@pytest.fixture
def adapted(llama):
    """A tiny llama with one adapter that decides firmly."""
    return adapted_model(llama)


@pytest.fixture
def adapter(adapted, tmp_path) -> str:
    """The folder of that adapter."""
    adapted.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


@pytest.fixture
def model(llama) -> PeftModel:
    """Adapters "a" and "b" of the same shape, and "other" with other angles and routers per head. "a" is active."""
    model = get_peft_model(load(llama), wide_config(), adapter_name="a")
    model.add_adapter("b", wide_config())
    model.add_adapter("other", wide_config(**OTHER))
    for seed, name in enumerate(("a", "b", "other")):
        decide(model, name, seed=seed)
    return model.eval()


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Positions of single tokens are not looked at, as on a device that Python would have to wait for."""
    from peft_moice.rope import given_positions, noted_keys, positions

    for module in (given_positions, noted_keys, positions):
        monkeypatch.setattr(module, "can_look", lambda ids: ids.shape[-1] > 1)
