"""What `engine_status` returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStatus:
    """Whether a model's batches run as one packed sequence.

    Attributes:
        packed: They do; else they take PEFT's path, with the same results.
        reason: Why, for a person to read.
        max_tokens: Batches with longer rows (prompt and text together) take PEFT's path; None: there is no such
            length.
        keeps_prompts: Without gradients each prompt runs once and its keys and values are kept for the next batches.
        attention: What computes attention in packed batches, "sdpa", "varlen" or "flex"; None without them.
        max_packed_tokens: Batches with more tokens (each prompt once, and the texts without pads) take PEFT's path;
            None: there is no such number.
    """

    packed: bool
    reason: str
    max_tokens: int | None = None
    keeps_prompts: bool = False
    attention: str | None = None
    max_packed_tokens: int | None = None
