"""A frozen base model, in 4 or 8 bits if wanted, ready for plain `get_peft_model`."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ._choices import check_choice
from ._seam import log_once
from ._versions import checkpoint_activations


if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel


logger = logging.getLogger(__name__)

_ONE_MODEL = threading.RLock()  # two comparisons at once would keep each other's threshold

QUANTIZATIONS = ("nf4", "fp4", "int8")
DEVICES = {"cpu", "cuda", "xpu", "hpu"}  # what bitsandbytes has kernels for
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def load_frozen_backbone(
    name_or_path: str,
    task_type: str = "CAUSAL_LM",
    quantization: str | None = None,
    *,
    double_quant: bool = True,
    dtype: torch.dtype | str = "auto",
    quant_storage: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
    device_map: Any = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a model of transformers to train a prompt (or any other adapter) on.

    Nothing is upcast and no weight is copied, unlike in `peft.prepare_model_for_kbit_training`: embeddings, norms and
    head stay in `dtype`. The base model's linear layers are quantised, heads are not (Dettmers et al. 2023, QLoRA).

    Args:
        name_or_path: A Hub id, a local folder, a `.gguf` file, or an embedded default (`peft_prompt_ext.assets`).
        task_type: As in the adapter's config; it decides the AutoModel class.
        quantization: "nf4", "fp4" (4 bits), "int8" (LLM.int8), or None.
        double_quant: Quantise the scales of 4-bit blocks as well.
        dtype: Of what is not quantised, and of the arithmetic. "auto": the checkpoint's, or bfloat16 for a quantised
            model; if the device has no bfloat16 of its own, float16 on a GPU and float32 on a CPU instead.
        quant_storage: Type that holds the 4-bit weights, uint8 by default; FSDP needs it to be `dtype`.
        gradient_checkpointing: Recompute activations in the backward pass; the inputs then carry gradients.
        device_map: As in `from_pretrained`; by default a quantised model goes to the GPU if there is one, else to the
            CPU.
        **kwargs: Passed on to `from_pretrained`, such as `num_labels` or `revision`.

    Returns:
        The model in evaluation mode, no parameter of which requires a gradient. Its attribute `new_modules` names the
        modules that the checkpoint has no weights for, as an adapter's `modules_to_save` takes them.

    Raises:
        ValueError: Unknown quantization or task type; a device without bitsandbytes kernels; a checkpoint that is
            quantised in another way; a model without layers to quantise.
        ImportError: bitsandbytes is wanted and not installed.
    """
    import transformers

    check_choice("task_type", task_type, AUTO_CLASSES)
    check_quantization(quantization)
    device = _device(device_map)
    if quantization is not None:
        _check_quantizable(device, device_map)
    with tempfile.TemporaryDirectory() as folder:
        source = _source(name_or_path, Path(folder))
        config = transformers.AutoConfig.from_pretrained(source, **_config_arguments(kwargs))
        _check_not_quantized(config, quantization, name_or_path)
        auto_class: Any = getattr(transformers, AUTO_CLASSES[task_type])
        if dtype == "auto":
            dtype = _dtype(config, device, quantization)
        if quantization is not None and getattr(config, "quantization_config", None) is None:
            skipped = _heads(auto_class, config, name_or_path)
            kwargs["quantization_config"] = _bitsandbytes_config(
                quantization, double_quant, dtype, quant_storage, skipped
            )
        model, loading = auto_class.from_pretrained(
            source, dtype=dtype, device_map=device_map, output_loading_info=True, **kwargs
        )
    model.new_modules = _new_modules(model, loading["missing_keys"])
    if model.new_modules:
        logger.warning(
            "%s has no %s for %s: they are new, to be trained and saved with the adapter (modules_to_save=%s).",
            name_or_path,
            ", ".join(sorted(loading["missing_keys"])),
            task_type,
            model.new_modules,
        )
        dequantize_modules(model, model.new_modules)
    if quantization == "int8":
        log_once("bitsandbytes.autograd._functions")
    model.requires_grad_(False)
    keep_differentiable(model)
    if gradient_checkpointing:
        checkpoint_activations(model)
        model.enable_input_require_grads()
    return model


def native_dtype(device: str) -> torch.dtype:
    """The fastest type a device multiplies itself: bfloat16, else float16 on a GPU and float32 on a CPU."""
    if device == "cpu":
        has = torch.cpu.get_capabilities()
        return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32
    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def check_quantization(quantization: str | None) -> None:
    """Raise ValueError unless the name is known."""
    if quantization is not None:
        check_choice("quantization", quantization, QUANTIZATIONS)


def _device(device_map: Any) -> str:
    """The type of the device that a model goes to."""
    if isinstance(device_map, dict):
        device_map = next(iter(device_map.values()), None)
    if device_map is None or device_map in {"auto", "balanced", "balanced_low_0", "sequential"}:
        return "cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "cpu"
    return "cuda" if isinstance(device_map, int) else str(device_map).partition(":")[0]


def _check_quantizable(device: str, device_map: Any) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            "4 and 8 bits need bitsandbytes, which is not installed: run pip install 'peft-prompt-ext[quantization]'"
        )
    if device not in DEVICES:
        raise ValueError(
            f"bitsandbytes runs on {', '.join(sorted(DEVICES))}; got device_map={device_map!r}. Choose one of them, "
            "or quantization=None."
        )


def _source(name_or_path: str, folder: Path) -> str:
    """What `from_pretrained` takes; a GGUF file becomes a folder first, as it cannot be quantised again."""
    from .assets import convert_gguf, resolve

    if name_or_path.endswith(".gguf"):
        if not Path(name_or_path).is_file():
            raise ValueError(f"There is no GGUF file {name_or_path!r}.")
        return str(convert_gguf(Path(name_or_path), folder / "converted"))
    return resolve(name_or_path)


def _config_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder", "num_labels")
    return {name: kwargs[name] for name in names if name in kwargs}


def _check_not_quantized(config: PretrainedConfig, quantization: str | None, name: str) -> None:
    found: Any = getattr(config, "quantization_config", None)
    if found is None or quantization is None:
        return
    found = found if isinstance(found, dict) else found.to_dict()
    kind = found.get("quant_method")
    if str(kind).lower().endswith("bitsandbytes"):
        kind = found.get("bnb_4bit_quant_type") if found.get("load_in_4bit") else "int8"
    if kind != quantization:
        raise ValueError(
            f"{name} is quantised already ({kind}); quantization={quantization!r} was wanted. Load it with "
            f"quantization=None, or start from a checkpoint that is not quantised."
        )


def _dtype(config: PretrainedConfig, device: str, quantization: str | None) -> Any:
    native = native_dtype(device)
    if quantization is not None:
        return native
    return native if getattr(config, "dtype", None) == torch.bfloat16 else "auto"


def _heads(auto_class: Any, config: PretrainedConfig, name: str) -> list[str]:
    with torch.device("meta"):
        model = auto_class.from_config(config)
    skipped = unquantized_modules(model)
    if not quantizable_layers(model, skipped):
        raise ValueError(
            f"{name} ({type(model).__name__}) has no Linear layers to quantise outside its head; "
            "use quantization=None."
        )
    return skipped


def unquantized_modules(model: Any) -> list[str]:
    """Names of the modules that are not quantised: everything outside the base model, and what is tied to it."""
    from transformers.quantizers.base import get_keys_to_not_convert

    children = [name for name, _ in model.named_children()]
    skipped = {key.removesuffix(".weight").removesuffix(".bias") for key in get_keys_to_not_convert(model)}
    if model.base_model_prefix in children:
        skipped |= set(children) - {model.base_model_prefix}
    return sorted(skipped)


def quantizable_layers(model: Any, skipped: list[str]) -> list[str]:
    """Names of the layers that bitsandbytes replaces."""
    from transformers.pytorch_utils import Conv1D

    layers = (name for name, module in model.named_modules() if type(module) in {torch.nn.Linear, Conv1D})
    return [name for name in layers if not any(name == skip or name.startswith(skip + ".") for skip in skipped)]


def dequantize_modules(model: Any, names: Sequence[str]) -> None:
    """Turn the quantised weights of heads that are to be trained back into numbers: they have no gradient.

    `from_pretrained` with a BitsAndBytesConfig of one's own quantises the heads of BERT-like models as well.
    """
    if getattr(model, "hf_quantizer", None) is None:
        return
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    for name, module in list(model.named_modules()):
        named = any(f".{wanted}." in f".{name}." for wanted in names)
        if named and type(module).__module__.startswith("bitsandbytes."):
            weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None)).to(model.dtype)
            linear = torch.nn.Linear(module.in_features, module.out_features, device=weight.device)
            linear.weight, linear.bias = torch.nn.Parameter(weight), module.bias
            model.set_submodule(name, linear)
            logger.info("%s is to be trained: its quantised weights were turned back into %s.", name, weight.dtype)


def keep_differentiable(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference: it has no backward pass for packed ones.

    On a CPU with AVX512-BF16, `bitsandbytes.nn.Linear4bit` packs its weight for good in the first forward pass of
    evaluation; from then on no gradient reaches the prompt, and bfloat16 is what it computes in. What was packed
    already is turned back, with its scales rounded to bfloat16.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                module.state_dict()  # unpacks it in place


def new_modules(model: Any, has_head: bool) -> list[str]:
    """Modules outside the pretrained part of a model, to be trained and saved with an adapter, as names.

    Args:
        model: A model of transformers.
        has_head: Whether it is made for a task whose head no pretraining has: then all modules beside the base model
            count, also those that the checkpoint has.

    Returns:
        Heads as a whole, and modules of the base model that the checkpoint has no weights for. Where that is not known
        (a model made from its config, or a copy), heads alone.
    """
    names = _known_to_be_new(model)
    children = dict(model.named_children())
    if has_head and getattr(model, "base_model_prefix", None) in children:
        heads = (name for name, child in children.items() if next(child.parameters(), None) is not None)
        names += [name for name in heads if name != model.base_model_prefix]
    unwrappable = {"", getattr(model, "base_model_prefix", ""), *_embeddings(model)}
    return sorted(set(names) - unwrappable)


def new_tables(model: Any) -> list[str]:
    """Tables of words that the checkpoint has no or not all rows of, as names; see [`new_modules`]."""
    return sorted(set(_known_to_be_new(model)) & _embeddings(model))


def _known_to_be_new(model: Any) -> list[str]:
    """From the marks of `from_pretrained`, or from what [`load_frozen_backbone`] found missing."""
    return [*_new_modules(model, _missing_weights(model)), *getattr(model, "new_modules", [])]


def _missing_weights(model: Any) -> list[str]:
    """Names of the parameters that `from_pretrained` initialised: it marks all others.

    Offloaded weights have no marks. FSDP's loading marks weights in one process only, and all processes have to agree:
    there it counts as unknown.
    """
    from transformers.modeling_utils import is_fsdp_enabled

    mark = "_is_hf_initialized"
    if is_fsdp_enabled() or not any(hasattr(parameter, mark) for parameter in model.parameters()):
        return []
    missing = []
    for path, module in model.named_modules():
        if mark in vars(module) and ".modules_to_save." not in f"{path}.":  # what came later has no mark, as LoRA's
            owner = path.partition(".original_module")[0]  # as `modules_to_save` had it
            names = (name for name, p in module.named_parameters(recurse=False) if not (p.is_meta or hasattr(p, mark)))
            missing += [f"{owner}.{name}".removeprefix(".") for name in names]
    return missing


def _embeddings(model: Any) -> set[str]:
    """Paths of the word embeddings and the output embeddings. A resized table has the same marks as a new one."""
    tables = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            tables.append(getattr(model, get)())
        except (AttributeError, NotImplementedError):
            continue
    return {name for name, module in model.named_modules() if any(module is table for table in tables)}


def _new_modules(model: Any, missing: Iterable[str]) -> list[str]:
    """Modules of the missing weights: a head as a whole; in the base model the module that has the weight."""
    inner, children = getattr(model, "base_model_prefix", None), dict(model.named_children())
    heads = set(children) - {inner} if inner in children else set()
    owners = {key: key.rpartition(".")[0] for key in missing}
    return sorted({top if (top := key.partition(".")[0]) in heads else owner for key, owner in owners.items()})


def _bitsandbytes_config(
    quantization: str, double_quant: bool, dtype: Any, storage: torch.dtype | None, skipped: list[str]
) -> BitsAndBytesConfig:
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=skipped,
    )


@contextmanager
def ignore_outliers(model: torch.nn.Module) -> Iterator[None]:
    """Have bitsandbytes' int8 layers round each token by itself.

    They multiply columns with an outlier in any token in 16 bits, so that one token changes the rounding of all others
    (by 4 to 16 % in SmolLM2), which hides what a comparison of two batches looks for. Dettmers et al. 2022, section 3.
    """
    states: list[Any] = [module.state for module in model.modules() if type(module).__name__ == "Linear8bitLt"]
    with _ONE_MODEL:
        thresholds = [state.threshold for state in states]
        try:
            for state in states:
                state.threshold = 0.0
            yield
        finally:
            for state, threshold in zip(states, thresholds, strict=True):
                state.threshold = threshold
