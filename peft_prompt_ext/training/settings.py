"""What a run is, as plain values: saved in its folder, and compared before anything else is written there."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .arguments import DataArguments, MethodArguments, ModelArguments
from .folder import LENGTHS
from .methods import METHODS
from .models import default_rate, find_family
from .prompts import prompt_size, text_cache_of


if TYPE_CHECKING:
    from transformers import TrainingArguments

    from ..tasks import Task
    from ..tasks.families import Family


logger = logging.getLogger(__name__)

SAMPLING = ("max_train_samples", "num_shots", "held_out_samples", "sample_seed")
# What decides the losses of a training beside its model and rows, and so must be the same where it goes on
TRAINING = (
    *("seed", "data_seed", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim"),
    *("optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("train_sampling_strategy", "dataloader_drop_last", "neftune_noise_alpha", "bf16", "fp16"),
)
PLACES = ("data_dir", "train_file")  # rows may be moved: they are compared themselves
CACHES = ("text_cache", "text_cache_bytes")  # they decide how long a run takes, not what it gives
COUNTS = ("max_train_samples", "max_eval_samples", "max_predict_samples", "num_shots", "held_out_samples")


def describe_run(
    model_args: ModelArguments,
    data_args: DataArguments,
    method_args: MethodArguments,
    args: TrainingArguments,
    task: Task,
) -> tuple[dict[str, Any], Family]:
    """Complete the settings of a run: its defaults that depend on the model are filled in, in `args` too.

    Returns:
        The settings as they will be read again from the folder, and how the task is asked of the model.

    Raises:
        ValueError: The method, the model and the task do not go together.
    """
    settings: dict[str, Any] = {**asdict(model_args), **asdict(method_args)}
    settings |= {name: getattr(data_args, name) for name in SAMPLING}
    family = find_family(settings, task, data_args.max_seq_length)
    if args.learning_rate is None:
        args.learning_rate = default_rate(settings)
    if METHODS[method_args.method].has_prompt:
        settings["num_virtual_tokens"] = prompt_size(settings, task, family.tokenizer, family.asks_question)
    asked = {"task_type": family.task_type, "max_length": family.max_length}
    settings = {"task": task.to_dict(), **settings, **asked}  # an error names the first difference first
    settings |= training_settings(args) | {name: getattr(data_args, name) for name in PLACES}
    return json.loads(json.dumps(settings)), family


def training_settings(args: TrainingArguments) -> dict[str, Any]:
    """What decides the losses of a training, and how long it is."""
    # it makes no difference how processes share the batch
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {**{name: getattr(args, name) for name in (*TRAINING, *LENGTHS)}, "total_train_batch_size": batch}


def fixed_settings(settings: Mapping[str, Any], args: TrainingArguments) -> dict[str, Any]:
    """The settings that must equal those in the run's folder, for training or for scoring what was trained."""
    free = free_names(settings, args)
    return {name: value for name, value in settings.items() if name not in free}


def free_names(settings: Mapping[str, Any], args: TrainingArguments) -> set[str]:
    """Names of the settings that may differ from those in the run's folder."""
    if args.do_train:
        return {*PLACES, *LENGTHS, *CACHES}
    free = {*PLACES, *CACHES, *training_settings(args)}
    if METHODS[settings["method"]].trains == "nothing":
        return free
    # other rows may be scored than were sampled, but no held-out rows of a train split that was trained on whole
    return free | {*(SAMPLING[:2] if settings["held_out_samples"] else SAMPLING)}


def check_flags(data_args: DataArguments, method_args: MethodArguments, args: TrainingArguments) -> None:
    """Refuse values that would be misunderstood, or fail once everything is loaded.

    Raises:
        ValueError: One of them came.
    """
    for name in COUNTS:
        count = getattr(data_args, name)
        if count is not None and count < 1:
            raise ValueError(f"--{name} must be 1 or more, got {count}; leave it out for all rows.")
    if args.label_smoothing_factor:
        raise ValueError(
            f"--label_smoothing_factor {args.label_smoothing_factor}: the label words alone are scored, and smoothing "
            "would spread over the whole vocabulary. Leave it out."
        )
    _check_position(method_args)
    kwargs = method_args.prompt_tuning_init_kwargs
    try:
        is_object = kwargs is None or isinstance(json.loads(kwargs), dict)
    except json.JSONDecodeError:
        is_object = False
    if not is_object:
        raise ValueError(
            f'--prompt_tuning_init_kwargs must be a JSON object such as {{"population": 50}}, got {kwargs}'
        )


def _check_position(method_args: MethodArguments) -> None:
    cache = text_cache_of(asdict(method_args))
    if method_args.prompt_position == "suffix":
        if not METHODS[method_args.method].has_prompt:
            raise ValueError(f"--prompt_position suffix: {method_args.method} has no prompt. Leave it out.")
    elif cache != text_cache_of(asdict(MethodArguments())):
        raise ValueError("--text_cache and --text_cache_bytes are for --prompt_position suffix alone: leave them out.")


def keep_to_one_gpu(args: TrainingArguments) -> None:
    """Keep the Trainer from DataParallel, which would also split arguments that are not rows."""
    if args.n_gpu > 1:
        logger.warning(
            "One of %d GPUs is used. For all: accelerate launch --num_processes %d -m peft_prompt_ext.cli train ...",
            args.n_gpu,
            args.n_gpu,
        )
        args._n_gpu = 1
