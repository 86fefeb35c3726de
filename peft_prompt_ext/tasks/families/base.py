"""What a kind of model has to be able to do with a task's rows.

Shapes: B rows, C most choices of a row, T text tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..encoding import split_template
from ..task import HIDDEN, Task


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ABSENT = -100.0  # the score of a choice that a row does not have; also what the Trainer pads scores with


class Family(ABC):
    """Encodes, batches and scores rows for one `task_type` of PEFT.

    Args:
        task: The task.
        tokenizer: The model's tokenizer.
        max_length: Most tokens of a row, its answer included.
        prompt_behind: Whether a prompt stands between the text and the answer. The text is then the template up to
            its last column, and the prompt says the rest, `ending`.

    Raises:
        ValueError: The tokenizer cannot do what the kind of model needs, or a template has no text before a prompt.
    """

    task_type: ClassVar[str]
    asks_question: ClassVar[bool] = True  # whether the model reads the task's template; a head reads its texts

    def __init__(
        self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, prompt_behind: bool = False
    ) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"The tokenizer ({tokenizer.name_or_path}) has no padding token: set tokenizer.pad_token, for example "
                "to tokenizer.eos_token."
            )
        self.task = task
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.text_limit = max_length  # most tokens of a text, if that is fewer than `max_length` leaves it
        self.prompt_behind = prompt_behind
        self.question, self.ending = task.template, ""
        if prompt_behind and self.asks_question:
            self.question, self.ending = split_template(task.template)
        if not self.question:
            raise ValueError(f"The template {task.template!r} of {task.name} has no column that a prompt can follow.")

    @property
    def model_options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` that the task decides."""
        return {}

    @property
    def text_room(self) -> int:
        """Most tokens of a text, if all rows have the same answers to choose from."""
        return self.text_limit

    @abstractmethod
    def texts_of(self, row: Mapping[str, Any]) -> list[str]:
        """What the model reads of a prepared row in front of the answer, the prompt left out."""

    @abstractmethod
    def encode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Encode a row of the data set.

        Returns:
            The columns that the batches are made of, among them `length` (tokens, int), `truncated` (bool) and
            `target` (index of the right choice, HIDDEN if it is not known).
        """

    @abstractmethod
    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Batch encoded rows with their labels, for the model's own loss."""

    @abstractmethod
    def collate_choices(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Batch encoded rows with all their choices, for `score`; `target` [B] is among them."""

    @abstractmethod
    def score(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Rate the choices of a batch of `collate_choices`.

        Args:
            model: The model, with or without an adapter, also inside a wrapper such as DistributedDataParallel.
            batch: The batch, on the model's device.

        Returns:
            Log-likelihoods [B, C] in float32; ABSENT where a row has no such choice.
        """

    def loss(self, scores: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Mean negative log-likelihood of the right choices."""
        return -scores.gather(1, batch["target"].clamp(min=0)[:, None]).mean()


def right_choice(row: Mapping[str, Any]) -> int:
    """The target of an encoded row that is to be trained on.

    Raises:
        ValueError: It is not known.
    """
    if row["target"] == HIDDEN:
        raise ValueError("A row without a label cannot be trained on.")
    return int(row["target"])


def base_model_of(model: Any) -> Any:
    """The model of transformers inside wrappers and adapters."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def prompt_length(model: Any, adapter_names: Sequence[str] | None = None) -> int:
    """Virtual tokens in each row of the model's logits.

    Args:
        model: The model, also inside a wrapper.
        adapter_names: The adapter of each row, if they differ; rows are as wide as the longest prompt.
    """
    config = _prompt_config(model)
    if config is None:
        return 0
    configs = [model.peft_config[name] for name in adapter_names] if adapter_names else [config]
    return max(int(config.num_virtual_tokens) for config in configs)


def has_prompt_behind(model: Any) -> bool:
    """Whether the model's prompt stands between a text and its answer."""
    return getattr(_prompt_config(model), "prompt_position", "prefix") == "suffix"


def _prompt_config(model: Any) -> Any:
    """The config of the active prompt; None without one, or while it is disabled."""
    model = getattr(model, "module", model)
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning or getattr(model, "_adapters_disabled", False):
        return None
    return config
