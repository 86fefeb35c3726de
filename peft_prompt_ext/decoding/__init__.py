"""Decoding behind a prompt: `generate`, one's own loop, which prompt a cache holds, and what is refused."""

from .causal_lm import PromptedGeneration
from .seq2seq import PromptedEncoderDecoder
from .view import GuardedGeneration, unwrapped


__all__ = ["GuardedGeneration", "PromptedEncoderDecoder", "PromptedGeneration", "unwrapped"]
