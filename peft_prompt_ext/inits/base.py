"""The registry of initialisation schemes, and the context that a scheme gets.

Shapes: P virtual tokens, H hidden size of the word embeddings (`token_dim`), n any number of tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.integrations import gather_params_ctx

from .._choices import nearest
from ..devices import device_of


if TYPE_CHECKING:
    from peft import PromptTuningConfig
    from transformers import PreTrainedTokenizerBase


Scheme = Callable[..., torch.Tensor]
Check = Callable[..., None]
TextCheck = Callable[..., None]
Plain = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class InitContext:
    """The input of an initialisation scheme.

    Attributes:
        config: The adapter's config; its kwargs are valid.
        word_embeddings: The base model's embedding module; maps ids [n] to rows [n, H].
        generator: The only source of randomness that a scheme may use. It is on the CPU, so that a seed gives the
            same bits on every machine.
        record: The scheme writes its ids, texts and sources here; saved in `prompt_init.json`.
    """

    config: PromptTuningConfig
    word_embeddings: torch.nn.Module
    generator: torch.Generator
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        return self.config.num_virtual_tokens

    @property
    def token_dim(self) -> int:
        """H."""
        return self.config.token_dim

    @property
    def num_embeddings(self) -> int:
        """Rows of the embedding table; may be more than the tokenizer's tokens."""
        return int(self.word_embeddings.num_embeddings)  # type: ignore[arg-type]

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Look up rows through the embedding module, which may scale them (Gemma) or shard them (ZeRO-3).

        Args:
            token_ids: n ids.

        Returns:
            Rows [n, H], float32, on the CPU, without gradient.

        Raises:
            ValueError: The module is on the meta device.
        """
        ids = torch.tensor(list(token_ids), dtype=torch.long, device=device_of(self.word_embeddings))
        with torch.no_grad(), gather_params_ctx(self.word_embeddings.parameters()):
            rows = self.word_embeddings(ids)
        if rows.is_meta:
            raise ValueError(
                "The word embeddings have no data (device meta). Load the model's weights before get_peft_model."
            )
        return rows.detach().to(device="cpu", dtype=torch.float32)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that the config names, else the base model's own; None if there is none.

        Raises:
            ValueError: `tokenizer_name_or_path` cannot be loaded, or has ids beyond the embedding table.
        """
        from transformers import AutoTokenizer

        named = self.config.tokenizer_name_or_path
        name = named or self.config.base_model_name_or_path
        if not name:
            return None
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **(self.config.tokenizer_kwargs or {}))
        except Exception as error:  # AutoTokenizer raises many types if there is no tokenizer
            if named:
                raise ValueError(
                    f"tokenizer_name_or_path ({named!r}) could not be loaded: {error}. Give the folder or Hub name of "
                    "the base model's tokenizer."
                ) from error
            return None
        self._check_vocabulary(name, tokenizer)
        self.record["tokenizer"] = name
        return tokenizer

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer.

        Raises:
            ValueError: There is none.
        """
        if self.tokenizer is None:
            raise ValueError(
                f"prompt_tuning_init={self.config.prompt_tuning_init!r} needs a tokenizer, but the base model "
                f"({self.config.base_model_name_or_path!r}) has none. Set tokenizer_name_or_path."
            )
        return self.tokenizer

    def tokenize(self, text: str) -> list[int]:
        """Tokenize `text` without BOS, EOS or other special tokens.

        Raises:
            ValueError: There is no tokenizer, or the embedding table has no row for an added token in the text.
        """
        ids = self.require_tokenizer()(text, add_special_tokens=False)["input_ids"]
        if max(ids, default=0) >= self.num_embeddings:
            raise ValueError(
                f"{text!r} has the token id {max(ids)}; the embedding table has {self.num_embeddings} rows. Call "
                "model.resize_token_embeddings(len(tokenizer)) for added tokens, or use other words."
            )
        return ids

    def run(self, name: str, kwargs: Mapping[str, Any] | None = None) -> torch.Tensor:
        """Run another scheme, to fill the slots that a scheme does not. Returns [P, H]."""
        return SCHEMES[name.upper()].function(self, **(kwargs or {}))

    def _check_vocabulary(self, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder
        largest = max((i for i in tokenizer.get_vocab().values() if i not in added), default=-1)
        if largest >= self.num_embeddings:
            raise ValueError(
                f"The tokenizer ({name!r}) does not belong to the model: the tokenizer has ids up to {largest}, the "
                f"embedding table has {self.num_embeddings} rows. Set tokenizer_name_or_path to the model's own "
                "tokenizer."
            )


@dataclass(frozen=True)
class InitScheme:
    """One entry of the registry; see [`register_init`]."""

    function: Scheme
    check: Check | None = None
    check_text: TextCheck | None = None
    plain: Plain | None = None

    def to_plain(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Turn arguments into values that JSON can hold and that can be read twice; an iterator becomes a list.

        Raises:
            ValueError: An argument has a form that the scheme cannot read.
        """
        if self.plain is not None:
            return self.plain(kwargs)
        names = {key: getattr(value, "names", value) for key, value in kwargs.items()}  # of a datasets.ClassLabel
        return {key: list(value) if isinstance(value, Iterator) else value for key, value in names.items()}

    def validate(self, name: str, num_virtual_tokens: int, kwargs: Mapping[str, Any]) -> None:
        """Check kwargs against the function's signature, then against the scheme's own rules.

        Raises:
            ValueError: An unknown, missing or wrong argument.
        """
        known = self._defaults()
        for key in kwargs:
            if key not in known:
                raise ValueError(
                    f"prompt_tuning_init_kwargs: {name} has no argument {key!r}{nearest(str(key), known)}. "
                    f"Its arguments: {', '.join(known) or 'none'}."
                )
        missing = [key for key, default in known.items() if default is inspect.Parameter.empty and key not in kwargs]
        if missing:
            raise ValueError(
                f"prompt_tuning_init_kwargs: {name} needs {', '.join(map(repr, missing))}, got {list(kwargs)}. "
                f"Write prompt_tuning_init_kwargs={{{missing[0]!r}: ...}}."
            )
        if self.check is not None:
            self.check(num_virtual_tokens, **{**known, **kwargs})

    def validate_text(self, text: str | None, kwargs: Mapping[str, Any]) -> None:
        """Check the config's `prompt_tuning_init_text`, where the scheme reads it; kwargs are valid already.

        Raises:
            ValueError: The scheme needs a text, and there is none.
        """
        values = {**self._defaults(), **kwargs}
        fallback = SCHEMES.get(str(values.get("fallback")).upper())
        if self.check_text is not None:
            self.check_text(text, **values)
        elif fallback is not None and fallback.check_text is not None:
            fallback.check_text(text)

    def _defaults(self) -> dict[str, Any]:
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


SCHEMES: dict[str, InitScheme] = {}


def register_init(
    name: str, *, check: Check | None = None, check_text: TextCheck | None = None, plain: Plain | None = None
) -> Callable[[Scheme], Scheme]:
    """Register an initialisation scheme under a name that `prompt_tuning_init` then accepts.

    A scheme is a function `(ctx, *, keyword_only_arguments) -> Tensor [P, H]`. `prompt_tuning_init_kwargs` gives its
    keyword-only arguments.

    Args:
        name: Name in PEFT's UPPER_SNAKE form; stored upper.
        check: Optional function `(num_virtual_tokens, **kwargs) -> None` that raises `ValueError` on bad values; it
            gets every argument, defaults included, when the config is built and before any weight is loaded.
        check_text: Optional function `(prompt_tuning_init_text, **kwargs) -> None`, for a scheme that reads that text.
        plain: Optional function of the kwargs that returns them as plain values, for an argument such as an iterator.

    Returns:
        A decorator that returns the function unchanged.

    Raises:
        ValueError: The name is registered already.

    Example:
        >>> @register_init("ZEROS")
        ... def zeros(ctx):
        ...     return torch.zeros(ctx.num_virtual_tokens, ctx.token_dim)
    """

    def decorate(function: Scheme) -> Scheme:
        taken = SCHEMES.get(name.upper())
        if taken is not None:
            origin, other = (f"{f.__module__}.{f.__qualname__}" for f in (taken.function, function))
            raise ValueError(
                f"The init {name.upper()!r} is registered already by {origin}; {other} needs another name."
            )
        SCHEMES[name.upper()] = InitScheme(function, check, check_text, plain)
        return function

    return decorate


def available_inits() -> list[str]:
    """List the names that `prompt_tuning_init` accepts, sorted."""
    return sorted(SCHEMES)


def get_scheme(name: str) -> InitScheme:
    """Look up a scheme by name, in upper or lower case.

    Raises:
        ValueError: The name is unknown.
    """
    scheme = SCHEMES.get(name.upper())
    if scheme is None:
        raise ValueError(
            f"prompt_tuning_init ({name!r}) is not known{nearest(name.upper(), available_inits())}. "
            f"Available: {', '.join(available_inits())}."
        )
    return scheme
