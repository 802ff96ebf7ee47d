"""`transformers serve` for a merged model: `python -m peft_moice.standalone.transformers_server FOLDER [OPTIONS]`.

That server looks a model's class up by its name in the package `transformers`, which has none for a merged model. This
puts the class there, in its own process only, and hands all arguments on.
"""

import os
import sys
from pathlib import Path

import transformers
from transformers import AutoConfig

import peft_moice  # noqa: F401  # tells `AutoConfig` about merged models
from peft_moice.standalone import models
from peft_moice.standalone.vllm.folder import check_files, refuse_adapter

_USAGE = "usage: python -m peft_moice.standalone.transformers_server FOLDER [OPTIONS of `transformers serve`]"


def add_model_class(source: str) -> None:
    """Put the class of the merged model at `source`, a folder or a name on the Hub, into the package `transformers`.

    Raises:
        ValueError, TypeError: it is not a merged model, or its files are damaged; says what to do.
        OSError: there is no model.
    """
    is_folder = os.path.isdir(source)
    if is_folder:
        refuse_adapter(Path(source))
    config = AutoConfig.from_pretrained(source)
    if not hasattr(type(config), "original_class"):
        raise ValueError(
            f"{source} holds a plain {config.model_type!r} model, without MoICE routers. Serve it with `transformers "
            f"serve {source}`."
        )
    if is_folder:
        check_files(Path(source))
    name = (config.architectures or [""])[0]
    try:
        setattr(transformers, name, getattr(models, name))
    except AttributeError:
        raise ValueError(
            f"The config of {source} names {config.architectures} as the model's class, of which transformers has no "
            "base. Write the model anew, with `merge_and_unload().save_pretrained(...)`."
        ) from None


def main(arguments: list[str] | None = None) -> None:
    """Serve until interrupted.

    Args:
        arguments: the model, then options of `transformers serve`. Default: those of the command line.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0].startswith("-"):
        sys.exit(_USAGE)
    try:
        add_model_class(arguments[0])
    except (OSError, ValueError, TypeError) as error:
        sys.exit(str(error))
    from transformers.cli.transformers import app

    app(["serve", *arguments])


if __name__ == "__main__":
    main()
