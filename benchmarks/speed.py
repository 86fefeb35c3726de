"""Time and memory of one training step, method beside method.

    python -m benchmarks speed                              # PEFT, this plugin, LoRA, full fine-tuning, the floor
    python -m benchmarks speed --mixed_tasks 8              # one batch of 8 tasks beside one batch for each
    python -m benchmarks speed --one_text_tasks 1 4 16 --text 512   # suffixes, prefixes and LoRA over one text
    python -m benchmarks speed --suite benchmarks/suites/cpu.yaml --data_dir path/to/rows   # what runs of a suite cost

Each method has a process, and so a peak memory, of its own; processes are interleaved. Each line is written at once.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from .harness.steps import LENGTHS, METHODS, PROMPTED, measure
from .harness.suite import PRECISIONS, load_suites


Row = dict[str, Any]


def main(arguments: list[str]) -> None:
    """Measure the grid that the arguments ask for."""
    options = _options(arguments)
    if options.worker:
        print(json.dumps(measure(json.loads(options.worker))))
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows, steps = [], map(_run, _grid(options))
    if options.suite:
        from .harness.step_times import time_suite

        steps = time_suite(load_suites(options.suite, options.data_dir)[0], options.data_dir)
    for row in steps:
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
    show(rows)


def _options(arguments: list[str]) -> argparse.Namespace:
    methods = "methods:\n" + "\n".join(f"  {name:11} {text}" for name, text in METHODS.items())
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "description": __doc__, "epilog": methods}
    parser = argparse.ArgumentParser("python -m benchmarks speed", **form)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--num_virtual_tokens", nargs="+", type=int, help="20 and 100; 12 over one text")
    parser.add_argument("--text", nargs="+", choices=LENGTHS, default=["short"])
    parser.add_argument("--batch_size", nargs="+", type=int, default=[16])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["float32"])
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each process, after one untimed")
    parser.add_argument("--turns", type=int, default=2, help="how often each method is measured")
    parser.add_argument("--model_name_or_path", default="smollm2-135m", help="an asset, a folder or a Hub name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/speed.jsonl"))
    mixed = parser.add_argument_group("mixed-task batches, forward only")
    mixed.add_argument("--mixed_tasks", type=int, metavar="N", help="time one batch of N tasks, and a batch for each")
    mixed.add_argument("--rows_per_task", type=int, default=1)
    mixed.add_argument("--logits", choices=["last", "all"], default="last", help="of the next token, or of all")
    mixed.add_argument("--single_path", choices=["packed", "stock"], default="stock", help="path of single batches")
    mixed.add_argument("--one_text_tasks", nargs="+", type=int, metavar="N", help="time N tasks over one text")
    suite = parser.add_argument_group("steps of a suite's runs")
    suite.add_argument("--suite", nargs="+", type=Path, help="time a step of every kind of run of these, interleaved")
    suite.add_argument("--data_dir", help="where the folders of `data` in a suite lie")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _grid(options: argparse.Namespace) -> Iterator[Row]:
    lengths, sizes = options.num_virtual_tokens or [20, 100], options.batch_size
    if options.one_text_tasks:
        lengths, sizes = options.num_virtual_tokens or [12], [1]
        kinds = [{"method": "one_text", "tasks": tasks} for tasks in options.one_text_tasks]
    elif options.mixed_tasks:
        kinds, sizes = (
            [{"method": "mixed", "tasks": options.mixed_tasks}],
            [options.mixed_tasks * options.rows_per_task],
        )
        kinds[0] |= {name: getattr(options, name) for name in ("rows_per_task", "logits", "single_path")}
    else:
        kinds = [
            {"method": name, "gradient_checkpointing": options.gradient_checkpointing} for name in options.methods
        ]
    common = {"steps": options.steps, "model": options.model_name_or_path, "seed": options.seed}
    cells = list(product(options.text, sizes, options.precision, kinds))
    for text, size, precision, kind in cells * options.turns:
        has_prompt = "tasks" in kind or kind["method"] in PROMPTED
        for virtual in lengths if has_prompt else [0]:
            cell = {"text": text, "batch_size": size, "precision": precision, "num_virtual_tokens": virtual}
            yield {**kind, **cell, **common}


def _run(spec: Row) -> Row:
    """One process; a failure is a row with its reason."""
    print(f"{spec['method']}, {spec['num_virtual_tokens']} virtual tokens ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "benchmarks", "speed", "--worker", json.dumps(spec)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode == 0:
        return json.loads(ran.stdout.splitlines()[-1])
    last = (ran.stderr.strip() or "no message").splitlines()[-1]
    return {**spec, "error": f"exit {ran.returncode}: {last}"}


def show(rows: list[Row]) -> None:
    """Print a table for each batch: medians over all turns, and ratios to PEFT, LoRA and the floor; then failures."""
    import pandas as pd

    from .report.tables import step_table, ways_table

    good = pd.DataFrame([row for row in rows if not row.get("error")])
    if "kind" in good:
        for row in good.itertuples():
            what = " ".join(filter(None, (row.kind[name] for name in ("task", "method", "quantization"))))
            print(f"{what}: {row.step_s:.2f} s a step")
    elif "tasks" in good:
        print(ways_table(good))
    elif len(good):
        for batch, group in good.groupby(["text", "batch_size", "precision", "gradient_checkpointing"]):
            text, size, precision, checkpointing = batch
            extra = ", gradient checkpointing" if checkpointing else ""
            print(f"\nOne training step: {text} text, {size} rows, {precision}{extra}\n\n{step_table(group)}")
    for row in rows:
        if row.get("error"):
            print(f"{row.get('method') or row['kind']['method']}: {row['error']}")
