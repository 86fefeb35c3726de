"""A run from its arguments to its results: prepared, trained, scored, and used to predict.

`parse`, `prepare`, `train` and `score` are the steps for other programs, such as benchmarks.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from transformers import TrainingArguments, set_seed

from ..tasks.families import Family
from ..tasks.families.base import has_prompt_behind, prompt_length
from ..tasks.families.causal_lm import CausalLM, keeps_columns
from .arguments import DataArguments, MethodArguments, ModelArguments
from .command_line import parse
from .folder import check_continued, claim, rows_digest, trained_weights, write_settings
from .methods import METHODS
from .models import new_model, trained_model
from .prompts import keep_texts
from .results import SUFFIXES, write_card, write_predictions
from .rows import encode, find_task, load_splits, sort_by_length, unlabelled
from .settings import check_flags, describe_run, fixed_settings, keep_to_one_gpu
from .trainer import ChoiceTrainer, task_metrics


if TYPE_CHECKING:
    from datasets import Dataset


__all__ = ["DataArguments", "Job", "MethodArguments", "ModelArguments", "find_task", "load_splits", "parse"]
__all__ += ["prepare", "run", "score", "train"]


@dataclass
class Job:
    """A run that is ready to train.

    Attributes:
        trainer: With the model, and rows to train on if there are any.
        encoded: Tokens of each split, rows in the order of `splits`.
        splits: Rows of each split.
        settings: What the run is.
        checkpoint: Where it goes on, or None.
        weights: Folder of the weights that are scored without a training, or None.
        scores: What evaluation gave, for the model card.
    """

    trainer: ChoiceTrainer
    encoded: dict[str, Dataset]
    splits: dict[str, Dataset]
    settings: dict[str, Any]
    checkpoint: str | None
    weights: str | None
    scores: dict[str, float] = field(default_factory=dict)


def run(
    model_args: ModelArguments, data_args: DataArguments, method_args: MethodArguments, args: TrainingArguments
) -> dict[str, float]:
    """Prepare, train, score and predict. Returns what all_results.json holds."""
    job = prepare(model_args, data_args, method_args, args)
    trainer = job.trainer
    if args.do_train:
        train(trainer, job.checkpoint)
    if args.do_eval:
        score(job)
    for split in unlabelled(job.splits) if args.do_predict else []:
        write_predictions(trainer, job.encoded[split], job.splits[split], SUFFIXES.get(split, ""))
    trainer.create_model_card()
    if args.push_to_hub:
        trainer.push_to_hub()
    results = Path(str(args.output_dir), "all_results.json")
    return json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}


def prepare(
    model_args: ModelArguments, data_args: DataArguments, method_args: MethodArguments, args: TrainingArguments
) -> Job:
    """Claim the output folder, read and encode the rows, and build the model and its Trainer.

    Raises:
        ValueError: Arguments, rows or the folder do not fit; raised before any weights are loaded.
    """
    _set_up(args)
    check_flags(data_args, method_args, args)
    trains = METHODS[method_args.method].trains != "nothing"
    args.do_train = args.do_train and trains
    task, folder = find_task(data_args), Path(str(args.output_dir))
    settings, family = describe_run(model_args, data_args, method_args, args, task)
    checkpoint = claim(folder, fixed_settings(settings, args), args.do_train, args.resume_from_checkpoint)
    weights = trained_weights(folder, checkpoint) if trains and not args.do_train else None
    set_seed(args.seed)
    splits = load_splits(task, data_args, args)
    if args.do_train:
        settings["train_rows"] = rows_digest(splits["train"])
    if args.do_train and checkpoint:
        check_continued(Path(checkpoint).parent, settings)
    if args.should_save and weights is None:
        write_settings(folder, settings)
    encoded = {split: encode(family, rows, split, args) for split, rows in splits.items()}
    for split in set(task.validation) & set(splits):
        splits[split], encoded[split] = sort_by_length(splits[split], encoded[split])
    model = trained_model(family, settings, weights) if weights else new_model(family, settings, args.seed)
    keep_texts(model, settings)
    job = Job(build_trainer(model, family, encoded, splits, args), encoded, splits, settings, checkpoint, weights)
    job.trainer.card = lambda: write_card(job.trainer, job.settings, job.scores, job.weights)
    if hasattr(model, "print_trainable_parameters") and args.should_log:
        model.print_trainable_parameters()
    return job


def _set_up(args: TrainingArguments) -> None:
    logging.basicConfig(level=logging.INFO if args.should_log else logging.WARNING, format="%(message)s")
    # PEFT reads an attribute that transformers has renamed
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    keep_to_one_gpu(args)
    args.dataloader_pin_memory = args.dataloader_pin_memory and torch.cuda.is_available()


def build_trainer(
    model: Any,
    family: Family,
    encoded: dict[str, Dataset],
    splits: dict[str, Dataset],
    args: TrainingArguments,
) -> ChoiceTrainer:
    """Build the Trainer of a run; it differs from an ordinary one in how it evaluates."""
    args.remove_unused_columns = False  # the family's batches are made of columns that the model does not take
    first = family.task.validation[0]
    trainer = ChoiceTrainer(
        model,
        args,
        family=family,
        data_collator=_collator(model, family),
        train_dataset=encoded.get("train"),
        eval_dataset=encoded.get(first),
        # a checkpoint of an adapter is small; the tokenizer is the base model's
        processing_class=None if isinstance(model, PeftModel) else family.tokenizer,
    )
    if first in splits:
        trainer.compute_metrics = task_metrics(family, splits[first])
    return trainer


def _collator(model: Any, family: Family) -> Callable[..., dict[str, torch.Tensor]]:
    """How rows become a batch to train on: where only labelled tokens need logits, others are left out."""
    supervised = getattr(getattr(model, "active_peft_config", None), "train_logits", None) == "supervised"
    # a prompt behind the text stands where the labels begin, so the model has to get them as they are
    if isinstance(family, CausalLM) and not supervised and keeps_columns(model) and not has_prompt_behind(model):
        return partial(family.collate_labelled_logits, prompt=prompt_length(model))
    return family.collate


def train(trainer: ChoiceTrainer, checkpoint: str | None) -> dict[str, float]:
    """Train, save, and write train_results.json. Returns what that holds."""
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model()
    model, rows = cast("Any", trainer.model), cast("Any", trainer.train_dataset)
    trained = sum(int(p.numel()) for p in model.parameters() if p.requires_grad)
    metrics |= {"train_samples": len(rows), "train_steps": trainer.state.global_step, "trained_parameters": trained}
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    return metrics


def score(job: Job) -> None:
    """Score every validation split that was read, and write eval_results.json."""
    trainer = job.trainer
    for split in trainer.family.task.validation:
        if split in job.splits:
            scores = trainer.evaluate_task(job.encoded[split], job.splits[split])
            scores["eval_samples"] = len(job.splits[split])
            job.scores |= {f"{name}{SUFFIXES.get(split, '')}": value for name, value in scores.items()}
    trainer.log_metrics("eval", job.scores)
    trainer.save_metrics("eval", job.scores)
