"""Train and score one GLUE, SuperGLUE or own task: prompt tuning, LoRA, full fine-tuning, a linear probe or zero-shot.

    python recipes/train.py --task_name sst2 --output_dir outputs/sst2
    python recipes/train.py --config recipes/configs/movie_reviews.yaml --seed 1
    accelerate launch --num_processes 2 recipes/train.py --task_name rte --data_dir glue/rte --output_dir outputs/rte

Flags have run_glue's names; defaults < the method's defaults < --config file.yaml < the command line.
PEFT_PROMPT_EXT_DEBUG=1 shows where an error comes from.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments

    from peft_prompt_ext.recipe.trainer import ChoiceTrainer
    from peft_prompt_ext.tasks import Task
    from peft_prompt_ext.tasks.families import Family


logger = logging.getLogger("recipes.train")

# Where Trainer's own defaults are wrong for a method; a learning rate of None is the one of `prompt_learning_rate`.
# README.md has the measurements behind the learning rates.
METHODS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"learning_rate": None, "lr_scheduler_type": "cosine", "warmup_steps": 0.1},
    "lora": {"learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 0.1},
    "full": {"learning_rate": 1e-5, "lr_scheduler_type": "linear", "warmup_steps": 0.1},
    "linear_probe": {"learning_rate": 3e-2, "lr_scheduler_type": "cosine", "warmup_steps": 0.1},
    "zero_shot": {},
}
DEFAULTS = {
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "logging_steps": 10,
    "save_total_limit": 2,
    "report_to": "none",
}
SAMPLING = ("max_train_samples", "num_shots", "held_out_samples", "sample_seed")
# What decides the losses of a training beside its model and rows, and so must be the same where it goes on
TRAINING = ("seed", "data_seed", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim")
TRAINING += ("optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")
TRAINING += ("train_sampling_strategy", "dataloader_drop_last", "neftune_noise_alpha", "bf16", "fp16")
PLACES = ("data_dir", "train_file")  # rows may be moved: they are compared themselves
COUNTS = ("max_train_samples", "max_eval_samples", "max_predict_samples", "num_shots", "held_out_samples")
OWN_DATA = {"text_columns": [], "label_column": "label", "label_words": [], "template": None}
SUFFIXES = {"validation_mismatched": "_mm", "test_mismatched": "_mm"}  # GLUE's keys for the second rows of MNLI


@dataclass
class ModelArguments:
    """Which model."""

    model_name_or_path: str = field(
        default="smollm2-135m", metadata={"help": "A Hub id, a folder or an embedded asset"}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub"})
    task_type: Literal["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM"] | None = field(
        default=None, metadata={"help": "By default what the checkpoint is made for"}
    )
    quantization: Literal["nf4", "fp4", "int8"] | None = field(
        default=None, metadata={"help": "Of the frozen backbone"}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Of weights and arithmetic; auto: the checkpoint's, or what the device has"}
    )


@dataclass
class DataArguments:
    """Which rows."""

    task_name: str | None = field(default=None, metadata={"help": "A task, e.g. sst2, rte, cb, movie_reviews"})
    data_dir: str | None = field(
        default=None, metadata={"help": "A folder with train.jsonl, validation.jsonl, ... in the Hub's columns"}
    )
    train_file: str | None = field(default=None, metadata={"help": "Your own CSV, JSON or JSONL file"})
    validation_file: str | None = field(default=None, metadata={"help": "Your own file to score on"})
    test_file: str | None = field(default=None, metadata={"help": "Your own file to predict"})
    text_columns: list[str] = field(default_factory=list, metadata={"help": "Columns of text in your own file"})
    label_column: str = field(default="label", metadata={"help": "Column of the label in your own file"})
    label_words: list[str] = field(default_factory=list, metadata={"help": "LABEL=WORD for each label of your file"})
    template: str | None = field(default=None, metadata={"help": "Question to a language model, columns in braces"})
    max_seq_length: int = field(default=256, metadata={"help": "Most tokens of a row, the prompt not counted"})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many rows, sampled"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Score this many rows, sampled"})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict the first so many rows"})
    num_shots: int | None = field(default=None, metadata={"help": "Train on this many rows of each class"})
    held_out_samples: int | None = field(
        default=None,
        metadata={"help": "Score on this many rows kept out of train, to choose settings without the validation rows"},
    )
    sample_seed: int = field(
        default=0,
        metadata={"help": "Seed of the sampling of train; --max_eval_samples draws the same rows with every one"},
    )


@dataclass
class MethodArguments:
    """What is trained."""

    method: Literal["prompt_tuning", "lora", "full", "linear_probe", "zero_shot"] = field(
        default="prompt_tuning", metadata={"help": "What to train; zero_shot only scores"}
    )
    num_virtual_tokens: int | None = field(
        default=None,
        metadata={"help": "Length of the prompt; by default label words and form of the question, but 20 to 100"},
    )
    prompt_tuning_init: str | None = field(
        default=None, metadata={"help": "By default CLASS_LABELS, or SAMPLE_VOCAB for a task without label words"}
    )
    prompt_tuning_init_text: str | None = field(default=None, metadata={"help": "Text for the init TEXT"})
    prompt_tuning_init_kwargs: str | None = field(default=None, metadata={"help": "The init's arguments as JSON"})
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA"})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of LoRA, divided by its rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of LoRA"})


Arguments = tuple[ModelArguments, DataArguments, MethodArguments, "TrainingArguments"]


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the recipe. Returns all_results."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or {"-h", "--help"} & set(argv):
        help_text()
        return {}
    from peft_prompt_ext.assets import AssetError

    try:
        return run(*parse(argv))
    except (ValueError, ImportError, AssetError) as error:
        if _debugging():
            raise
        raise SystemExit(f"error: {error}") from None


def parse(argv: list[str]) -> Arguments:
    """Turn the command line into arguments; a --config file stands before it.

    Raises:
        ValueError: The config file is not one.
    """
    from transformers import HfArgumentParser, TrainingArguments

    argv = with_config([_underscored(item) for item in argv])
    # argparse takes "-1=bad" for a flag, unless a space is in it
    argv = [f" {item}" if re.match(r"-\d", item) else item for item in argv]
    method = _flag(argv, "--method") or MethodArguments.method
    kinds = (ModelArguments, DataArguments, MethodArguments, TrainingArguments)
    parser = HfArgumentParser(kinds, allow_abbrev=False)  # else a misspelt key may be another one's beginning
    parser.set_defaults(**DEFAULTS, **METHODS.get(method, {}))  # the parser refuses an unknown one
    task = _flag(argv, "--task_name") or "own_data"
    parser.set_defaults(output_dir=f"outputs/{task}-{method}")
    if not any(_asks(argv, name) for name in ("--do_train", "--do_eval", "--do_predict")):
        parser.set_defaults(do_train=True, do_eval=True)
    return parser.parse_args_into_dataclasses(argv)


def with_config(argv: list[str]) -> list[str]:
    """Put the entries of the --config file before the other arguments, so that those win."""
    path = _flag(argv, "--config")
    if path is None:
        return argv
    import yaml

    if not Path(path).is_file():
        raise ValueError(f"--config: there is no file {path}.")
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path} must hold `name: value` lines, got {type(entries).__name__}.")
    flags: list[str] = []
    for name, value in entries.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{name}", *map(str, values)] if value is not None else []
    place = next(i for i, item in enumerate(argv) if item.partition("=")[0] == "--config")
    rest = argv[:place] + argv[place + (1 if "=" in argv[place] else 2) :]
    return flags + rest


def _underscored(item: str) -> str:
    """A flag in the form that the config file has too: transformers takes --task-name as well."""
    name, equals, value = item.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else item


def _flag(argv: list[str], name: str) -> str | None:
    """The last value of a flag, before anything heavy is imported."""
    values = [value for flag, value in pairwise(argv) if flag == name]
    values += [item.partition("=")[2] for item in argv if item.startswith(f"{name}=")]
    return values[-1] if values else None


def _asks(argv: list[str], name: str) -> bool:
    """Whether a flag is there, and not to say no."""
    there = any(item.partition("=")[0] == name for item in argv)
    return there and str(_flag(argv, name)).lower() not in {"false", "f", "no", "n", "0"}


def help_text() -> None:
    """Print the recipe's own flags at once; the Trainer's would take seconds to import."""
    from transformers.hf_argparser import HfArgumentParser

    parser = HfArgumentParser(
        (ModelArguments, DataArguments, MethodArguments),
        prog="python recipes/train.py",
        description=__doc__,
        epilog="Every flag of transformers.TrainingArguments works as well: --output_dir, --seed, --max_steps, "
        "--num_train_epochs, --learning_rate, --per_device_train_batch_size, --do_train, --do_eval, --do_predict, "
        "--resume_from_checkpoint (true: the last one), --push_to_hub, --report_to, --bf16, ...",
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="Values for any of the flags")
    parser.print_help()


@dataclass
class Job:
    """A run that is ready to train.

    Attributes:
        trainer: With the model, and rows to train on if there are any.
        encoded: Tokens of each split, rows in the order of `splits`.
        splits: Rows of each split.
        record: What the run is.
        checkpoint: Where it goes on, or None.
        weights: What is scored without a training, or None.
        scores: What evaluation gave, for the model card.
    """

    trainer: ChoiceTrainer
    encoded: dict[str, Dataset]
    splits: dict[str, Dataset]
    record: dict[str, Any]
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
    results = Path(args.output_dir, "all_results.json")
    return json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}


def prepare(
    model_args: ModelArguments, data_args: DataArguments, method_args: MethodArguments, args: TrainingArguments
) -> Job:
    """Claim the output folder, read and encode the rows, and build the model and its Trainer."""
    import torch
    from transformers import set_seed

    from peft_prompt_ext.recipe.folder import check_continued, claim, rows_digest, trained_weights, write_record
    from peft_prompt_ext.recipe.methods import (
        find_family,
        new_model,
        prompt_learning_rate,
        prompt_size,
        trained_model,
    )

    logging.basicConfig(level=logging.INFO if args.should_log else logging.WARNING, format="%(message)s")
    # PEFT reads an attribute that transformers has renamed
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    check_flags(data_args, method_args, args)
    keep_to_one_gpu(args)
    args.do_train = args.do_train and method_args.method != "zero_shot"
    args.dataloader_pin_memory = args.dataloader_pin_memory and torch.cuda.is_available()
    task, folder = find_task(data_args), Path(args.output_dir)
    record = {**asdict(model_args), **asdict(method_args), **{name: getattr(data_args, name) for name in SAMPLING}}
    family = find_family(record, task, data_args.max_seq_length)
    if args.learning_rate is None:
        args.learning_rate = prompt_learning_rate(record)
    if method_args.method == "prompt_tuning":
        record["num_virtual_tokens"] = prompt_size(record, task, family.tokenizer, family.task_type)
    asked = {"task_type": family.task_type, "max_length": family.max_length}
    record = {"task": task.to_dict(), **record, **asked}  # what differs first is said first
    record |= training_record(args) | {name: getattr(data_args, name) for name in PLACES}
    record = json.loads(json.dumps(record))  # as it will be read again
    same = {name: value for name, value in record.items() if name not in free_names(record, args)}
    checkpoint = claim(folder, same, args.do_train, args.resume_from_checkpoint)
    scores_trained = not args.do_train and method_args.method != "zero_shot"
    weights = trained_weights(folder, checkpoint) if scores_trained else None
    set_seed(args.seed)
    splits = load_splits(task, data_args, args)
    if args.do_train:
        record["train_rows"] = rows_digest(splits["train"])
    if args.do_train and checkpoint:
        check_continued(Path(checkpoint).parent, record)
    if args.should_save and weights is None:
        write_record(folder, record)
    encoded = {split: encode(family, rows, split, args) for split, rows in splits.items()}
    for split in set(task.validation) & set(splits):
        splits[split], encoded[split] = by_length(splits[split], encoded[split])
    model = trained_model(family, record, weights) if weights else new_model(family, record, args.seed)
    trainer = build_trainer(model, family, encoded, splits, args)
    job = Job(trainer, encoded, splits, record, checkpoint, weights)
    trainer.card = lambda: write_card(job)
    if hasattr(model, "print_trainable_parameters") and args.should_log:
        model.print_trainable_parameters()
    return job


def training_record(args: TrainingArguments) -> dict[str, Any]:
    """What decides the losses of a training, and how long it is."""
    from peft_prompt_ext.recipe.folder import LENGTHS

    # how the processes share it makes no difference
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {**{name: getattr(args, name) for name in (*TRAINING, *LENGTHS)}, "total_train_batch_size": batch}


def free_names(record: dict[str, Any], args: TrainingArguments) -> set[str]:
    """What of a record need not be as the folder has it."""
    from peft_prompt_ext.recipe.folder import LENGTHS

    if args.do_train:
        return {*PLACES, *LENGTHS}
    free = {*PLACES, *training_record(args)}
    if record["method"] == "zero_shot":
        return free
    # other rows may be scored than were sampled, but not rows held out of a train split that was trained on whole
    return free | {*(SAMPLING[:2] if record["held_out_samples"] else SAMPLING)}


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
            f"--label_smoothing_factor {args.label_smoothing_factor}: the recipe scores the words of the labels, and "
            "smoothing would spread over the whole vocabulary. Leave it out."
        )
    kwargs = method_args.prompt_tuning_init_kwargs
    try:
        is_object = kwargs is None or isinstance(json.loads(kwargs), dict)
    except json.JSONDecodeError:
        is_object = False
    if not is_object:
        raise ValueError(
            f'--prompt_tuning_init_kwargs must be a JSON object such as {{"population": 50}}, got {kwargs}'
        )


def keep_to_one_gpu(args: TrainingArguments) -> None:
    """Let the Trainer wrap nothing in DataParallel, which would cut arguments that are not rows into parts too."""
    if args.n_gpu > 1:
        logger.warning(
            "One of %d GPUs is used: start with `accelerate launch --num_processes %d recipes/train.py ...` for all.",
            args.n_gpu,
            args.n_gpu,
        )
        args._n_gpu = 1


def find_task(data_args: DataArguments) -> Task:
    """The named task, or one made of the user's own file."""
    from peft_prompt_ext.tasks import available_tasks, get_task
    from peft_prompt_ext.tasks.data import own_task

    if data_args.task_name:
        own = [f"--{name}" for name in OWN_DATA if getattr(data_args, name) != OWN_DATA[name]]
        if own:
            raise ValueError(f"{', '.join(own)}: for your own data alone; {data_args.task_name} brings its own.")
        return get_task(data_args.task_name)
    if not data_args.train_file:
        raise ValueError(f"Give --task_name ({', '.join(available_tasks())}) or --train_file with your own data.")
    return own_task(
        data_args.train_file,
        data_args.text_columns,
        data_args.label_column,
        data_args.label_words,
        data_args.template,
    )


def load_splits(task: Task, data_args: DataArguments, args: TrainingArguments) -> dict[str, Dataset]:
    """The rows of every split that the run reads, sampled as asked and checked."""
    from peft_prompt_ext.tasks.data import check_rows, few_shot, hold_out, sample, sample_to_score

    scored = list(task.validation) if args.do_eval or args.eval_strategy != "no" else []
    held_out = data_args.held_out_samples
    splits: dict[str, Dataset] = {}
    if args.do_train or held_out:
        rows = load(task, "train", data_args, args)
        if held_out:
            rows, splits[task.validation[0]] = hold_out(task, rows, held_out, data_args.sample_seed)
            scored = []
        if data_args.num_shots:
            rows = few_shot(task, rows, data_args.num_shots, data_args.sample_seed)
        splits["train"] = sample(rows, data_args.max_train_samples, data_args.sample_seed)
    for split in scored:
        rows = load(task, split, data_args, args)
        splits[split] = sample_to_score(task, rows, data_args.max_eval_samples, seed=0)
    if args.do_predict:
        for split in ["test"] if data_args.test_file else unlabelled(task.splits):
            rows = load(task, split, data_args, args)
            splits[split] = rows.select(range(min(data_args.max_predict_samples or len(rows), len(rows))))
    for split, rows in splits.items():
        check_rows(task, split, rows, labelled=split not in unlabelled(splits))
    return splits


def unlabelled(splits: Iterable[str]) -> list[str]:
    """Those that are predicted: of mnli there are two."""
    return [split for split in splits if split.startswith("test")]


def load(task: Task, split: str, data_args: DataArguments, args: TrainingArguments) -> Dataset:
    """All rows of one split."""
    from peft_prompt_ext.tasks.data import load_split

    files_of = {"train": data_args.train_file, task.validation[0]: data_args.validation_file}
    given = {name: path for name, path in {**files_of, "test": data_args.test_file}.items() if path}
    files = given if split in given or not (data_args.task_name or data_args.data_dir) else None
    if files is not None and split not in files:
        others = ", --held_out_samples or --do_train true alone" if split == task.validation[0] else ""
        raise ValueError(f"There is no file for the split {split!r}: add --{split}_file{others}.")
    with args.main_process_first(desc=f"reading {split}"):
        return load_split(task, split, data_args.data_dir, files)


def encode(family: Family, rows: Dataset, split: str, args: TrainingArguments) -> Dataset:
    """Tokens of every row; says how many were cut."""
    with args.main_process_first(desc=f"encoding {split}"):
        encoded = rows.map(family.encode, remove_columns=rows.column_names, desc=f"Encoding {split}")
    cut = sum(encoded["truncated"])
    if cut:
        logger.info(
            "%d of %d rows of %s were cut to %d tokens (in %s).",
            cut,
            len(rows),
            split,
            family.max_length,
            ", ".join(family.task.truncate or family.task.columns),
        )
    return encoded


def by_length(rows: Dataset, encoded: Dataset) -> tuple[Dataset, Dataset]:
    """Put rows of like lengths together: less padding, the same score."""
    lengths = encoded["length"]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return rows.select(order), encoded.select(order)


def build_trainer(
    model: Any,
    family: Family,
    encoded: dict[str, Dataset],
    splits: dict[str, Dataset],
    args: TrainingArguments,
) -> ChoiceTrainer:
    """An ordinary Trainer but for how it evaluates."""
    from peft import PeftModel

    from peft_prompt_ext.recipe.trainer import ChoiceTrainer, task_metrics
    from peft_prompt_ext.tasks.families.causal_lm import CausalLM, keeps_columns, prompt_length

    args.remove_unused_columns = False  # the family's batches are made of columns that no model knows
    collator = family.collate
    has_prompt = prompt_length(model) > 0  # its config has train_logits
    if isinstance(family, CausalLM) and not has_prompt and keeps_columns(model):
        collator = family.collate_labelled_logits
    first = family.task.validation[0]
    trainer = ChoiceTrainer(
        model,
        args,
        family=family,
        data_collator=collator,
        train_dataset=encoded.get("train"),
        eval_dataset=encoded.get(first),
        # a checkpoint of an adapter is small; the tokenizer is the base model's
        processing_class=None if isinstance(model, PeftModel) else family.tokenizer,
    )
    if first in splits:
        trainer.compute_metrics = task_metrics(family, splits[first])
    return trainer


def train(trainer: ChoiceTrainer, checkpoint: str | None) -> None:
    """Train, save, and write train_results.json."""
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model()
    model, rows = cast("Any", trainer.model), cast("Any", trainer.train_dataset)
    trained = sum(int(p.numel()) for p in model.parameters() if p.requires_grad)
    metrics |= {"train_samples": len(rows), "train_steps": trainer.state.global_step, "trained_parameters": trained}
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


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


def write_card(job: Job) -> None:
    """Write the model card of what lies in the output folder, unless the one there has more to tell."""
    from peft_prompt_ext.recipe.folder import RECORD, read_record
    from peft_prompt_ext.recipe.model_card import model_card

    args, record = job.trainer.args, job.record
    folder = Path(str(args.output_dir))
    if (job.weights and Path(job.weights) != folder) or not (args.do_train or job.scores):
        return
    if job.weights and (folder / RECORD).is_file():  # that of the training, but for the rows scored now
        record = {**record, **read_record(folder), "held_out_samples": record["held_out_samples"]}
    model_card(job.trainer, record, job.scores).save(folder / "README.md")


def write_predictions(trainer: ChoiceTrainer, encoded: Dataset, rows: Dataset, suffix: str) -> None:
    """Write predict_results_TASK.txt in run_glue's form: index and prediction, one row a line."""
    from peft_prompt_ext.tasks.scoring import predictions

    task = trainer.family.task
    trainer.compute_metrics = None
    scores = trainer.predict(encoded).predictions
    prepared = [task.prepared(row) for row in rows]
    choices = [task.choices_of(row) for row in prepared]
    predicted = predictions(task, scores, [len(row) for row in choices])
    if not trainer.is_world_process_zero():
        return
    names = [
        f"{answer:.3f}" if task.is_regression else (task.names or [text.strip() for text in row])[answer]
        for answer, row in zip(predicted, choices, strict=True)
    ]
    path = Path(trainer.args.output_dir, f"predict_results_{task.name}{suffix}.txt")
    lines = [f"{i}\t{name}" for i, name in enumerate(names)]
    path.write_text("\n".join(["index\tprediction", *lines]) + "\n", encoding="utf-8")


def _debugging() -> bool:
    import os

    return os.environ.get("PEFT_PROMPT_EXT_DEBUG", "") not in {"", "0"}


if __name__ == "__main__":
    main()
