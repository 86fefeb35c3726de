"""Configs of tiny models, one for each architecture that the contracts are tested on."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)


VOCAB_ROWS = 331  # more rows than the tokenizer has tokens, as in most released models
HIDDEN, LAYERS, HEADS = 24, 2, 2
POSITIONS = 67

CORPUS = [
    "a great film with a fine cast",
    "terrible acting and a worse script",
    "the plot is positive and the end is negative",
    "this film is not great, this film is terrible",
] * 3

# names of hidden size, layers, heads and feed-forward width, if other than Llama's
_LLAMA = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "intermediate_size": 41,
    "head_dim": 12,
    "max_position_embeddings": POSITIONS,
}
_BERT = {key: _LLAMA[key] for key in _LLAMA if key not in {"num_key_value_heads", "head_dim"}}
_GPT2 = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}

_SPECIFIC = {
    "llama": _LLAMA,
    "qwen2": {key: _LLAMA[key] for key in _LLAMA if key != "head_dim"},
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": {**_LLAMA, "query_pre_attn_scalar": 12, "sliding_window": 16},
    "gemma3_text": {**_LLAMA, "query_pre_attn_scalar": 12, "sliding_window": 16},
    "mistral": {**_LLAMA, "sliding_window": 16},
    "phi": {**_BERT, "num_key_value_heads": HEADS},
    "gpt2": _GPT2,
    "gpt_neox": {**_BERT, "rotary_pct": 0.5},
    "opt": {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "ffn_dim": 41,
        "word_embed_proj_dim": HIDDEN,
        "max_position_embeddings": POSITIONS,
    },
    "bloom": {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS},
    "bert": _BERT,
    "roberta": {**_BERT, "pad_token_id": 1},
    "t5": {
        "d_model": HIDDEN,
        "d_kv": 12,
        "d_ff": 41,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "decoder_start_token_id": 2,
    },
}

DECODERS = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi", "gpt2", "gpt_neox", "opt", "bloom"]
ENCODERS = ["bert", "roberta"]

AUTO_CLASSES = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
}

# every architecture with the task it is known for, then the other tasks
CASES = [
    *((name, "CAUSAL_LM") for name in DECODERS),
    ("t5", "SEQ_2_SEQ_LM"),
    *((name, task) for name in ENCODERS for task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")),
    ("llama", "SEQ_CLS"),
    ("gpt2", "SEQ_CLS"),
]


def tiny_config(architecture, **changes):
    """Make the config of a tiny model. Token ids 0, 1, 2 are the tokenizer's <s>, </s>, <pad>."""
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    values = {"vocab_size": VOCAB_ROWS, **ids, **_SPECIFIC[architecture], **changes}
    return AutoConfig.for_model(architecture, **values)
