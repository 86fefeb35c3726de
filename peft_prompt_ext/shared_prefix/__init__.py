"""The shared-prefix engine: the prompt runs once for a whole batch, and pads do not run at all."""

from .model import SharedPrefixMixin, engine_status
from .status import EngineStatus


__all__ = ["EngineStatus", "SharedPrefixMixin", "engine_status"]
