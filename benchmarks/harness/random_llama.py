"""Llama-shaped models with random weights: what a step costs does not depend on the weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any


# the shapes of Llama 3.2 1B and Llama 3.1 8B
_COMMON = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "random-llama-1b": {
        **_COMMON,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    },
    "random-llama-8b": {
        **_COMMON,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "tie_word_embeddings": False,
    },
}


def model_folder(name: str) -> str:
    """What loads the named model: one of SHAPES, made on first use below outputs/, an asset, a folder or a Hub name.

    Args:
        name: The model's name.
    """
    from peft_prompt_ext.assets import resolve

    if name not in SHAPES:
        return resolve(name)
    folder = Path("outputs", name)
    if not folder.exists():
        partial = folder.with_name(f"{name}.{os.getpid()}.partial")
        try:
            _make(name, partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return str(folder)


def _make(name: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from peft_prompt_ext.assets import resolve

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[name]), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    # of a smaller vocabulary, which leaves the last rows of the embeddings unread
    AutoTokenizer.from_pretrained(resolve("smollm2-135m")).save_pretrained(folder)
