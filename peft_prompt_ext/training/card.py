"""The model card of a run: scores, init, seed, versions, and how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..assets import hub_id
from .methods import METHODS


if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from .trainer import ChoiceTrainer


NO_SCORES = ("eval_loss", "eval_runtime", "eval_samples", "eval_steps", "eval_model_preparation_time")
FACTS = {
    "train_samples": "training rows",
    "train_steps": "steps",
    "total_train_batch_size": "batch size",
    "learning_rate": "learning rate",
    "lr_scheduler_type": "schedule",
}
PACKAGES = ("peft", "transformers", "torch", "datasets")


def model_card(trainer: ChoiceTrainer, settings: Mapping[str, Any], results: Mapping[str, float]) -> ModelCard:
    """Make the card of a run.

    Args:
        trainer: After training or evaluation; the figures of train_results.json in its output folder are on the card
            too.
        settings: The run's.
        results: What evaluation gave, with the prefix "eval_".

    Returns:
        The card, with the scores in the Hub's metadata.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    task, folder = trainer.family.task, Path(str(trainer.args.output_dir))
    trained = folder / "train_results.json"
    facts = {**settings, **(json.loads(trained.read_text(encoding="utf-8")) if trained.is_file() else {})}
    is_adapter = METHODS[settings["method"]].stores == "adapter"
    base, name = hub_id(settings["model_name_or_path"]), f"{task.name}-{settings['method']}"
    split = "train, held out" if settings["held_out_samples"] else task.validation[0]
    scored = [key for key in results if key.startswith("eval_") and not key.startswith(NO_SCORES)]
    scores = [(key, results[key]) for key in scored]
    data = ModelCardData(
        base_model=base,
        library_name="peft" if is_adapter else "transformers",
        tags=["peft-prompt-ext", settings["method"], task.name],
        datasets=[task.path] if "/" in task.path else None,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-classification",
                dataset_type=task.path or task.name,
                dataset_name=task.name,
                dataset_config=task.subset,
                dataset_split=split,
                dataset_revision=task.revision if "/" in task.path else None,
                metric_type=key.removeprefix("eval_"),
                metric_value=value,
            )
            for key, value in scores
        ]
        or None,
    )
    versions: list[tuple[str, object]] = [("peft-prompt-ext", __version__), *((p, version(p)) for p in PACKAGES)]
    rows = f"{results.get('eval_samples', 0)} rows of the split {split}"
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{_introduction(trainer, facts)}\n\n## Scores\n\nOn {rows}.\n\n"
        f"{_table(('metric', 'score'), [(k.removeprefix('eval_'), f'{v:.4f}') for k, v in scores])}\n\n"
        f"## Training\n\n{_table(('', ''), _training(trainer, facts))}\n\n"
        f"## Versions\n\n{_table(('package', 'version'), versions)}\n\n"
        f"## Use\n\n{_usage(settings, str(folder))}\n"
    )


def _introduction(trainer: ChoiceTrainer, facts: Mapping[str, Any]) -> str:
    task, name = trainer.family.task, facts["model_name_or_path"]
    return (
        f"`{hub_id(name) or Path(name).name}` on the task `{task.name}` (version {task.version}) by "
        f"{facts['method'].replace('_', ' ')}: {facts.get('trained_parameters', 0):,} trained parameters."
    )


def _training(trainer: ChoiceTrainer, facts: Mapping[str, Any]) -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = [("seed", facts["seed"]), ("quantization", facts["quantization"] or "none")]
    if "train_samples" in facts:
        pairs += [(label, facts[name]) for name, label in FACTS.items()]
    config = getattr(trainer.model, "peft_config", {}).get("default")
    if METHODS[facts["method"]].has_prompt and config is not None:
        pairs += [("init", config.prompt_tuning_init), ("virtual tokens", config.num_virtual_tokens)]
        # a stock config has no position
        pairs += [("prompt position", getattr(config, "prompt_position", "prefix"))]
    return [*pairs, ("most tokens of a row", trainer.family.max_length)]


def _usage(settings: Mapping[str, Any], folder: str) -> str:
    command = f'peft-prompt-ext predict {folder} --text "..."'
    return f"```bash\n{command}\n```\n\nThe question to the model:\n\n```\n{settings['task']['template']}\n```"


def _table(head: tuple[str, str], rows: list[tuple[str, object]]) -> str:
    lines = [f"| {a} | {b} |" for a, b in [head, ("---", "---"), *rows]]
    return "\n".join(lines)
