"""Makes PEFT know the type MCLORA."""

from __future__ import annotations

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method


PEFT_TYPE = "MCLORA"


def add_peft_type(name: str) -> PeftType:
    """Return the member `name` of PEFT's closed enum `PeftType`, adding it first if it is missing.

    PEFT calls `.value` on the type of every config and looks the name up in the enum when a method is registered, so a
    plain string is not enough. This is the only place where the project touches an object of PEFT's.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # The metaclass refuses to assign members; attribute access (PeftType.MCLORA) needs the entry all the same.
    type.__setattr__(PeftType, name, member)
    return member


def register(config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Register the tuner with PEFT's own `register_peft_method`.

    Harmless when repeated: if the package is imported afresh (a reload in a notebook, say) the newest classes take over.
    """
    peft_type = add_peft_type(PEFT_TYPE)
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(peft_type, None)
    register_peft_method(name=PEFT_TYPE.lower(), config_cls=config_cls, model_cls=model_cls)
