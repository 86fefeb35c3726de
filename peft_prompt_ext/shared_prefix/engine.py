"""The state of one model between its batches: proved statuses, and prompt keys and values.

Shapes: P virtual tokens, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .interface import attach, get_attention
from .kept_prefix import keep_prefix
from .packed_pass import KeptPrefix
from .precision import precision_of
from .probe import prove
from .status import EngineStatus
from .watch import Watch


logger = logging.getLogger(__name__)


class Engine:
    """The engine of one PeftModel. A copied or unpickled model gets a new one.

    Attributes:
        last: The base model's attention and the status in the last batch; None before a batch.
        prefixes: The kept prefix of each adapter, with its proof key; valid while the watch holds.
    """

    def __init__(self) -> None:
        self.last: tuple[Any, EngineStatus] | None = None
        self.prefixes: dict[str, tuple[Any, KeptPrefix]] = {}
        self._proved: dict[Any, EngineStatus] = {}
        self._watch: Watch | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Engine, ()

    def prove(self, base_model: Any, forward: Callable[..., Any], words: Any, run: bool = True) -> EngineStatus:
        """Prove that batches may run packed, once for each device, precision and attention.

        Args:
            base_model: A model of transformers with its head.
            forward: See `probe.prove`.
            words: Its word embeddings.
            run: See `probe.prove`.
        """
        key = make_proof_key(base_model, words)
        if key not in self._proved:
            self._proved[key] = prove(base_model, forward, words, run)
        elif self._proved[key].packed:
            attach(base_model)
        return self._proved[key]

    def refuse(self, base_model: Any, words: Any, refusal: Exception) -> EngineStatus:
        """Switch to PEFT's path, and log why."""
        status = EngineStatus(False, str(refusal))
        logger.info("From now on, batches take PEFT's path: %s.", status.reason)
        self._proved[make_proof_key(base_model, words)] = status
        return status

    def set_last_status(self, base_model: Any, status: EngineStatus) -> None:
        """Store the status of the last batch."""
        self.last = get_attention(base_model), status

    def get_last_status(self, base_model: Any) -> EngineStatus | None:
        """Get the status of the last batch; None before a batch, or after a change of the attention."""
        return self.last[1] if self.last is not None and self.last[0] == get_attention(base_model) else None

    def keep(self, base_model: Any, words: Any, prompts: Mapping[str, torch.Tensor]) -> list[KeptPrefix] | None:
        """Get the kept prefixes of prompts [P, H]; None if the base model does not allow it as it is now."""
        if self._watch is None or not self._watch.holds():
            self._watch, self.prefixes = Watch(base_model), {}
        if not self._watch.constant:
            return None
        key = make_proof_key(base_model, words)
        for name, prompt in prompts.items():
            kept = self.prefixes.get(name)
            if kept is None or kept[0] != key or not torch.equal(kept[1].prompt, prompt):
                self.prefixes[name] = key, keep_prefix(base_model, prompt)
                self._watch.expect()
        return [self.prefixes[name][1] for name in prompts]

    def forget_prefixes(self) -> None:
        """Drop all kept prefixes."""
        self.prefixes, self._watch = {}, None

    def forget_proofs(self) -> None:
        """Drop all proofs, so that the probe runs again."""
        self.last, self._proved = None, {}


def make_proof_key(base_model: Any, words: Any) -> Any:
    """Make the key of a proof: the device, the precision and the attention."""
    return precision_of(words), get_attention(base_model)
