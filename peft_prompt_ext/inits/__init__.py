"""Initialisation schemes for the soft prompt, one per file."""

from . import class_labels, ending, random, random_uniform, sample_vocab, text, transfer
from .base import InitContext, available_inits, get_scheme, register_init


__all__ = [
    "InitContext",
    "available_inits",
    "class_labels",
    "ending",
    "get_scheme",
    "random",
    "random_uniform",
    "register_init",
    "sample_vocab",
    "text",
    "transfer",
]
