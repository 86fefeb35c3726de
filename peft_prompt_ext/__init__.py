"""Prompt tuning that learns: one config for PEFT and the Trainer. Only public names live here."""

from ._versions import check_versions


check_versions()  # before anything of PEFT is touched, so that a wrong version gives one clear error

from . import peft_models  # noqa: E402
from .config import PromptTuningExtConfig  # noqa: E402
from .inits import available_inits, register_init  # noqa: E402
from .peft_models.packed import engine_status  # noqa: E402
from .quantization import load_frozen_backbone  # noqa: E402
from .shared_prefix.status import EngineStatus  # noqa: E402


__version__ = "0.2.0"
__all__ = [
    "EngineStatus",
    "MemoryEstimate",
    "PromptTuningExtConfig",
    "available_inits",
    "clear_text_cache",
    "engine_status",
    "estimate_memory",
    "load_frozen_backbone",
    "register_init",
]


def __getattr__(name: str) -> object:
    if name == "clear_text_cache":
        from .shared_prefix.text_folder import clear_text_cache

        return clear_text_cache
    if name in {"MemoryEstimate", "estimate_memory"}:  # imports that nothing else needs
        from . import memory

        return getattr(memory, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Loading an adapter (`PeftModel.from_pretrained`) needs PEFT's tables changed before any config of ours exists.
peft_models.register()
