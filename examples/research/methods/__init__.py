"""What is compared: a method is a file of this folder, found by its name.

`NAME.py` has `make(model, options)`, which gets a model of transformers and a dict, and returns the model to train or,
if none of its parameters asks for a gradient, to measure. Its docstring names the source and the options. It may have
`VARIANTS`, which gives further names of the command line their options: `{"NAME_wide": {"width": 8}}`.

`make, options = METHODS[name]` finds either. Every model gets the option `tokenizer` in `compare.py`, which itself
reads two options: `balance`, above 0 where MoICE's balance loss is to be added, and `rates`, factors of the learning
rate by a part of a parameter's name. Where the base model is needed beside the adapted one, adapters of PEFT are
switched off, and modules of a method by setting their attribute `enabled` to False.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from torch import nn

METHODS: dict[str, tuple[Callable[[nn.Module, dict], nn.Module], dict]] = {}
for _file in sorted(Path(__file__).parent.glob("[!_]*.py")):
    _module = import_module(f"methods.{_file.stem}")
    for _name, _options in ({_file.stem: {}} | getattr(_module, "VARIANTS", {})).items():
        if _name in METHODS:
            raise ValueError(f"Two files name a method {_name!r}; {_file.name} is one of them. Rename one.")
        METHODS[_name] = (_module.make, _options)
