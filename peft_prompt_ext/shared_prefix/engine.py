"""The state of one model between its batches: proved statuses, and prompt keys and values.

Shapes: P virtual tokens, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from threading import RLock
from typing import Any, Protocol, TypeVar

import torch

from ..evaluation import evaluation_mode
from .interface import attach, get_attention
from .kept_prefix import KeptPrefix, KeptPrefixes, keep_prefix
from .precision import precision_of
from .probe import check_causal, prove
from .status import EngineStatus
from .text_cache import TextCache
from .text_state import TextState, cache_options, make_cache
from .watch import Watch


logger = logging.getLogger(__name__)


class Kept(Protocol):
    """What is computed once from a prompt [P, H]."""

    @property
    def prompt(self) -> torch.Tensor:
        """The virtual tokens, [P, H]."""


K = TypeVar("K", bound=Kept)


class Engine:
    """The engine of one PeftModel. A copied or unpickled model gets a new one.

    Attributes:
        last: The base model's attention and the status in the last batch; None before a batch.
        prefixes: The kept prefix of each adapter, with its proof key; valid while the watch holds.
        caches: The same for `generate`: the base model's own cache of each adapter's prompt.
        lock: Held by `generate`, which may run in several threads, while it proves and keeps.
        texts: The kept texts; None before the first.
    """

    def __init__(self) -> None:
        self.last: tuple[Any, EngineStatus] | None = None
        self.prefixes: dict[str, tuple[Any, KeptPrefix]] = {}
        self.caches: dict[str, tuple[Any, Any]] = {}
        self.texts: TextCache | None = None
        self._proved: dict[Any, EngineStatus] = {}
        self._watch: Watch | None = None
        self._text_state: TextState | None = None
        self._is_causal = False
        self.lock = RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Engine, ()

    def prove(
        self, base_model: Any, forward: Callable[..., Any], words: Any, run: bool = True, behind: bool = False
    ) -> EngineStatus:
        """Prove that batches may run packed, once for each device, precision, attention and position of the prompt.

        Args:
            base_model: A model of transformers with its head.
            forward: See `probe.prove`.
            words: Its word embeddings.
            run: See `probe.prove`.
            behind: See `probe.prove`.
        """
        key = (*make_proof_key(base_model, words), behind)
        if key not in self._proved:
            self._proved[key] = prove(base_model, forward, words, run, behind)
        elif self._proved[key].packed:
            attach(base_model)
        return self._proved[key]

    def check_causal(self, base_model: Any, words: Any) -> None:
        """See `probe.check_causal`; runs once."""
        if not self._is_causal:
            check_causal(base_model, words)
            self._is_causal = True

    def refuse(self, base_model: Any, words: Any, refusal: Exception) -> EngineStatus:
        """Switch to PEFT's path, and log why."""
        status = EngineStatus(False, str(refusal))
        logger.info("From now on, batches take PEFT's path: %s.", status.reason)
        key = make_proof_key(base_model, words)
        self._proved |= {(*key, False): status, (*key, True): status}
        return status

    def set_last_status(self, base_model: Any, status: EngineStatus) -> None:
        """Store the status of the last batch."""
        self.last = get_attention(base_model), status

    def get_last_status(self, base_model: Any) -> EngineStatus | None:
        """Get the status of the last batch; None before a batch, or after a change of the attention."""
        return self.last[1] if self.last is not None and self.last[0] == get_attention(base_model) else None

    def keep(self, base_model: Any, words: Any, prompts: Mapping[str, torch.Tensor]) -> KeptPrefixes | None:
        """Get the kept prefixes of prompts [P, H]; None if the base model does not allow it as it is now."""
        kept = self._keep(self.prefixes, keep_prefix, base_model, words, prompts)
        return None if kept is None else KeptPrefixes(kept)

    def keep_caches(
        self, base_model: Any, words: Any, prompts: Mapping[str, torch.Tensor], make: Callable[..., K]
    ) -> list[K] | None:
        """Get the kept caches of prompts [P, H]; None if the base model does not allow it as it is now.

        Args:
            base_model: A model of transformers with its head.
            words: Its word embeddings.
            prompts: By the name of their adapter.
            make: `make(base_model, prompt)` computes one.
        """
        return self._keep(self.caches, make, base_model, words, prompts)

    def _keep(
        self,
        store: dict[str, tuple[Any, K]],
        make: Callable[..., K],
        base_model: Any,
        words: Any,
        prompts: Mapping[str, torch.Tensor],
    ) -> list[K] | None:
        watch = self._watch
        if watch is None or not watch.holds():
            self.forget_prefixes()
            self._watch = watch = Watch(base_model)
        if not watch.constant:
            return None
        key, found = make_proof_key(base_model, words), []
        for name, prompt in prompts.items():
            kept = store.get(name)
            if kept is None or kept[0] != key or not torch.equal(kept[1].prompt, prompt):
                kept = store[name] = key, make(base_model, prompt)
                watch.expect()
            found.append(kept[1])
        return found

    def keep_texts(self, base_model: Any, words: Any, attention: Any, config: Any) -> TextCache | None:
        """Get the cache of texts; None if the config or the base model, as it is now, does not allow one.

        It is dropped if a weight, the precision or anything else that decides keys and values has changed.

        Args:
            base_model: A model of transformers with its head.
            words: Its word embeddings.
            attention: The name of the attention of packed batches.
            config: The active adapter's config.

        Raises:
            ValueError: The folder of the cache cannot be used.
        """
        if getattr(config, "text_cache", "none") == "none":
            self.texts = self._text_state = None
            return None
        backbone, key = base_model.base_model, (make_proof_key(base_model, words), attention, cache_options(config))
        with evaluation_mode(backbone):
            state = self._text_state
            if state is None or not state.holds(backbone, key):
                self._text_state = state = TextState(backbone, key)
                name = _name_computation(base_model, words, attention)
                self.texts = make_cache(backbone, name, config) if state.constant else None
        return self.texts

    def expect_writes(self) -> None:
        """Accept the writes of a first pass of texts as those of every pass."""
        if self._text_state is not None and self.texts is not None:
            self._text_state.expect()

    def forget_prefixes(self) -> None:
        """Drop all kept prefixes and caches."""
        self._watch = None
        self.prefixes.clear()
        self.caches.clear()

    def recheck_texts(self) -> None:
        """Compare checksums of the weights before kept texts are used again."""
        if self._text_state is not None:
            self._text_state.is_checked = False

    def forget_proofs(self) -> None:
        """Drop all proofs, so that the probe runs again."""
        self.last, self._proved = None, {}


def make_proof_key(base_model: Any, words: Any) -> Any:
    """Make the key of a proof: the device, the precision and the attention."""
    return precision_of(words), get_attention(base_model)


def _name_computation(base_model: Any, words: Any, attention: str | None) -> str:
    """Name the device, the precision and the attention, with the same name in every process."""
    (device, *precision), used = precision_of(words), get_attention(base_model)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    functions = [
        (name, getattr(function, "__module__", ""), getattr(function, "__qualname__", "")) for name, function in used
    ]
    return repr((kind, precision, functions, attention))
