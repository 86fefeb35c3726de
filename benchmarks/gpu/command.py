"""What only a GPU can show, in minutes and without a network: is the engine right there, and what does a step cost?

The most important comes first, and each line is written as soon as it is known, so that a run that is cut short has
lost nothing. `--prepare DIR` gathers on another machine what this one has to be given (see carry.py); `--dry-run`
walks all of it on a CPU, with tiny models.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any


Row = dict[str, Any]
MODELS = ("random-llama-1b", "random-llama-8b")
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 331}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}


def main(arguments: list[str]) -> None:
    """Run every part that the time allows, and print a table of the steps."""
    options = _options(arguments)
    if options.prepare:
        from .carry import prepare

        for part in prepare(options.prepare):
            size = sum(file.stat().st_size for file in part.iterdir())
            print(f"{part}: {size / 2**20:.1f} MiB")
        return
    if options.carried:
        from .carry import unpack

        unpack(options.carried)
    report = Report(options.output / "gpu.jsonl", 60 * options.minutes)
    for part in (machine_row, engine_tests, speed_rows, attention_rows, mixed_rows, real_rows):
        report.run(part, options)
    show(report.rows)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="nothing new begins when they are over")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"), help="folder of the lines, gpu.jsonl")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="gather what a machine without a network needs")
    parser.add_argument("--carried", type=Path, metavar="DIR", help="the files of all parts that were gathered")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on whatever device there is")
    parser.add_argument(
        "--steps", type=int, default=8, help="timed steps of each method and turn, after three untimed"
    )
    parser.add_argument("--turns", type=int, default=2, help="how often each method is measured")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--precision", nargs="+", choices=("bfloat16", "nf4"), default=["bfloat16", "nf4"])
    parser.add_argument("--text", nargs="+", choices=("short", "long"), default=["short", "long"])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


class Report:
    """The lines of a run, in a file and in memory, until its time is over."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.rows: list[Row] = []
        self._path, self._end = path, time.monotonic() + seconds
        path.parent.mkdir(parents=True, exist_ok=True)

    def run(self, part: Any, options: argparse.Namespace) -> None:
        """Write a part's rows while there is time; what fails, or has no time left, is a row with the reason."""
        name, start = part.__name__, time.monotonic()
        options.seconds_left = self._end - start
        if options.seconds_left <= 0:
            self._add({"part": name, "error": "no time was left"})
            return
        try:
            for row in part(options):
                self._add({"part": name, **row})
                if time.monotonic() > self._end:
                    self._add({"part": name, "error": "the time was over before its end"})
                    break
        except Exception as error:
            self._add({"part": name, "error": f"{type(error).__name__}: {error}"})
        self._add({"part": name, "part_time_s": time.monotonic() - start})

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        line = json.dumps(row)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


def machine_row(options: argparse.Namespace) -> Iterator[Row]:
    """The card and the versions."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from ..harness.machine import machine

    packages = {}
    for name in ("accelerate", "bitsandbytes", "triton"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    yield {**machine(_device()), "packages": packages, "cuda": torch.version.cuda, "seed": options.seed}


def engine_tests(options: argparse.Namespace) -> Iterator[Row]:
    """The tests of the engine that need a GPU: float32, TF32, bfloat16 and float16."""
    workers = 1 if options.dry_run else min(8, os.cpu_count() or 1)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/shared_prefix/test_cuda.py",
        "-m",
        "gpu",
        "-v",
        "-p",
        "no:benchmark",
        "-n",
        str(workers),
    ]
    command += ["--collect-only"] if options.dry_run else ["--tb=short"]
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    log = options.output / "tests.log"
    with log.open("w", encoding="utf-8") as file:
        ran = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            code: int | None = ran.wait(options.seconds_left / 3)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(ran.pid, signal.SIGKILL)  # its workers too: what follows is timed
            ran.wait()
    lines = log.read_text(encoding="utf-8").splitlines()
    passed = sum("PASSED" in line for line in lines)
    failed = sorted({line[line.index("tests/") :] for line in lines if "] FAILED tests/" in line.replace("%", "")})
    yield {"exit_code": code, "passed": passed, "failed": failed, "summary": lines[-1] if lines else ""}


def attention_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Attention alone, forward and backward: its error against the reference, and its time."""
    import torch

    from peft_prompt_ext.shared_prefix.attention.select import ATTENTIONS, AttentionCall, differs
    from peft_prompt_ext.shared_prefix.layout import pack

    device = torch.device(_device())
    heads, groups, size = (4, 2, 16) if options.dry_run else (32, 8, 128)
    rows = 2 if options.dry_run else 16
    texts = (5, 7) if options.dry_run else (40, 512)
    for text, prompt, name in product(texts, (20, 100), ATTENTIONS):
        dtype = torch.bfloat16
        call = AttentionCall(device, tuple((count, size, dtype) for count in (heads, groups, groups)), ())
        row = {"attention": name, "text_tokens": text, "num_virtual_tokens": prompt, "rows": rows, "dtype": "bfloat16"}
        try:
            obstacle = differs(ATTENTIONS[name], call)
            layout = pack(torch.ones(rows, text), (prompt,)).to(device)
            inputs = [
                torch.randn(1, prompt + rows * text, count, size, device=device, dtype=dtype, requires_grad=True)
                for count in (heads, groups, groups)
            ]

            def step(name: str = name, inputs: Any = inputs, layout: Any = layout) -> None:
                out = ATTENTIONS[name](*(x.transpose(1, 2) for x in inputs), layout)
                torch.autograd.grad(out.sum(), inputs)

            yield {**row, "differs": obstacle, "step_time_s": _times(step, 3, 3 if options.dry_run else 20)}
        except Exception as error:
            yield {**row, "error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def speed_rows(options: argparse.Namespace) -> Iterator[Row]:
    """A training step: stock PEFT, this plugin by each attention, LoRA, all weights, and the floor, interleaved."""
    for precision, model in product(options.precision, options.models):
        yield from _speed_of(model, precision, options)


def _speed_of(name: str, precision: str, options: argparse.Namespace) -> Iterator[Row]:
    import torch

    from ..harness.steps import LENGTHS

    base = random_model(name, precision, options)
    vocabulary = base.config.vocab_size
    for text in options.text:
        lengths = (3, 9) if options.dry_run else LENGTHS[text]
        batch = random_batch(lengths, 2 if options.dry_run else 16, vocabulary, options.seed)
        specs = [{"model": name, "precision": precision, "text": text, "seed": options.seed, **m} for m in _methods()]
        if precision == "nf4":
            specs = [spec for spec in specs if spec["method"] != "full"]
        for turn, spec in product(range(options.turns), specs):
            try:
                row = _measure(base, spec, batch, options)
            except Exception as error:
                row = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
            yield {**spec, **row, "rows": len(batch["input_ids"]), "turn": turn}
    del base, batch
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _methods() -> Iterator[Row]:
    for virtual in (20, 100):
        yield {"method": "stock", "num_virtual_tokens": virtual, "attention": None}
        for attention in ("varlen", "flex", "sdpa"):
            yield {"method": "packed", "num_virtual_tokens": virtual, "attention": attention}
    for method, attention in product(("suffix", "suffix_kept"), ("varlen", "sdpa")):
        yield {"method": method, "num_virtual_tokens": 12, "attention": attention}
    for method in ("lora", "lora_last", "full"):
        yield {"method": method, "num_virtual_tokens": 0, "attention": None}
    best = "varlen" if _device() == "cuda" else "sdpa"
    yield {"method": "floor", "num_virtual_tokens": 0, "attention": best}


def _measure(base: Any, spec: Row, batch: Any, options: argparse.Namespace) -> Row:
    """Steps of one method on a base model that it leaves as it was."""
    from peft_prompt_ext import engine_status
    from peft_prompt_ext.shared_prefix.attention.select import VARIABLE

    from ..harness.machine import peak, reset_peak
    from ..harness.steps import method_step

    on_engine = spec["method"].startswith(("packed", "suffix"))
    if on_engine:
        os.environ[VARIABLE] = spec["attention"]
    base.requires_grad_(False)
    model: Any = None
    try:
        model, step = method_step(base, {**spec, "gradient_checkpointing": False}, batch)
        if on_engine:
            status = engine_status(model)
            if status.attention != spec["attention"]:
                raise RuntimeError(status.reason)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def whole_step() -> None:
            step()
            for parameter in parameters:
                parameter.grad = None

        before = reset_peak(_device())
        times = _times(whole_step, 3, options.steps)
        row = {"step_time_s": times, "peak_memory_bytes": peak(_device()) - before, "weights_bytes": before}
        if on_engine:
            row["device_waits"] = _waits(whole_step)
        return row
    finally:
        os.environ.pop(VARIABLE, None)
        if spec["method"].startswith("lora") and model is not None:
            model.unload()
        base.requires_grad_(False)
        base.zero_grad()


def mixed_rows(options: argparse.Namespace) -> Iterator[Row]:
    """One batch of eight tasks beside eight batches of one task, without gradients."""
    from ..harness.mixed import compare
    from ..harness.steps import LENGTHS

    base = random_model(MODELS[0], "bfloat16", options).eval()
    tasks, each = (2, 2) if options.dry_run else (8, 4)
    batch = random_batch(LENGTHS["short"], tasks * each, base.config.vocab_size, options.seed)
    for virtual in (20, 100):
        spec = {"tasks": tasks, "num_virtual_tokens": virtual, "steps": 2 if options.dry_run else 10}
        row = compare(base, batch, {**spec, "single_path": "stock", "logits": "last"})
        yield {"model": MODELS[0], "rows_per_task": each, **spec, **row}


def real_rows(options: argparse.Namespace) -> Iterator[Row]:
    """SmolLM2 on movie reviews: what a prompt and LoRA learn in as many steps."""
    from .reviews import train

    if options.dry_run:
        return
    for method, seed in product(("prompt", "lora"), (0, 1)):
        yield train(method, seed, _device())


def random_model(name: str, precision: str, options: argparse.Namespace) -> Any:
    """A Llama with random weights on the device, in bfloat16 or in 4 bits with a head in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from .shapes import SHAPES

    torch.manual_seed(options.seed)
    with torch.device(_device()):
        config = LlamaConfig(**(TINY if options.dry_run else SHAPES[name]))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if precision == "nf4":
        import bitsandbytes

        for path, module in list(model.model.named_modules(prefix="model")):
            if isinstance(module, torch.nn.Linear):
                linear = bitsandbytes.nn.Linear4bit(
                    *(module.in_features, module.out_features, False), torch.bfloat16, quant_type="nf4", device="meta"
                )
                linear.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
                model.set_submodule(path, linear.to(_device()))
        model.is_loaded_in_4bit = True
    return model


def random_batch(length: tuple[int, int], rows: int, vocabulary: int, seed: int) -> Any:
    """Rows of random words, from the least to the greatest length, the answer being the last token, right-padded."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shortest, longest = length
    lengths = torch.randint(shortest, longest + 1, (rows,), generator=generator)
    width = int(lengths.max())
    mask = (torch.arange(width) < lengths[:, None]).long()
    ids = torch.randint(3, vocabulary, (rows, width), generator=generator)
    labels = torch.full_like(ids, -100)
    last = lengths[:, None] - 1
    labels.scatter_(1, last, ids.gather(1, last))
    batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
    return {name: x.to(_device()) for name, x in batch.items()}


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _times(step: Any, untimed: int, timed: int) -> list[float]:
    """Seconds of each step, the device's work included."""
    import torch

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    for _ in range(untimed):
        step()
    times = []
    for _ in range(timed):
        wait()
        start = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - start)
    return times


def _waits(step: Any) -> int | None:
    """How often a step waits for the device; None on a CPU."""
    import warnings

    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def show(rows: list[Row]) -> None:
    """Print a table for each model, precision and text: medians, and ratios to stock PEFT and LoRA."""
    steps = [row for row in rows if row["part"] == "speed_rows" and "peak_memory_bytes" in row]
    for (model, precision), text in product(product(MODELS, ("bfloat16", "nf4")), ("short", "long")):
        times: dict[str, list[float]] = {}
        peaks: dict[str, int] = {}
        for row in steps:
            if (row["model"], row["precision"], row["text"]) == (model, precision, text):
                label = f"{row['method']} {row['attention'] or ''} P={row['num_virtual_tokens']}"
                times.setdefault(label, []).extend(row["step_time_s"])
                peaks[label] = max(peaks.get(label, 0), row["peak_memory_bytes"])
        print(f"\n{model}, {precision}, {text} rows")
        lora = times.get("lora_last  P=0")
        for label, seconds in times.items():
            ratio = f"{statistics.median(seconds) / statistics.median(lora):.2f} x lora_last" if lora else ""
            print(f"  {label:24} {statistics.median(seconds) * 1e3:8.1f} ms {peaks[label] / 2**30:7.2f} GiB  {ratio}")
