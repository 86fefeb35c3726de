"""The shapes of Llama 3.2 1B and Llama 3.1 8B: what a step costs does not depend on the weights."""

from __future__ import annotations

from typing import Any


_COMMON = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True}
_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {"random-llama-1b": _COMMON | _1B, "random-llama-8b": _COMMON | _8B}
