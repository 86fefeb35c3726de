"""The ways to train a task: one table with their flags, defaults, and what they train and store.

Nothing here imports torch, so that help is instant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .._choices import nearest


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train a task.

    Attributes:
        name: What a user types.
        help: One line on it.
        learning_rate: AdamW's default; None for a method that does not train.
        encoder_learning_rate: The same where the base model is an encoder; None if it is no other one.
        defaults: Further defaults of `TrainingArguments`, where the Trainer's own do not suit the method.
        trains: Which weights get gradients.
        stores: What a run folder holds of them: an adapter's file, a whole model, or nothing.
        peft_type: Type of the adapter in PEFT.
        task_types: Kinds of model that it runs on.
        default_task_type: Kind of model if the user names none; by default what the checkpoint is made for.
        refusal: Why it runs on no other kind.
        takes_quantized: Whether the base model may be quantised.
        dtype: Of the weights where the user chose "auto"; None: what the checkpoint or the device has.
        keeps_dropout: Whether the base model's own dropout stays on.
        adapter_config: Function of a family, the run's settings and a seed that builds PEFT's config.
    """

    name: str
    help: str
    learning_rate: float | None = None
    encoder_learning_rate: float | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    trains: Literal["adapter", "model", "head", "nothing"]
    stores: Literal["adapter", "model", "nothing"]
    peft_type: str | None = None
    task_types: tuple[str, ...] = ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM")
    default_task_type: str | None = None
    refusal: str = ""
    takes_quantized: bool = True
    dtype: str | None = None
    keeps_dropout: bool = False
    adapter_config: Callable[[Any, Mapping[str, Any], int], Any] | None = None

    @property
    def has_prompt(self) -> bool:
        """Whether virtual tokens stand in front of the text, or behind it."""
        return self.peft_type == "PROMPT_TUNING"

    @property
    def training_defaults(self) -> dict[str, Any]:
        """Defaults of `TrainingArguments`; a learning rate of None is decided by the kind of model, in `rate`."""
        if self.learning_rate is None:
            return dict(self.defaults)
        rate = None if self.encoder_learning_rate is not None else self.learning_rate
        return {**self.defaults, "learning_rate": rate}

    def rate(self, is_encoder: bool) -> float | None:
        """AdamW's default learning rate on a base model."""
        return self.encoder_learning_rate if is_encoder and self.encoder_learning_rate else self.learning_rate

    def check(self, quantization: str | None) -> None:
        """Raise ValueError if the method cannot train over a quantised base model and one was asked for."""
        if quantization and not self.takes_quantized:
            raise ValueError("Full fine-tuning trains every weight, and quantised ones have no gradient: choose lora.")

    def check_task_type(self, task_type: str) -> None:
        """Raise ValueError unless the method runs on this kind of model."""
        if task_type not in self.task_types:
            raise ValueError(f"{self.refusal}, not {task_type}.")


def get_method(name: str) -> Method:
    """Look a method up by name.

    Raises:
        ValueError: Unknown; lists all.
    """
    if name not in METHODS:
        raise ValueError(
            f"There is no method {name!r}{nearest(name, METHODS)}. The methods are: {', '.join(METHODS)}."
        )
    return METHODS[name]


def _prompt_config(family: Any, settings: Mapping[str, Any], seed: int) -> Any:
    from .prompts import prompt_config

    return prompt_config(family, settings, seed)


def _lora_config(family: Any, settings: Mapping[str, Any], seed: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type=family.task_type,
        r=settings["lora_r"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings["lora_dropout"],
    )


_COSINE = {"lr_scheduler_type": "cosine", "warmup_steps": 0.1}  # warm-up over a tenth of the steps
METHODS = {
    method.name: method
    for method in (
        Method(
            name="prompt_tuning",
            help="trains virtual tokens before the text, or behind it; stores kilobytes",
            learning_rate=0.01,
            encoder_learning_rate=0.1,
            defaults=_COSINE,
            trains="adapter",
            stores="adapter",
            peft_type="PROMPT_TUNING",
            adapter_config=_prompt_config,
        ),
        Method(
            name="lora",
            help="trains low-rank matrices beside the attention's weights; stores megabytes",
            learning_rate=3e-3,
            defaults=_COSINE,
            trains="adapter",
            stores="adapter",
            peft_type="LORA",
            adapter_config=_lora_config,
        ),
        Method(
            name="full",
            help="trains and stores every weight",
            learning_rate=1e-5,
            defaults={"lr_scheduler_type": "linear", "warmup_steps": 0.1},
            trains="model",
            stores="model",
            takes_quantized=False,
            dtype="float32",  # in 16 bits steps of this size are rounded away
            keeps_dropout=True,
        ),
        Method(
            name="linear_probe",
            help="trains a classification head on the frozen base model",
            learning_rate=3e-2,
            defaults=_COSINE,
            trains="head",
            stores="model",
            task_types=("SEQ_CLS",),
            default_task_type="SEQ_CLS",
            refusal="linear_probe trains a classification head: choose --task_type SEQ_CLS",
        ),
        Method(
            name="zero_shot",
            help="trains nothing: scores the base model as it is",
            trains="nothing",
            stores="nothing",
            task_types=("CAUSAL_LM", "SEQ_2_SEQ_LM"),
            refusal="zero_shot needs a language model, a new classification head has learnt nothing: choose "
            "--task_type CAUSAL_LM or SEQ_2_SEQ_LM",
        ),
    )
}
