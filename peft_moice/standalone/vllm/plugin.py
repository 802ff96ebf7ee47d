"""What vLLM calls when it starts, in each of its processes."""

_MODULE = "peft_moice.standalone.vllm.model"
_BACKEND = "peft_moice.standalone.vllm.rotating_cache.RotatingBackend"


def register() -> None:
    """Tell vLLM about merged models. Calling it again changes nothing.

    Classes are named and not imported, because importing them could initialize CUDA before vLLM forks.
    """
    from vllm import ModelRegistry
    from vllm.transformers_utils.config import get_config_parser, register_config_parser
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    import peft_moice  # noqa: F401  # tells transformers' `AutoConfig` about merged models

    from .config_parser import ARCHITECTURES, MoICEConfigParser
    from .options import BACKEND_NAME

    if not isinstance(get_config_parser("hf"), MoICEConfigParser):
        register_config_parser("hf")(MoICEConfigParser)
    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, f"{_MODULE}:{name}")
    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        AttentionBackendEnum.register(BACKEND_NAME, _BACKEND)
