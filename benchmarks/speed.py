"""Time and memory of one training step, method beside method.

    python -m benchmarks speed                              # PEFT, this plugin, LoRA, full fine-tuning, the floor
    python -m benchmarks speed --mixed_tasks 8              # one batch of 8 tasks beside one batch for each
    python -m benchmarks speed --suite benchmarks/suites/cpu.yaml --data_dir path/to/rows   # what runs of a suite cost

Each method has a process of its own, so that its peak memory is its own; the processes are interleaved, because
machines are not equally fast all day. Each line goes to the results file as soon as it is known; then a table is
printed from the lines of this command.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from .harness.random_llama import SHAPES
from .harness.steps import LENGTHS, PROMPTED, load, method_step, review_batch


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


def main(arguments: list[str]) -> None:
    """Measure the grid that the arguments ask for."""
    options = _options(arguments)
    if options.worker:
        print(json.dumps(measure(json.loads(options.worker))))
        return
    rows = []
    for row in _suite_rows(options) if options.suite else _rows(options):
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
    if options.suite:
        for row in rows:
            what = " ".join(filter(None, (row["kind"][name] for name in ("task", "method", "quantization"))))
            print(f"{what}: {row['error'] or format(row['step_s'], '.2f') + ' s a step'}")
    elif options.mixed_tasks:
        show_mixed(rows)
    else:
        show(rows)


def _options(arguments: list[str]) -> argparse.Namespace:
    methods = "methods:\n" + "\n".join(f"  {name:11} {text}" for name, text in WHAT.items())
    parser = argparse.ArgumentParser(
        "python -m benchmarks speed",
        description=__doc__,
        epilog=methods,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    mixed = parser.add_argument_group("mixed-task batches, forward only")
    mixed.add_argument("--mixed_tasks", type=int, metavar="N", help="time one batch of N tasks, and a batch for each")
    mixed.add_argument("--rows_per_task", type=int, default=1)
    mixed.add_argument("--logits", choices=["last", "all"], default="last", help="of the next token, or of all")
    mixed.add_argument("--single_path", choices=["packed", "stock"], default="stock", help="path of single batches")
    suite = parser.add_argument_group("steps of a suite's runs")
    suite.add_argument("--suite", nargs="+", type=Path, help="time a step of every kind of run of these, interleaved")
    suite.add_argument("--data_dir", help="where the folders of `data` in a suite lie")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _suite_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from .harness.step_times import time_suite
    from .harness.suite import SuiteError, load_suites

    try:
        specs, _ = load_suites(options.suite)
    except SuiteError as error:
        raise SystemExit(f"error: {error}") from None
    yield from time_suite(specs, options.data_dir)


def _rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from tqdm import tqdm

    specs = list(_mixed_grid(options) if options.mixed_tasks else _grid(options))
    progress = tqdm(specs * options.turns)
    for spec in progress:
        progress.set_description(" ".join(f"{spec.get(key)}" for key in ("method", "num_virtual_tokens", "precision")))
        yield _run(spec)


def _grid(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
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


def _mixed_grid(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for virtual in options.num_virtual_tokens:
        yield {
            "method": "mixed",
            "tasks": options.mixed_tasks,
            "rows_per_task": options.rows_per_task,
            "num_virtual_tokens": virtual,
            "logits": options.logits,
            "single_path": options.single_path,
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

    from .harness import mixed
    from .harness.machine import machine, peak, reset_peak, touch
    from .harness.random_llama import model_folder

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(spec["seed"])
    if spec["method"] == "mixed":
        return mixed.measure(spec)
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


def show_mixed(rows: list[dict[str, Any]]) -> None:
    """Print one line for each way to fill the batch."""
    for row in rows:
        if "error" in row:
            print(row["error"])
            continue
        together, apart = (statistics.median(row[key]) for key in ("mixed_time_s", "single_time_s"))
        print(
            f"{row['tasks']} tasks of {row['rows_per_task']} rows, P={row['num_virtual_tokens']}, {row['logits']} "
            f"logits: mixed {together:.2f} s, one batch a task {apart:.2f} s, {apart / together:.2f} times as long; "
            f"largest difference of the logits {row['largest_difference']:.1e}"
        )
