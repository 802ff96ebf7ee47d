"""Old names of modules import the new ones, and say so."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("callback", "training.callback"),
        ("plotting", "evaluation.plotting"),
        ("data", "training.data"),
        ("data.sources", "training.data.sources"),
        ("serving.folder", "standalone.vllm.folder"),
    ],
)
def test_an_old_name_is_the_new_module(old, new):
    sys.modules.pop(f"peft_moice.{old}", None)
    with pytest.warns(FutureWarning, match=rf"peft_moice\.{old} has moved to peft_moice\.{new}"):
        module = importlib.import_module(f"peft_moice.{old}")
    assert module is importlib.import_module(f"peft_moice.{new}")
    assert module.__name__ == f"peft_moice.{new}"


def test_names_that_never_were_are_no_modules():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("peft_moice.nonsense")
