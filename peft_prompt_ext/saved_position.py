"""How the files of an adapter say where its prompt stands.

Stock PEFT runs every prompt as a prefix, also if the config has an unknown key or initialisation. So the files of a
suffix differ in what PEFT checks: the task type, whose error quotes the sentence below, and the tensor's name, for
calls that read no config. The files of a prefix are those of stock PEFT.
"""

from __future__ import annotations

from typing import Any


# PEFT prints: Invalid task type: 'CAUSAL_LM, and the prompt ...'. Saved files have this text, so it never changes.
_SENTENCE = (
    ", and the prompt stands behind the text: needs peft-prompt-ext >= 0.2 (import peft_prompt_ext, then "
    "PeftModel.from_pretrained)"
)
TENSORS = {"prefix": "prompt_embeddings", "suffix": "suffix_embeddings"}


def write_task(task_type: Any) -> str:
    """Write the task type of a suffix as the sentence that stock PEFT prints."""
    return f"{getattr(task_type, 'value', task_type)}{_SENTENCE}"


def read_task(saved: Any) -> str | None:
    """Read the task type of a suffix from a saved one; None for others."""
    if isinstance(saved, str) and saved.endswith(_SENTENCE):
        return saved.removesuffix(_SENTENCE)
    return None
