"""A tiny model of every causal language model of transformers, made from its own default config.

The numbers of the default config are made small by what their names say, so that a model type that is added later is
built without a line here. What counts tokens (windows, chunks, top-k of sparse attention) becomes `THRESHOLD`, so
that a batch of a few rows is longer.
"""

import contextlib
import dataclasses
import inspect
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import get_peft_model
from transformers import AutoConfig
from transformers.configuration_utils import ALLOWED_LAYER_TYPES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from peft_prompt_ext import PromptTuningExtConfig, engine_status


MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
THRESHOLD = 24
LAYERS = 4
HIDDEN = 32

# the first pattern that matches a field's name sets its size
_SIZES = [
    (r"max_window_layers", 2),
    (r"(window|chunk_size|floor_scale|n_floor|index_topk$|original_max_position)", THRESHOLD),
    (r"local_attention$|window_len|chunk_length|index_block_size", THRESHOLD),
    (r"rel_extent", THRESHOLD),
    (r"index_topk_blocks", 1),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length|_positions)", 512),
    (r"vocab", 331),
    (r"first_k_dense|num_dense_layers|layer_start_index|layer_end_index", 1),
    (r"num_kv_shared_layers|num_nextn", 0),
    (r"(per_tok|per_token|moe_topk|moe_k|num_expert_group|^n_group|topk_group|hc_lowrank)", 2),
    (r"_token_id|_idx$|langs|lang_id|start_n_top|end_n_top|pretraining_tp|shared_experts$", None),
    (r"(experts|expert_num)", 4),
    (r"(layers|n_layer|num_blocks)$", LAYERS),
    (r"(key_value_heads|num_kv_heads|query_groups)", 2),
    (r"(lora_rank|laurel_rank|norm_rank|adapter_rank)", 8),
    (r"qk_head_dim", 16),
    (r"(rope_head_dim|nope_head_dim)", 8),
    (r"(rotary_dim|d_rel)", 4),
    (r"(head_dim|head_size|d_head|dim_head|kv_channels|query_pre_attn_scalar|headdim)", 8),
    (r"n_mamba_heads", 2),
    (r"(heads|n_head)$", 4),
    (r"per_layer_input", 8),
    (r"(intermediate|ffn|feed_forward|ff|d_inner|shared_expert.*size)", 48),
    (r"(time_step_rank|dt_rank|state_size|d_state|d_ssm)", 8),
    (r"(hidden|d_model|n_embd|emb_dim|embedding_size|embedding_dim|embed_dim|lru_width|word_embed|size)", HIDDEN),
]


def tiny_model(model_type):
    """Make a random model on the CPU, in evaluation mode.

    Raises:
        Exception: Whatever its config or its class raises: some cannot be made of numbers alone.
    """
    default = AutoConfig.for_model(model_type)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(default)]
    if not isinstance(default, model_class.config_class):
        default = default.get_text_config(decoder=True)
    config = _tiny_config(default, model_class, SPECIFIC.get(model_type, {}))
    for name in ("is_decoder", "add_cross_attention"):
        if hasattr(config, name) and not getattr(config, "is_encoder_decoder", False):
            setattr(config, name, name == "is_decoder")
    torch.manual_seed(0)
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point():
            with torch.no_grad():
                parameter.normal_(std=0.2, generator=generator)
    return model


def _tiny_config(default, model_class, specific):
    small = {key: value for key, value in _small(default.to_dict()).items() if value is not None}
    windows = {"sliding_window": THRESHOLD, "use_sliding_window": True}
    windows = {key: value for key, value in windows.items() if hasattr(default, key)}
    kinds = _kinds_of_layers(default, model_class)
    every = {"layer_types": (kinds * LAYERS)[:LAYERS]} if len(kinds) > 1 else {}
    for wished in ({**windows, **every}, every, windows):
        with contextlib.suppress(Exception):  # some model types do not support some mixtures
            return type(default)(**{**small, **wished, **specific})
    return type(default)(**{**small, **specific})


def _kinds_of_layers(default, model_class):
    """List the kinds of attention in the config or the model's source, if each layer has a kind."""
    if not isinstance(getattr(default, "layer_types", None), list):
        return []
    source = "".join(Path(inspect.getfile(part)).read_text() for part in (type(default), model_class))
    kinds = (kind for kind in ALLOWED_LAYER_TYPES if re.search("attention|sparse_|_sparse", kind))
    named = [kind for kind in kinds if f'"{kind}"' in source]
    return list(dict.fromkeys([*default.layer_types, *named]))


def _small(values):
    layers = next((values[key] for key in ("num_hidden_layers", "num_layers", "n_layer") if values.get(key)), None)
    small = {key: _shrunk(key, value, layers) for key, value in values.items() if key not in _DROPPED}
    for few, many in _EQUAL_HEADS:
        if values.get(few) is not None and values[few] == values.get(many):
            small[few] = small[many]
    return small


def _shrunk(key, value, layers):
    if isinstance(value, dict):
        return _small(value) if key != "id2label" else value
    if isinstance(value, list):
        return _first_layers(value) if len(value) == layers else value
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        size = next((size for pattern, size in _SIZES if re.search(pattern, key)), None)
        if size is not None:
            return min(value, size) if key not in {"sliding_window"} else size
    if key.endswith("token_id") and isinstance(value, int):
        return value % 300
    return value


def _first_layers(values):
    """Fill a list with a value per layer with every kind, in order and repeated."""
    kinds = []
    for value in values:
        if value not in kinds:
            kinds.append(value)
    return (kinds + values)[:LAYERS] if len(kinds) <= LAYERS else values[:LAYERS]


_EQUAL_HEADS = [
    ("num_key_value_heads", "num_attention_heads"),
    ("linear_num_key_heads", "linear_num_value_heads"),
]
_DROPPED = {
    "model_type",
    "transformers_version",
    "label2id",
    "id2label",
    "architectures",
    "per_layer_config",
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
_INDEXED = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": THRESHOLD,
    "indexer_compress_ratio": 4,
}
_HYBRID = ["mamba", "attention"] * 2
# sizes that depend on each other
SPECIFIC = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {**_MAMBA, "layer_types": _HYBRID},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "moe_intermediate_size": 16, "n_shared_experts": 1},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "gemma4_text": {"hidden_size_per_layer_input": 0},  # so that ids are used only for word embeddings
    "qwen4_exp": _INDEXED,
    "qwen4_exp_text": _INDEXED,
    "xmod": {"default_language": "en_XX"},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_d_head": 8, "mamba_n_heads": 4},
    "mamba2": {"num_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "reformer": {"axial_pos_embds": False},
}


# rows longer than every threshold; only the pack longer; all shorter
BATCHES = {"long rows": (23, 31, 5, 1, 19), "long pack": (5, 7, 3, 7, 1, 6), "short": (7, 1, 5)}
VIRTUAL = 5


@dataclass
class Outcome:
    """The outcome of a model type.

    Attributes:
        packed: The batches that ran packed.
        reason: Why the others did not.
        error: The largest relative error of a row's logits, of all batches, packed or not.
        neutral: Whether the base model gives bit for bit what it gave before.
        attention_alone: Whether attention to the tokens before is all that mixes tokens.
    """

    packed: list[str]
    reason: str
    error: float
    neutral: bool
    attention_alone: bool


def outcome(model_type):
    """Run the batches of a tiny model through the engine, and each row alone through PEFT's path."""
    base = tiny_model(model_type)
    config = PromptTuningExtConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, prompt_tuning_init="RANDOM_UNIFORM"
    )
    batches = {name: _batch(lengths) for name, lengths in BATCHES.items()}
    stock = get_peft_model(tiny_model(model_type), dataclasses.replace(config, shared_prefix=False)).eval()
    model = get_peft_model(base, config).eval()
    with model.disable_adapter():
        before = _alone(model, batches)
    stock.load_state_dict(model.state_dict())
    packed, reasons, errors = [], [], [0.0]
    for name, (ids, mask) in batches.items():
        rows = [
            stock(input_ids=row[real][None], use_cache=False).logits[0]
            for row, real in zip(ids, mask.bool(), strict=True)
        ]
        for gradients in (True, False):  # without gradients, the prefix is kept
            with torch.set_grad_enabled(gradients):
                got = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            status = engine_status(model)
            for row, real, want in zip(got, mask.bool(), rows, strict=True):
                kept = torch.cat([torch.ones(VIRTUAL, dtype=torch.bool), real])
                errors.append(float((row[kept] - want).norm() / want.norm()))
            if not status.packed:
                reasons.append(status.reason)
        if status.packed:
            packed.append(name)
    with model.disable_adapter():
        after = _alone(model, batches)
    neutral = all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    return Outcome(packed, "; ".join(dict.fromkeys(reasons)), max(errors), neutral, _is_attention_alone(base))


def _is_attention_alone(model):
    """Whether the model has no layers with states or convolutions, and no encoder."""
    others = "mamba|recurrent|rwkv|delta|lightning|lstm|shortconv|linearattention|kda"
    parts = ((name, part) for name, part in model.named_modules())
    return not any(
        isinstance(part, torch.nn.Conv1d)
        or re.search(others, type(part).__name__.lower())
        or re.search("encoder_attn|crossattention|cross_attn", name)
        for name, part in parts
    )


@torch.no_grad()
def _alone(model, batches):
    return [model(input_ids=ids[:1], use_cache=False).logits for ids, _ in batches.values()]


def _batch(lengths):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 300, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids, mask


TABLE = Path(__file__).parents[2] / "peft_prompt_ext" / "shared_prefix" / "MODELS.md"


def write_table():
    """Run every model type and write the table: `python -m tests.shared_prefix.causal_models`."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    lines = []
    for model_type in MODEL_TYPES:
        try:
            lines.append(outcome(model_type))
        except Exception as error:  # some cannot be built tiny, or not run with a prompt
            lines.append(f"{type(error).__name__}: {error}")
    TABLE.write_text(table(dict(zip(MODEL_TYPES, lines, strict=True))))


def table(outcomes):
    """Write the outcomes as a Markdown table; an outcome is an Outcome or an error's text."""
    ran = [found for found in outcomes.values() if isinstance(found, Outcome)]
    alone = [found for found in ran if found.attention_alone]
    packed = [found for found in alone if found.packed]
    numbers = {
        "version": transformers.__version__,
        "threshold": THRESHOLD,
        "virtual": VIRTUAL,
        "rows": _tokens("long rows"),
        "pack": _tokens("long pack", sum),
        "pack_rows": _tokens("long pack"),
        "short": _tokens("short", sum),
        "ran": len(ran),
        "neutral": sum(found.neutral for found in ran),
        "alone": len(alone),
        "packed": len(packed),
        "share": len(packed) / len(alone),
        "whole": sum(len(found.packed) == len(BATCHES) for found in packed),
    }
    rows = [_table_row(name, found) for name, found in outcomes.items()]
    return "\n".join([_TEXT.format(**numbers), *rows, ""])


_TEXT = """\
# Which causal language models run packed

Made by `python -m tests.shared_prefix.causal_models` with transformers {version};
`tests/shared_prefix/test_causal_models.py` checks it.

Each model type is built tiny from its own default config, with every kind of attention layer that it knows. What
counts tokens in its config (windows, chunks, the top-k of sparse attention) is {threshold}. Three batches run, with
gradients and without, where the prompt is kept: rows of up to {rows} tokens with their prompt of {virtual}; a pack
of {pack} tokens with rows of up to {pack_rows}; a pack of {short}. "Error" is the largest relative error of a row's
logits against the row alone on PEFT's path, whether it ran packed or not. Without the prompt the base model gave bit
for bit what it gave before in {neutral} of {ran} model types; Reformer's hashes are drawn anew in each pass.

{alone} of the {ran} model types that run with a prompt mix tokens by attention to the tokens before alone.
{packed} of these ({share:.0%}) run packed, {whole} of them at every length.

| model type | attention alone | packed | error | why not |
|---|---|---|---|---|"""


def _tokens(batch, count=max):
    return count(BATCHES[batch]) + VIRTUAL


def _table_row(name, found):
    if not isinstance(found, Outcome):
        return f"| {name} | | not run | | {_cell(found)} |"
    packed = "yes" if len(found.packed) == len(BATCHES) else ", ".join(found.packed) or "no"
    alone = "yes" if found.attention_alone else "no"
    return f"| {name} | {alone} | {packed} | {found.error:.0e} | {_cell(found.reason)} |"


def _cell(text):
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 160 else text[:157] + "..."


if __name__ == "__main__":
    write_table()
