"""PromptTuningExtConfig: PEFT's PromptTuningConfig with the plugin's fields, and the checks that need no model."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from peft import PeftType, PromptTuningConfig, TaskType

from . import prompt_record
from ._choices import check_choice
from .inits import get_scheme
from .saved_position import write_task


POSITIONS = ("prefix", "suffix")
SUFFIX_TASKS = ("CAUSAL_LM", "SEQ_CLS")
TEXT_CACHES = ("none", "memory", "disk")


@dataclass
class PromptTuningExtConfig(PromptTuningConfig):
    """
    The configuration of prompt tuning with this plugin; pass it to `peft.get_peft_model`.

    Args:
        num_virtual_tokens (`int`, defaults to 20):
            The number of virtual tokens. Lester et al. 2021 (section 3.2) find only marginal gains over 20.
        task_type (Union[[`~peft.utils.config.TaskType`], `str`]):
            The type of task. Required.
        prompt_tuning_init (`str`, defaults to `"SAMPLE_VOCAB"`):
            The initialisation scheme: a name from `peft_prompt_ext.available_inits()`, in upper or lower case.
        prompt_tuning_init_kwargs (`dict`, *optional*):
            The scheme's arguments; checked against its signature.
        prompt_tuning_init_seed (`int`, defaults to 0):
            The seed of the initialisation; independent of the global random state.
        prompt_tuning_init_text (`str`, *optional*):
            The text for `TEXT`, used alone or as a fallback.
        shared_prefix (`bool`, defaults to `True`):
            Run a batch as one packed sequence, the prompt once for all rows and no pads, where the base model allows
            it (see `peft_prompt_ext.engine_status(model)`). The results are the same.
        shared_prefix_probe (`bool`, defaults to `True`):
            Before the first packed batch, compare a small one with the base model's own results. If they differ, use
            PEFT's path.
        train_logits (`str`, defaults to `"all"`):
            `"all"`: logits [B, P+T, V], as in PEFT. `"supervised"`: in training, the head runs only where a label is
            predicted; `logits` are [1, L, V], in the order of the L labels. The loss is the same. Only packed batches
            of a causal language model with `labels` have fewer logits; a Trainer with label smoothing or a
            `compute_loss_func` passes no labels. A training step of `transformers.Trainer` that reads the loss alone
            runs the head there with either value.
        prompt_position (`str`, defaults to `"prefix"`):
            `"prefix"`: the prompt stands in front of the text, as in PEFT. `"suffix"`: it stands behind the text and
            in front of the answer, `[text | prompt | answer]`. The text then runs without gradients, and its keys and
            values may be kept. The answer begins at a row's first label; a call that has none takes `answer_start`
            ([B], the column of each row's first answer token). Only for decoders.
        text_cache (`str`, defaults to `"memory"`):
            With `"suffix"`, where keys and values of texts are kept between batches: `"none"`, `"memory"` or `"disk"`.
            Texts run in evaluation mode (a kept text cannot have new dropout in each epoch), unless they need
            gradients, or a row of the batch has its prompt in front or has no text.
        text_cache_bytes (`int`, *optional*):
            The most bytes to keep; by default a quarter of the free memory (or disk). Texts beyond it run again.
        text_cache_dir (`str`, *optional*):
            The folder for `"disk"`; by default one in the user's cache folder. It holds what the texts say, so only
            the user can read it. Clear it with `peft_prompt_ext.clear_text_cache()`.
        virtual_columns (`bool`, defaults to `True`):
            `True`: outputs per token include the virtual tokens, [B, P+T, ...], as in PEFT. `False`: they are those of
            the text, [B, T, ...], as in the base model, and `logits_to_keep` counts the same columns. Attention
            weights always have all columns.
        tokenizer_name_or_path (`str`, *optional*):
            The tokenizer that schemes use; by default the base model's own.
        tokenizer_kwargs (`dict`, *optional*):
            Keyword arguments for `AutoTokenizer.from_pretrained`. `trust_remote_code` is refused.

    Raises:
        ValueError: A value that cannot work.

    Example:
    ```py
    >>> from peft import get_peft_model
    >>> from peft_prompt_ext import PromptTuningExtConfig

    >>> config = PromptTuningExtConfig(
    ...     task_type="CAUSAL_LM",
    ...     prompt_tuning_init="CLASS_LABELS",
    ...     prompt_tuning_init_kwargs={"labels": [" negative", " positive"]},
    ... )
    >>> model = get_peft_model(model, config)
    ```
    """

    num_virtual_tokens: int = field(default=20, metadata={"help": "Number of virtual tokens"})
    prompt_tuning_init: str = field(
        default="SAMPLE_VOCAB",
        metadata={"help": "The initialization scheme of the prompt: a name from peft_prompt_ext.available_inits()"},
    )
    prompt_tuning_init_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "The arguments of the initialization scheme"}
    )
    prompt_tuning_init_seed: int = field(
        default=0, metadata={"help": "The seed of the initialization; independent of the global random state"}
    )
    shared_prefix: bool = field(
        default=True, metadata={"help": "Run a batch as one packed sequence that holds the prompt once"}
    )
    shared_prefix_probe: bool = field(
        default=True, metadata={"help": "Check packing on a small batch before the first packed batch"}
    )
    train_logits: str = field(
        default="all", metadata={"help": "Positions where the head runs in training: 'all' or 'supervised'"}
    )

    prompt_position: str = field(
        default="prefix", metadata={"help": "Where the prompt stands: 'prefix' or 'suffix' of the text"}
    )
    text_cache: str = field(
        default="memory", metadata={"help": "With a suffix, where texts are kept: 'none', 'memory' or 'disk'"}
    )
    text_cache_bytes: int | None = field(default=None, metadata={"help": "The most bytes of kept texts"})
    text_cache_dir: str | None = field(default=None, metadata={"help": "The folder of texts that are kept on disk"})
    virtual_columns: bool = field(
        default=True, metadata={"help": "Whether outputs per token include the virtual tokens"}
    )

    def __post_init__(self) -> None:
        # PromptTuningConfig's own checks require a tokenizer name for TEXT, where the base model's is the default
        # here, and refuse tokenizer_kwargs for every other scheme.
        super(PromptTuningConfig, self).__post_init__()
        # What the scheme chose (None: not known), and which word embeddings the prompt is for (`inits.fingerprint`).
        # They are no dataclass fields: PEFT writes every field into adapter_config.json.
        self.init_record: dict[str, Any] | None = {}
        self.base_fingerprint: dict[str, Any] | None = None
        self.peft_type = PeftType.PROMPT_TUNING
        self._check_sizes()
        self._check_tokenizer_kwargs()
        self.check_init()
        self._check_engine()
        if self.num_transformer_submodules is None:
            # PEFT would make two prompts for an encoder-decoder and read only the first
            self.num_transformer_submodules = 1

    def _check_sizes(self) -> None:
        if self.task_type is None:
            raise ValueError(f"task_type is required, got None. Set one of: {', '.join(TaskType)}.")
        for name, least in (("num_virtual_tokens", 1), ("prompt_tuning_init_seed", 0)):
            value = getattr(self, name)
            # 2**63 - 1 is the largest seed of a torch.Generator
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
                raise ValueError(f"{name} ({value!r}) must be a whole number, {least} or more, below 2**63.")

    def _check_tokenizer_kwargs(self) -> None:
        kwargs = self.tokenizer_kwargs
        if kwargs is not None and not isinstance(kwargs, dict):
            raise ValueError(f"tokenizer_kwargs must be a dict, got {type(kwargs).__name__} ({kwargs!r}).")
        if kwargs and kwargs.get("trust_remote_code"):
            raise ValueError(
                "tokenizer_kwargs has trust_remote_code=True, but an adapter's config must not run code. Save the "
                "tokenizer to a folder yourself and set tokenizer_name_or_path to that folder."
            )

    def check_init(self) -> None:
        """Raise ValueError unless the scheme is known and its arguments are valid."""
        init = self.prompt_tuning_init
        self.prompt_tuning_init = str(init.value if isinstance(init, Enum) else init).upper()
        scheme = get_scheme(self.prompt_tuning_init)
        kwargs = self.prompt_tuning_init_kwargs
        if kwargs is not None and not isinstance(kwargs, dict):
            raise ValueError(f"prompt_tuning_init_kwargs must be a dict, got {type(kwargs).__name__} ({kwargs!r}).")
        if kwargs:
            kwargs = self.prompt_tuning_init_kwargs = scheme.to_plain(kwargs)
        scheme.validate(self.prompt_tuning_init, self.num_virtual_tokens, kwargs or {})
        scheme.validate_text(self.prompt_tuning_init_text, kwargs or {})

    def _check_engine(self) -> None:
        for name in ("shared_prefix", "shared_prefix_probe", "virtual_columns"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be True or False.")
        if self.train_logits not in ("all", "supervised"):
            raise ValueError(f"train_logits ({self.train_logits!r}) must be 'all' or 'supervised'.")
        check_choice("prompt_position", self.prompt_position, POSITIONS)
        check_choice("text_cache", self.text_cache, TEXT_CACHES)
        most = self.text_cache_bytes
        if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
            raise ValueError(f"text_cache_bytes ({most!r}) must be a whole number of bytes, 1 or more.")
        if self.prompt_position == "suffix" and self.task_type not in SUFFIX_TASKS:
            raise ValueError(
                f"prompt_position='suffix' needs a decoder: task_type {' or '.join(SUFFIX_TASKS)}, got "
                f"{str(getattr(self.task_type, 'value', self.task_type))!r}. Use prompt_position='prefix'."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of stock PEFT, so that an adapter loads without this plugin.

        With `prompt_position="suffix"` it must not, so the task type is a sentence that stock PEFT prints and refuses.
        """
        stock = {f.name: getattr(self, f.name) for f in fields(PromptTuningConfig)}
        if self.prompt_tuning_init == "TEXT":
            # PromptTuningConfig refuses TEXT without a tokenizer name
            stock["tokenizer_name_or_path"] = self.tokenizer_name_or_path or self.base_model_name_or_path
            if not stock["tokenizer_name_or_path"]:
                stock["prompt_tuning_init"] = "RANDOM"
        if stock["prompt_tuning_init"] != "TEXT":
            stock["tokenizer_kwargs"] = None  # PromptTuningConfig refuses it for any other scheme
        if self.prompt_position == "suffix":
            stock["task_type"] = write_task(self.task_type)
        return stock

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the fields of stock PEFT to `adapter_config.json` and those of the plugin to `prompt_init.json`.

        A prompt that stock PEFT made has no `prompt_init.json`.
        """
        super().save_pretrained(str(save_directory), **kwargs)
        if self.init_record is not None:
            prompt_record.write(save_directory, self)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> PromptTuningExtConfig:
        """Read the config of a saved prompt-tuning adapter, and its record if it has one.

        Args:
            pretrained_model_name_or_path: Folder or Hub id of an adapter saved by this plugin or by stock PEFT.
            subfolder: Folder inside it.
            **kwargs: Passed to `huggingface_hub.hf_hub_download`.

        Raises:
            ValueError: The adapter has no config, it is not a prompt-tuning adapter, or its record is another
                adapter's.
        """
        name = str(pretrained_model_name_or_path)
        stock = PromptTuningConfig.from_pretrained(name, subfolder=subfolder, **kwargs)
        if stock.peft_type != PeftType.PROMPT_TUNING:
            raise ValueError(f"{name!r} is a {PeftType(stock.peft_type).value} adapter, not PROMPT_TUNING.")
        record = prompt_record.read(name, subfolder=subfolder, **kwargs)
        _check_position(name, _position_of(stock), record)
        return cls.from_stock(stock, record)

    @classmethod
    def from_stock(cls, stock: PromptTuningConfig, record: dict[str, Any] | None) -> PromptTuningExtConfig:
        """Build the config of a saved adapter from PEFT's config and the plugin's record.

        The record says how the prompt was initialised. It is kept as it is and not checked again: a label list or a
        source folder may be gone, and nothing is initialised a second time.
        """
        config = cls(task_type=stock.task_type or TaskType.CAUSAL_LM, num_virtual_tokens=stock.num_virtual_tokens)
        for f in fields(PromptTuningConfig):
            setattr(config, f.name, getattr(stock, f.name))
        config.prompt_position = _position_of(stock)
        config.prompt_tuning_init = str(getattr(stock.prompt_tuning_init, "value", stock.prompt_tuning_init))
        for name in prompt_record.FIELDS:
            if record and name in record:
                setattr(config, name, record[name])
        config.init_record = record
        config.base_fingerprint = (record or {}).get("base_model")
        return config


def _position_of(config: PromptTuningConfig) -> str:
    return getattr(config, "prompt_position", "prefix")  # PEFT's own config has no such field


def _check_position(name: str, position: str, record: dict[str, Any] | None) -> None:
    """Raise ValueError if the record and the config of a saved adapter name two positions."""
    recorded = (record or {}).get("prompt_position", position)
    if recorded != position:
        raise ValueError(
            f"{name!r} has the files of two adapters: adapter_config.json is of a {position} of the text, "
            f"{prompt_record.FILE_NAME} of a {recorded}. Save the adapter again, or delete {prompt_record.FILE_NAME}, "
            "which says how the prompt was initialised."
        )
