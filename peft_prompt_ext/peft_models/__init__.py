"""PEFT's model classes, extended for a PromptTuningExtConfig.

The classes have PEFT's names, because AutoPeftModel compares names. With another config they build PEFT's own class.
"""

from __future__ import annotations

from typing import Any

from .. import _seam
from ..encoder import PromptEmbedding
from .causal_lm import PeftModelForCausalLM
from .load import load
from .saving import add_adapter, get_state, read_config, set_state
from .seq2seq import PeftModelForSeq2SeqLM
from .seq_cls import PeftModelForSequenceClassification
from .token_tasks import (
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForTokenClassification,
)


CLASSES: dict[str, Any] = {
    "CAUSAL_LM": PeftModelForCausalLM,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "SEQ_CLS": PeftModelForSequenceClassification,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def register() -> None:
    """Register these classes with PEFT."""
    calls: dict[str, Any] = {
        "from_pretrained": load,
        "add_adapter": add_adapter,
        "from_peft_type": read_config,
        "get_peft_model_state_dict": get_state,
        "set_peft_model_state_dict": set_state,
    }
    _seam.activate(PromptEmbedding, CLASSES, calls)
