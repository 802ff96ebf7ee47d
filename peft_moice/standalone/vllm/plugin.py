"""What vLLM calls when it starts, in each of its processes."""

_MODULE = "peft_moice.standalone.vllm.model"


def register() -> None:
    """Tell vLLM about merged models. Calling it again changes nothing.

    Classes are named and not imported, because importing them could initialize CUDA before vLLM forks.
    """
    from vllm import ModelRegistry
    from vllm.transformers_utils.config import get_config_parser, register_config_parser

    import peft_moice  # noqa: F401  # tells transformers' `AutoConfig` about merged models

    from .config_parser import ARCHITECTURES, MoICEConfigParser

    if not isinstance(get_config_parser("hf"), MoICEConfigParser):
        register_config_parser("hf")(MoICEConfigParser)
    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, f"{_MODULE}:{name}")
