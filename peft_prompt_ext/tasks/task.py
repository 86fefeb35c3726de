"""What a task is, and the registry of tasks. The tasks themselves are in glue.py, super_glue.py and reviews.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from string import Formatter
from typing import TYPE_CHECKING, Any

from .._choices import nearest
from .metric import CLASSIFICATION, Metric


if TYPE_CHECKING:
    from datasets import Dataset


Row = Mapping[str, Any]
HIDDEN = -1  # the Hub's label of a row whose answer is kept back


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task: where its rows are, how a row is asked and answered, and how the answers are scored.

    The same entry serves language models, which score an answer by its likelihood after `template`, and models with a
    classification head, which read `texts`.

    Attributes:
        name: What a user types.
        path: Hub id of the data set, or the name of an embedded asset; empty for a user's own files.
        loader: Function of the task and a split that loads the split's rows; by default from the Hub.
        subset: Configuration of the data set on the Hub.
        revision: Commit of the data set on the Hub.
        splits: Splits that there are.
        validation: The splits to be scored; the first one is used while training.
        template: Question to a language model; columns in braces. An answer follows without a line between them.
        texts: One or two texts for a classification head; columns in braces.
        label_words: Answer for each label, with the space before it. Empty if `choices` gives them.
        labels: Values of the label column in the order of the label words; by default 0, 1, ...
        label_names: Name of each label in a prediction; by default the label words.
        label_column: Column of the answer.
        values: For a regression, the number that each label word stands for.
        group: Column whose rows are scored together, so that they are sampled and held out together.
        truncate: Columns that may be cut when a row is too long for the model; by default all.
        prepare: Function of a row that returns further columns for the templates.
        choices: Function of a prepared row that returns the answers to choose from, where they differ by row.
        answer: Function of a prepared row that returns the index of the right choice, where no label column holds it;
            None or HIDDEN if it is kept back.
        benchmark: "glue", "super_glue", or "".
        metric: How predictions are scored; by default by accuracy and macro F1.
        main_metric: The score to compare by; "combined_score" is the mean of `metric.counted`.
        version: Raised whenever a change makes scores incomparable.
    """

    name: str
    template: str
    texts: tuple[str, ...]
    path: str = ""
    loader: Callable[[Task, str], Dataset] | None = None
    subset: str | None = None
    revision: str | None = None
    splits: tuple[str, ...] = ("train", "validation", "test")
    validation: tuple[str, ...] = ("validation",)
    label_words: tuple[str, ...] = ()
    labels: tuple[Any, ...] = ()
    label_names: tuple[str, ...] = ()
    label_column: str = "label"
    values: tuple[float, ...] = ()
    group: str | None = None
    truncate: tuple[str, ...] = ()
    prepare: Callable[[Row], dict[str, Any]] | None = None
    choices: Callable[[Row], list[str]] | None = None
    answer: Callable[[Row], int | None] | None = None
    benchmark: str = ""
    metric: Metric = CLASSIFICATION
    main_metric: str = "accuracy"
    version: int = 1

    def __post_init__(self) -> None:
        if bool(self.label_words) == bool(self.choices):
            raise ValueError(f"The task {self.name!r} needs label_words or choices, and not both.")
        for values in (self.labels, self.label_names, self.values):
            if values and len(values) != len(self.label_words):
                raise ValueError(
                    f"The task {self.name!r} has {len(self.label_words)} label words ({', '.join(self.label_words)}) "
                    f"and {len(values)} values ({', '.join(map(str, values))}): give one for each."
                )

    @property
    def is_regression(self) -> bool:
        """Whether the answer is a number, which the label words stand for."""
        return bool(self.values)

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each label in a prediction."""
        return self.label_names or tuple(word.strip() for word in self.label_words)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Columns that the templates name."""
        found = (field for text in (self.template, *self.texts) for _, field, _, _ in Formatter().parse(text))
        return tuple(dict.fromkeys(field for field in found if field))

    @property
    def has_text_labels(self) -> bool:
        """Whether the labels are texts: a file's 1 is the label "1" then."""
        return bool(self.labels) and all(isinstance(label, str) for label in self.labels)

    def prepared(self, row: Row) -> dict[str, Any]:
        """The row with the further columns that its templates name."""
        return {**row, **(self.prepare(row) if self.prepare else {})}

    def choices_of(self, row: Row) -> list[str]:
        """The answers that a prepared row has to choose from."""
        return self.choices(row) if self.choices else list(self.label_words)

    def target(self, row: Row) -> int:
        """Index of the right choice of a prepared row; for a number the nearest one; HIDDEN if it is not known.

        Raises:
            KeyError: The row lacks a column that `answer` reads.
            ValueError: The label is none of the task's.
        """
        label = self.answer(row) if self.answer else row.get(self.label_column)
        known = self.labels if self.labels and not self.answer else tuple(range(len(self.choices_of(row))))
        if self.has_text_labels and label is not None:
            label = str(label)
        if label is None or (label == HIDDEN and HIDDEN not in known):
            return HIDDEN
        if self.is_regression:
            return self._nearest(label)
        if label not in known:
            names = ", ".join(map(repr, known))
            raise ValueError(f"{self.label_column} of the task {self.name!r} is one of {names}; got {label!r}.")
        return known.index(label)

    def _nearest(self, number: Any) -> int:
        if not isinstance(number, int | float) or not min(self.values) <= number <= max(self.values):
            raise ValueError(
                f"{self.label_column} is a number from {min(self.values)} to {max(self.values)}, got {number!r}."
            )
        return min(range(len(self.values)), key=lambda i: abs(self.values[i] - number))

    def target_or_hidden(self, row: Row) -> int:
        """As `target`, but a label that is none of the task's is hidden: rows to be predicted may have any."""
        try:
            return self.target(row)
        except (KeyError, ValueError):
            return HIDDEN

    def to_dict(self) -> dict[str, Any]:
        """The fields that are plain values, for a run folder; functions and the metric come from the code."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "metric"}
        return {name: value for name, value in values.items() if value is not None and not callable(value)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Task:
        """The task of `to_dict`: the registered one if its version is the same, else one of the saved values.

        Raises:
            ValueError: A registered task with functions has another version, or a field is not known.
        """
        known = TASKS.get(values.get("name", ""))
        if known is not None and known.version == values.get("version"):
            return known
        if known is not None and (known.prepare or known.choices):
            raise ValueError(
                f"The task {known.name!r} was saved as version {values.get('version')}; this is version "
                f"{known.version}. Use the version of the library that it was trained with."
            )
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"A task has no field {', '.join(unknown)}; its file may be of a newer version.")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if known is not None:
            arguments |= {"metric": known.metric, "loader": known.loader}
        return cls(**arguments)


TASKS: dict[str, Task] = {}


def register_tasks(tasks: Iterable[Task]) -> None:
    """Make tasks known by their names.

    Raises:
        ValueError: A name is taken.
    """
    for task in tasks:
        if task.name in TASKS:
            raise ValueError(f"There is a task {task.name!r} already: choose another name.")
        TASKS[task.name] = task


def available_tasks() -> list[str]:
    """Names that `get_task` knows, sorted."""
    return sorted(TASKS)


def get_task(name: str) -> Task:
    """Look a task up by name.

    Raises:
        ValueError: Unknown; suggests the nearest and lists all.
    """
    if name not in TASKS:
        raise ValueError(
            f"There is no task {name!r}{nearest(name.lower(), TASKS)}. The tasks are: {', '.join(available_tasks())}."
        )
    return TASKS[name]
