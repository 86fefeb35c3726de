"""The result of `engine_status`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KeptTexts:
    """Texts whose keys and values are kept.

    Attributes:
        hits: How often a text was found.
        misses: How often a text was not found, and ran.
        num_bytes: Bytes of the kept texts.
        budget: The most bytes.
        place: "memory", or the folder.
    """

    hits: int
    misses: int
    num_bytes: int
    budget: int
    place: str

    @property
    def share(self) -> float:
        """The share of texts that were found."""
        return self.hits / max(self.hits + self.misses, 1)


@dataclass(frozen=True)
class EngineStatus:
    """Whether a model's batches run as one packed sequence.

    Attributes:
        packed: Whether batches run packed; else they take PEFT's path, with the same results.
        reason: The reason, as text.
        max_tokens: Batches with longer rows (prompt and text) take PEFT's path; None: no limit.
        keeps_prompts: Whether prompt keys and values are kept for inference.
        attention: The attention of packed batches, "sdpa", "varlen" or "flex"; None on PEFT's path.
        max_packed_tokens: Batches with more tokens (each prompt once, texts without pads) take PEFT's path; None: no
            limit.
        texts: With prompts behind the texts: the kept texts; None if none are kept.
    """

    packed: bool
    reason: str
    max_tokens: int | None = None
    keeps_prompts: bool = False
    attention: str | None = None
    max_packed_tokens: int | None = None
    texts: KeptTexts | None = None
