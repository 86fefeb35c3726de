"""Prompt tuning of a real model on real movie reviews, on a CPU in minutes.

    python recipes/quickstart.py [SENTENCE ...] [--output_dir FOLDER] [other flags of `peft-prompt-ext train` ...]

Scores SmolLM2-135M-Instruct without a prompt, then trains two prompts at the same budget: from stock PEFT's default
initialisation, and from the class labels. The reviews that are scored are of other movies. Writes the adapters, a
table (quickstart_results.json) and the learning curves (learning_curves.png), and classifies sentences with the last.
Sentences stand before all flags; `peft-prompt-ext train --help` lists the flags.
"""

import json
import shutil
import sys
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any


ROWS = {  # what the table calls a run -> its folder and its method
    "no prompt (zero-shot)": ("no_prompt", "zero_shot"),
    "stock PEFT default (RANDOM)": ("stock_random", "stock"),
    "CLASS_LABELS": ("class_labels", "prompt_tuning"),
}
SENTENCES = ["A warm, funny and beautifully acted film.", "Two hours of noise with nothing to say."]
SENTENCES += ["It starts slowly, but the ending is unforgettable."]
DEFAULTS = """--task_name movie_reviews --model_name_or_path smollm2-135m --output_dir outputs/quickstart --seed 0
--num_virtual_tokens 20 --max_steps 70 --per_device_train_batch_size 8 --learning_rate 0.01 --max_seq_length 48
--max_eval_samples 512 --train_sampling_strategy group_by_length --logging_steps 0.07 --save_strategy no""".split()


def main() -> None:
    """Run everything; see the module's docstring."""
    sentences = list(takewhile(lambda item: not item.startswith("-"), sys.argv[1:]))
    flags = sys.argv[1 + len(sentences) :]
    if {"-h", "--help"} & set(flags):
        print(__doc__)
        return
    from peft_prompt_ext.assets import AssetError  # imported here, for it takes seconds, and --help none

    try:
        rows = [run(name, flags) for name in ROWS]
    except (AssetError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    show(rows)
    classify(rows[-1]["adapter"], sentences or SENTENCES)


def run(name: str, flags: list[str]) -> dict[str, Any]:
    """Score, train, score again, save; an earlier quickstart in the folder is replaced. Returns a row of the table."""
    import torch

    from peft_prompt_ext.quantization import native_dtype
    from peft_prompt_ext.training import run as training
    from peft_prompt_ext.training.methods import METHODS

    print(f"\n== {name} ==", flush=True)
    METHODS["stock"] = replace(METHODS["prompt_tuning"], name="stock", adapter_config=stock_config)
    subfolder, method = ROWS[name]
    dtype = str(native_dtype("cuda" if torch.cuda.is_available() else "cpu")).removeprefix("torch.")
    model, data, how, args = training.parse([*DEFAULTS, "--dtype", dtype, *flags, "--method", method])
    folder = Path(args.output_dir, subfolder)
    args.output_dir = str(folder)
    if args.max_steps > 0:  # no row is seen twice
        data.max_train_samples = data.max_train_samples or args.max_steps * args.per_device_train_batch_size
    shutil.rmtree(folder, ignore_errors=True)
    trainer = training.prepare(model, data, how, args).trainer
    before = trainer.evaluate()["eval_accuracy"]
    trained = training.train(trainer, None) if args.do_train else {}
    return {
        "init": name,
        "accuracy_before": before,
        "accuracy_after": trainer.evaluate()["eval_accuracy"] if trained else before,
        "trainable_parameters": trained.get("trained_parameters", 0),
        "adapter_bytes": sum(path.stat().st_size for path in folder.glob("adapter_model.safetensors")),
        "train_time_s": trained.get("train_runtime", 0.0),
        "losses": [(line["step"], line["loss"]) for line in trainer.state.log_history if "loss" in line],
        "seed": args.seed,
        "eval_samples": len(trainer.eval_dataset),
        "adapter": str(folder),
    }


def stock_config(family: Any, settings: dict[str, Any], seed: int) -> Any:
    """The config that PEFT's own documentation begins with."""
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type=family.task_type, num_virtual_tokens=settings["num_virtual_tokens"])


def show(rows: list[dict[str, Any]]) -> None:
    """Write and print the table, and draw the learning curves."""
    import rich
    from matplotlib.figure import Figure
    from rich.table import Table

    folder = Path(rows[0]["adapter"]).parent
    (folder / "quickstart_results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    title = f"Accuracy on {rows[0]['eval_samples']} held-out reviews, seed {rows[0]['seed']}"
    table = Table("init", "before", "after", "trainable parameters", "adapter bytes", "training seconds", title=title)
    figure = Figure(layout="constrained")
    axes = figure.add_subplot(xlabel="training step", ylabel="training loss")
    for row in rows:
        before, after = (f"{100 * row[f'accuracy_{when}']:.1f} %" for when in ("before", "after"))
        costs = (f"{row[key]:,.0f}" for key in ("trainable_parameters", "adapter_bytes", "train_time_s"))
        table.add_row(row["init"], before, *((after, *costs) if row["losses"] else ["-"] * 4))
        if row["losses"]:
            axes.plot(*zip(*row["losses"], strict=True), marker="o", label=f"{row['init']}: {before}, then {after}")
    axes.legend()
    figure.savefig(folder / "learning_curves.png", dpi=120)
    rich.print(table)
    print(f"Adapters, quickstart_results.json and learning_curves.png are in {folder}")


def classify(folder: str, sentences: list[str]) -> None:
    """Load the saved adapter onto a fresh base model and print its answer to each sentence."""
    from peft_prompt_ext.training.predictor import Predictor

    print("\nLoaded again from", folder)
    answers = Predictor.from_pretrained(folder).predict([{"text": sentence} for sentence in sentences])
    for sentence, answer in zip(sentences, answers, strict=True):
        print(f"  {answer['label']:>8} {100 * answer['probability']:3.0f} %  {sentence}")


if __name__ == "__main__":
    main()
