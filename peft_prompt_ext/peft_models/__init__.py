"""PEFT's model classes, extended for a PromptTuningExtConfig.

The classes have PEFT's names, because AutoPeftModel compares names. With another config they build PEFT's own class.
"""

from __future__ import annotations

from typing import Any

from .. import _seam
from ..encoder import PromptEmbedding
from .causal_lm import PeftModelForCausalLM
from .load import load
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
    _seam.activate(PromptEmbedding, CLASSES, load)
