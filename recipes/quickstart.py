"""Prompt tuning of a real model on real movie reviews, on a CPU in minutes.

    python recipes/quickstart.py [SENTENCE ...]

Scores SmolLM2-135M-Instruct without a prompt, then trains two prompts at the same budget: from stock PEFT's default
initialisation, and from the class labels. The reviews that are scored are of other movies. Writes the adapters, a
table (quickstart_results.json) and the learning curves (learning_curves.png), and classifies sentences with the last.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from peft_prompt_ext.training.run import Job


ROWS = {  # what the table calls a run -> its folder and its method
    "no prompt (zero-shot)": ("no_prompt", "zero_shot"),
    "stock PEFT default (RANDOM)": ("stock_random", "stock"),
    "CLASS_LABELS": ("class_labels", "prompt_tuning"),
}
SENTENCES = (
    "A warm, funny and beautifully acted film.",
    "Two hours of noise with nothing to say.",
    "It starts slowly, but the ending is unforgettable.",
)
OPTIONS = {  # flags of this script that `peft-prompt-ext train` has too
    "model_name_or_path": "smollm2-135m",
    "num_virtual_tokens": 20,
    "max_steps": 70,
    "per_device_train_batch_size": 8,
    "learning_rate": 0.01,
    "max_eval_samples": 512,
    "seed": 0,
}


def main() -> None:
    """Run everything; see the module's docstring."""
    options = _options()
    from peft_prompt_ext._files import write_json  # heavy imports wait until here, so that --help is instant
    from peft_prompt_ext.assets import AssetError
    from peft_prompt_ext.training.methods import METHODS

    METHODS["stock"] = replace(METHODS["prompt_tuning"], name="stock", adapter_config=stock_config)
    results, curves = [], {}
    for name, (folder, method) in ROWS.items():
        print(f"\n== {name} ==", flush=True)
        try:
            job = prepare(options, folder, method)
        except AssetError as error:
            raise SystemExit(str(error)) from None
        results.append(run(job, name, options.seed))
        curves[name] = [(row["step"], row["loss"]) for row in job.trainer.state.log_history if "loss" in row]
        write_json(options.output_dir / "quickstart_results.json", results)
    draw(curves, results, options.output_dir / "learning_curves.png")
    show(results, options.output_dir)
    classify(results[-1]["adapter"], options.sentences or list(SENTENCES))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Prompt tuning of a real model on real movie reviews: stock init beside class-label init."
    )
    parser.add_argument("sentences", nargs="*", help="sentences for the trained prompt to classify")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"))
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="(default: %(default)s)")
    return parser.parse_args()


def prepare(options: argparse.Namespace, folder: str, method: str) -> Job:
    """Load the reviews and the model; an earlier quickstart in the folder is replaced."""
    import torch

    from peft_prompt_ext.quantization import native_dtype
    from peft_prompt_ext.training import run as training

    output_dir, steps = options.output_dir / folder, options.max_steps
    shutil.rmtree(output_dir, ignore_errors=True)
    dtype = str(native_dtype("cuda" if torch.cuda.is_available() else "cpu")).removeprefix("torch.")
    flags = {name: getattr(options, name) for name in OPTIONS} | {
        "task_name": "movie_reviews",
        "method": method,
        "output_dir": output_dir,
        "dtype": dtype,
        "max_seq_length": 48,
        "max_train_samples": steps * options.per_device_train_batch_size,
        "train_sampling_strategy": "group_by_length",
        "logging_steps": max(steps // 12, 1),
        "save_strategy": "no",
    }
    return training.prepare(
        *training.parse([str(item) for name, value in flags.items() for item in (f"--{name}", value)])
    )


def stock_config(family: Any, settings: dict[str, Any], seed: int) -> Any:
    """The config that PEFT's own documentation begins with."""
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type=family.task_type, num_virtual_tokens=settings["num_virtual_tokens"])


def run(job: Job, name: str, seed: int) -> dict[str, Any]:
    """Score, train, score again, save. Returns one row of the table."""
    from peft_prompt_ext.training.run import train

    trainer, folder = job.trainer, Path(job.trainer.args.output_dir)
    before = after = trainer.evaluate()["eval_accuracy"]
    trained = {"train_runtime": 0.0, "trained_parameters": 0}
    if trainer.args.do_train:
        trained = train(trainer, None)
        after = trainer.evaluate()["eval_accuracy"]
    return {
        "init": name,
        "accuracy_before": before,
        "accuracy_after": after,
        "trainable_parameters": trained["trained_parameters"],
        "adapter_bytes": sum(path.stat().st_size for path in folder.glob("adapter_model.safetensors")),
        "train_time_s": trained["train_runtime"],
        "seed": seed,
        "eval_samples": len(job.splits["validation"]),
        "adapter": str(folder),
    }


def draw(curves: dict[str, list[tuple[int, float]]], results: list[dict[str, Any]], path: Path) -> None:
    """Training loss over steps, and accuracy before and after, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for color, row in zip(("#444444", "#999999", "#0072b2"), results, strict=True):
        accuracy = [100 * row["accuracy_before"], 100 * row["accuracy_after"]]
        if curves[row["init"]]:
            left.plot(*zip(*curves[row["init"]], strict=True), marker="o", color=color, label=row["init"])
        right.plot(["before", "after"], accuracy, marker="o", color=color, label=row["init"])
        right.annotate(f"{accuracy[1]:.1f}", (1, accuracy[1]), textcoords="offset points", xytext=(8, -4))
    left.set(xlabel="training step", ylabel="training loss", title="Learning curve")
    right.set(ylabel="accuracy (%)", title=f"{results[0]['eval_samples']} held-out reviews", xlim=(-0.3, 1.5))
    right.legend()
    figure.savefig(path, dpi=120)


def show(results: list[dict[str, Any]], output_dir: Path) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"Accuracy on {results[0]['eval_samples']} held-out reviews, seed {results[0]['seed']}")
    for column in ("init", "before", "after", "trainable parameters", "adapter bytes", "training seconds"):
        table.add_column(column, justify="left" if column == "init" else "right")
    for row in results:
        before, after = (f"{100 * row[key]:.1f} %" for key in ("accuracy_before", "accuracy_after"))
        sizes = (f"{row[key]:,}" for key in ("trainable_parameters", "adapter_bytes"))
        trained = [after, *sizes, f"{row['train_time_s']:.0f}"] if row["train_time_s"] else ["-"] * 4
        table.add_row(row["init"], before, *trained)
    console.print(table)
    console.print(f"Adapters, quickstart_results.json and learning_curves.png are in {output_dir}", soft_wrap=True)


def classify(folder: str, sentences: list[str]) -> None:
    """Load the saved adapter onto a fresh base model and print its answer to each sentence."""
    from peft_prompt_ext.training.predictor import Predictor

    print("\nLoaded again from", folder)
    answers = Predictor.from_pretrained(folder).predict([{"text": sentence} for sentence in sentences])
    for sentence, answer in zip(sentences, answers, strict=True):
        print(f"  {answer['label']:>8} {100 * answer['probability']:3.0f} %  {sentence}")


if __name__ == "__main__":
    main()
