"""What is proved and kept for one model between its batches: statuses, and prompt keys and values.

Shapes: P virtual tokens, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .interface import attach, attention_of
from .kept_prefix import KeptPrefix, keep_prefix
from .precision import precision_of
from .probe import prove
from .status import EngineStatus
from .watch import Watch


logger = logging.getLogger(__name__)


class Engine:
    """Belongs to one PeftModel. A copy of the model, or the model on another machine, gets a new one.

    Attributes:
        last: The status of the last batch, and the attention that the base model had; None before a batch.
        prefixes: By adapter, its kept prefix and what that was computed in; they hold while the watch does.
    """

    def __init__(self) -> None:
        self.last: tuple[Any, EngineStatus] | None = None
        self.prefixes: dict[str, tuple[Any, KeptPrefix]] = {}
        self._proved: dict[Any, EngineStatus] = {}
        self._watch: Watch | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Engine, ()

    def prove(self, base_model: Any, forward: Callable[..., Any], words: Any, run: bool = True) -> EngineStatus:
        """Tell whether a batch of now may run packed; the probe runs once for each device, precision and attention.

        Args:
            base_model: A model of transformers with its head.
            forward: See `probe.prove`.
            words: Its word embeddings.
            run: See `probe.prove`.
        """
        now = circumstances(base_model, words)
        if now not in self._proved:
            self._proved[now] = prove(base_model, forward, words, run)
        elif self._proved[now].packed:
            attach(base_model)
        return self._proved[now]

    def refuse(self, base_model: Any, words: Any, refusal: Exception) -> EngineStatus:
        """Take PEFT's path from here on, and log why."""
        status = EngineStatus(False, str(refusal))
        logger.info("The shared prefix is no longer used, PEFT's path is: %s.", status.reason)
        self._proved[circumstances(base_model, words)] = status
        return status

    def note(self, base_model: Any, status: EngineStatus) -> None:
        """Keep the status of the batch that ran."""
        self.last = attention_of(base_model), status

    def last_status(self, base_model: Any) -> EngineStatus | None:
        """The status of the last batch; None before one, and if the base model has another attention since."""
        return self.last[1] if self.last is not None and self.last[0] == attention_of(base_model) else None

    def keep(self, base_model: Any, words: Any, prompts: Mapping[str, torch.Tensor]) -> list[KeptPrefix] | None:
        """Get the kept prefixes of prompts [P, H]; None if nothing can be kept of this base model as it is."""
        if self._watch is None or not self._watch.holds():
            self._watch, self.prefixes = Watch(base_model), {}
        if not self._watch.constant:
            return None
        now = circumstances(base_model, words)
        for name, prompt in prompts.items():
            kept = self.prefixes.get(name)
            if kept is None or kept[0] != now or not torch.equal(kept[1].prompt, prompt):
                self.prefixes[name] = now, keep_prefix(base_model, prompt)
                self._watch.expect()
        return [self.prefixes[name][1] for name in prompts]

    def forget_prefixes(self) -> None:
        """Have every prompt run again."""
        self.prefixes, self._watch = {}, None

    def forget_proofs(self) -> None:
        """Have the probe run again."""
        self.last, self._proved = None, {}


def circumstances(base_model: Any, words: Any) -> Any:
    """What a proof holds for: the device, the precision and the attention."""
    return precision_of(words), attention_of(base_model)
