"""A run as `recipes/train.py`'s own job: all that the harness takes from the recipe."""

from typing import Any

from .suite import Spec, train_arguments


def prepare(spec: Spec, folder: Any, data_dir: str | None, extra: tuple[str, ...] = ()) -> Any:
    """The job of a run with its model loaded, writing to a folder; `extra` are more flags of `recipes/train.py`."""
    from peft_prompt_ext.training import run as recipe

    fixed = ["--output_dir", str(folder), "--save_strategy", "no", "--disable_tqdm", "true", "--do_eval", "true"]
    if spec["method"] != "zero_shot":
        fixed += ["--do_train", "true"]
    return recipe.prepare(*recipe.parse([*train_arguments(spec, data_dir), *fixed, *extra]))


def train(job: Any) -> None:
    """Train and save."""
    from peft_prompt_ext.training import run as recipe

    recipe.train(job.trainer, None)


def rows_to_score(spec: Spec, folder: Any, data_dir: str | None) -> tuple[Any, Any]:
    """The task of a run, and the rows that it will be scored on."""
    from peft_prompt_ext.training import run as recipe

    line = [*train_arguments(spec, data_dir), "--output_dir", str(folder), "--do_eval", "true"]
    _, data_args, _, args = recipe.parse(line)
    task = recipe.find_task(data_args)
    return task, recipe.load_splits(task, data_args, args)[task.validation[0]]


def load_over(job: Any, precision: str) -> None:
    """Put the saved adapter over the base model in another precision, in place of the job's model."""
    from peft_prompt_ext.training.models import trained_model

    whole = precision in {"float32", "bfloat16"}
    other = {"quantization": None, "dtype": precision} if whole else {"quantization": precision}
    trainer = job.trainer
    model = trained_model(trainer.family, {**job.settings, **other}, trainer.args.output_dir)
    if whole:  # quantised weights are on their device
        model = model.to(trainer.args.device)
    trainer.model = trainer.model_wrapped = model
