"""The model card of a recipe's run: scores, init, seed, versions, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from .trainer import ChoiceTrainer


NO_SCORES = ("eval_loss", "eval_runtime", "eval_samples", "eval_steps", "eval_model_preparation_time")
PACKAGES = ("peft-prompt-ext", "peft", "transformers", "torch", "datasets")


def model_card(trainer: ChoiceTrainer, record: Mapping[str, Any], results: Mapping[str, float]) -> ModelCard:
    """Write the card of a run.

    Args:
        trainer: After training or evaluation.
        record: What the run is, as the recipe writes it beside the weights.
        results: What evaluation gave, with the prefix "eval_".

    Returns:
        The card, with the scores in the Hub's metadata.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    task, args = trainer.family.task, trainer.args
    is_adapter = record["method"] in {"prompt_tuning", "lora"}
    base, name = record["model_name_or_path"], f"{task.name}-{record['method']}"
    scored = [key for key in results if key.startswith("eval_") and not key.startswith(NO_SCORES)]
    scores = [(key, results[key]) for key in scored]
    data = ModelCardData(
        base_model=base,
        library_name="peft" if is_adapter else "transformers",
        tags=["peft-prompt-ext", record["method"], task.name],
        datasets=[task.path] if "/" in task.path else None,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-classification",
                dataset_type=task.path or task.name,
                dataset_name=task.name,
                dataset_config=task.subset,
                dataset_split="train, held out" if record["held_out_samples"] else task.validation[0],
                dataset_revision=task.revision if "/" in task.path else None,
                metric_type=key.removeprefix("eval_"),
                metric_value=value,
            )
            for key, value in scores
        ]
        or None,
    )
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{_introduction(trainer, record, base)}\n\n"
        f"## Scores\n\n{_table(('metric', 'score'), [(k.removeprefix('eval_'), f'{v:.4f}') for k, v in scores])}\n\n"
        f"## Training\n\n{_table(('', ''), _training(trainer, record))}\n\n"
        f"## Versions\n\n{_table(('package', 'version'), [(p, version(p)) for p in PACKAGES])}\n\n"
        f"## Use\n\n{_usage(record, str(args.output_dir))}\n"
    )


def _introduction(trainer: ChoiceTrainer, record: Mapping[str, Any], base: str) -> str:
    task = trainer.family.task
    model: Any = trainer.model
    trained = sum(int(p.numel()) for p in model.parameters() if p.requires_grad)
    return (
        f"`{base}` on the task `{task.name}` (version {task.version}) by {record['method'].replace('_', ' ')}: "
        f"{trained:,} trained parameters."
    )


def _training(trainer: ChoiceTrainer, record: Mapping[str, Any]) -> list[tuple[str, object]]:
    args = trainer.args
    rows: Any = trainer.train_dataset
    pairs: list[tuple[str, object]] = [("seed", args.seed), ("quantization", record["quantization"] or "none")]
    if rows is not None:
        pairs += [
            ("training rows", len(rows)),
            ("steps", trainer.state.global_step),
            ("batch size", args.train_batch_size * args.gradient_accumulation_steps * args.world_size),
            ("learning rate", args.learning_rate),
            ("schedule", getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        ]
    config = getattr(trainer.model, "peft_config", {}).get("default")
    if record["method"] == "prompt_tuning" and config is not None:
        pairs += [("init", config.prompt_tuning_init), ("virtual tokens", config.num_virtual_tokens)]
    return [*pairs, ("most tokens of a row", trainer.family.max_length)]


def _usage(record: Mapping[str, Any], folder: str) -> str:
    command = f'python recipes/predict.py {folder} --text "..."'
    return f"```bash\n{command}\n```\n\nThe question to the model:\n\n```\n{record['task']['template']}\n```"


def _table(head: tuple[str, str], rows: list[tuple[str, object]]) -> str:
    lines = [f"| {a} | {b} |" for a, b in [head, ("---", "---"), *rows]]
    return "\n".join(lines)
