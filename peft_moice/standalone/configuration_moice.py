"""Lets transformers read this model with `trust_remote_code=True`. All of its code is in the package peft_moice.

Nothing here runs where `import peft_moice` has been made before.
"""

try:
    from peft_moice.standalone import MoICEAutoConfig
except ModuleNotFoundError as error:
    if error.name != "peft_moice":
        raise
    raise ImportError(
        "This model has MoICE routers built in, which are in the package peft_moice. Install it, with "
        "`pip install peft_moice`, and load the model again."
    ) from error

__all__ = ["MoICEAutoConfig"]
