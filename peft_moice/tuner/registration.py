"""Registers MoICE with PEFT and with transformers.

PEFT keeps its tuner types in the closed enumeration `PeftType` and offers no entry point for types from outside, so
`import peft_moice` has to run once before PEFT can read a MoICE adapter, or transformers a model that MoICE was merged
into.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method
from transformers import AttentionInterface, AutoConfig

from ..attention.interface import ATTENTION_NAME, moice_attention_forward
from ..routing.spec import PEFT_TYPE_NAME
from ..standalone.models import MODEL_TYPE, MoICEAutoConfig
from .config import MoICEConfig
from .model import MoICEModel


def add_peft_type(name: str) -> PeftType:
    """Return the `PeftType` member called `name`, adding it to the enumeration if it is missing.

    A real member is needed: `register_peft_method` looks `name` up in `list(PeftType)`, and transformers' adapter
    loader reads `peft_type.value`, which a plain string lacks.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    vars(member).update(__objclass__=PeftType, _sort_order_=len(PeftType))
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # EnumType forbids assigning members through the ordinary attribute protocol.
    type.__setattr__(PeftType, name, member)
    return member


def register() -> None:
    """Register adapters with PEFT, and merged models and the attention function with transformers.

    Calling it again changes nothing.
    """
    member = add_peft_type(PEFT_TYPE_NAME)
    if member not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=PEFT_TYPE_NAME.lower(), config_cls=MoICEConfig, model_cls=MoICEModel)
    AttentionInterface.register(ATTENTION_NAME, moice_attention_forward)
    AutoConfig.register(MODEL_TYPE, MoICEAutoConfig, exist_ok=True)
