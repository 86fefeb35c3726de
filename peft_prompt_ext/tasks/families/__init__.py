"""One file for each kind of model; what the Trainer and the metrics see of them is the same."""

from .base import Family
from .causal_lm import CausalLM
from .seq_2_seq_lm import Seq2SeqLM
from .seq_cls import SequenceClassification


FAMILIES = {family.task_type: family for family in (CausalLM, Seq2SeqLM, SequenceClassification)}

__all__ = ["FAMILIES", "Family", "family_of"]


def family_of(config: object) -> str:
    """The task type that a checkpoint is made for: SEQ_2_SEQ_LM, SEQ_CLS for an encoder, else CAUSAL_LM.

    Args:
        config: The model's config.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if getattr(config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return "SEQ_CLS" if getattr(config, "model_type", "") in MODEL_FOR_MASKED_LM_MAPPING_NAMES else "CAUSAL_LM"
