"""PEFT's path: a padded batch with a prompt in front of each row, for every task and base model.

Shapes: B rows, T text tokens, P virtual tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cached_property
from inspect import signature
from typing import Any, ClassVar

import torch
from peft import PeftModel

from ..devices import device_of
from ..sizes import max_positions
from .pad_side import BEHIND, find_pad_side
from .padding import count_real, is_padded, pads_behind, real_first, real_last, reorder
from .position import is_suffix, order_columns
from .tokens import VIRTUAL_TOKEN_VALUES, check_mask, put_back, shift_column, shift_positions, widen


class PeftPathMixin(PeftModel):
    """The first base class of a model, before PEFT's class of the task, whose `forward` names the arguments."""

    pad_side: str | None = None  # where pads do not change results; None until the first mask
    _token_inputs: ClassVar[Mapping[str, int]] = VIRTUAL_TOKEN_VALUES
    _row_inputs: ClassVar[set[str]] = {"labels"}  # per row, also if their shape is that of tokens
    _row_outputs: ClassVar[set[str]] = {"pooler_output"}
    _column_inputs: ClassVar[tuple[str, ...]] = ()  # their values are columns of the text
    predicts_next: ClassVar[bool] = False  # whether a column's output predicts the next token

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See PEFT's class of the task.

        Raises:
            ValueError: The prompt and the text are too long, or an unknown argument is as long as the text.
        """
        inputs = self._name_arguments(args, kwargs)
        return self._run_prompted({name: value for name, value in inputs.items() if value is not None})

    def _name_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Give all arguments of `forward` the names that PEFT's class of the task has for them."""
        if not args:
            return kwargs
        stock: Any = next(kind for kind in type(self).__mro__ if kind.__module__.startswith("peft."))
        return {**dict(zip(list(signature(stock.forward).parameters)[1:], args, strict=False)), **kwargs}

    def _run_prompted(self, inputs: dict[str, Any]) -> Any:
        """Run the base model on the prompt and the text, without pads between them."""
        if "adapter_names" in inputs:
            raise ValueError(
                f"{type(self).__name__} takes no adapter_names. Select one adapter for all rows with set_adapter."
            )
        return_dict = inputs.pop("return_dict", None)
        tokens, others = self._prepend_prompt(inputs)
        mask = tokens.get("attention_mask")
        order = None if mask is None else self._find_order(mask)
        for name in filter(others.__contains__, self._column_inputs):
            others[name] = shift_column(others[name], self.active_peft_config.num_virtual_tokens, order)
        if order is None:
            options = {} if return_dict is None else {"return_dict": return_dict}
            return self._base_forward({**others, **tokens}, **options)
        tokens = {name: reorder(value, order.to(value.device)) for name, value in tokens.items()}
        if "position_ids" not in tokens and self._takes("position_ids"):
            if bool((tokens["attention_mask"][:, 0] == 0).any()):
                tokens["position_ids"] = count_real(tokens["attention_mask"])
        output = self._base_forward({**others, **tokens}, return_dict=True)
        put_back(output, filter(self._is_per_token, output), order, self.predicts_next)
        return output if self._wants_dict(return_dict) else output.to_tuple()

    def _base_forward(self, inputs: dict[str, Any], **options: Any) -> Any:
        return self.get_base_model()(**inputs, **options)

    def _prepend_prompt(self, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Add the prompt to the inputs per token. Returns those, [B, P+T, ...], and the other inputs."""
        start = inputs.pop("answer_start", None)
        if start is not None and not is_suffix(self.active_peft_config):
            raise ValueError("answer_start is for a prompt behind the text (prompt_position='suffix'). Leave it out.")
        ids, text = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
        if ids is None and text is None:
            raise ValueError("The model got neither input_ids nor inputs_embeds. Pass one of them.")
        rows, columns = (ids if text is None else text).shape[:2]
        self._check_length(columns)
        mask, prompt = inputs.get("attention_mask"), self.active_peft_config.num_virtual_tokens
        check_mask(mask, rows, columns)
        positions = inputs.pop("position_ids", None)
        inputs.pop("task_ids", None)  # for other prompt methods
        self._drop_unused(inputs)
        tokens = widen(inputs, self._token_inputs, self._row_inputs, (rows, columns), prompt)
        if positions is not None:
            positions = shift_positions(positions, mask, rows, prompt)
            if start is not None and bool((positions[:, 0] != 0).any()):
                raise ValueError("With prompt_position='suffix', position_ids have to count real tokens from 0.")
            if start is None and self._takes("position_ids"):
                tokens["position_ids"] = positions
        text = self.word_embeddings(ids) if text is None else text  # type: ignore[misc]
        virtual = self.get_prompt(batch_size=rows).to(text.device, text.dtype)
        tokens["inputs_embeds"] = torch.cat([virtual, text], dim=1)
        if start is not None:
            order = order_columns(start, columns, prompt)
            tokens = {name: reorder(value, order.to(value.device)) for name, value in tokens.items()}
        return tokens, inputs

    def _drop_unused(self, inputs: dict[str, Any]) -> None:
        """Drop outputs of a tokenizer that the base model does not read."""
        if "token_type_ids" in inputs and not self._takes("token_type_ids"):
            warnings.warn("The base model has no token types; token_type_ids are ignored.", stacklevel=2)
            del inputs["token_type_ids"]
        if "attention_mask" in inputs and not self._takes("attention_mask"):
            if is_padded(inputs.pop("attention_mask")):
                raise ValueError(
                    f"attention_mask has pads, and {type(self.get_base_model()).__name__} takes no mask, so tokens "
                    "see pads. Make batches of texts of one length, or leave the mask out to accept that."
                )

    @property
    def device(self) -> torch.device:
        """The device that the base model computes on, also if it is offloaded."""
        base_model: Any = self.base_model
        device: torch.device = base_model.device
        words = getattr(self, "word_embeddings", None)
        return device if device.type != "meta" or words is None else device_of(words)

    def _takes(self, name: str) -> bool:
        """Whether the base model takes an argument; a wrapper's `*args, **kwargs` takes all."""
        return name in self._base_arguments or "input_ids" not in self._base_arguments

    @cached_property
    def _base_arguments(self) -> set[str]:
        return set(signature(self.get_base_model().forward).parameters)

    def _find_order(self, mask: torch.Tensor) -> torch.Tensor | None:
        """Find the order of columns for the base model, from a mask [B, P+T]; None: no change."""
        side = self._find_pad_side()  # for every mask, so that all processes gather sharded weights together
        if not is_padded(mask) or (side == BEHIND and pads_behind(mask)):
            return None
        return real_first(mask) if side == BEHIND else real_last(mask)

    def _find_pad_side(self) -> str:
        if self.pad_side is None:
            self.pad_side = BEHIND  # find_pad_side runs this model
            if not torch.compiler.is_compiling():
                self.pad_side = find_pad_side(self)
        return self.pad_side

    def _is_per_token(self, name: str) -> bool:
        """Whether an output's field may have a value for each token of the text."""
        return name not in self._row_outputs

    def _wants_dict(self, return_dict: bool | None) -> bool:
        return return_dict if return_dict is not None else getattr(self.config, "return_dict", True)

    def _check_length(self, text_tokens: int, virtual_tokens: int | None = None) -> None:
        limit = self._max_positions
        prompt = virtual_tokens if virtual_tokens is not None else self.active_peft_config.num_virtual_tokens
        if limit is not None and prompt + text_tokens > limit:
            raise ValueError(
                f"{prompt} virtual tokens and {text_tokens} text tokens are {prompt + text_tokens} tokens; the base "
                f"model has {limit} positions. Truncate the text to {max(limit - prompt, 0)} tokens or lower "
                "num_virtual_tokens."
            )

    @cached_property
    def _max_positions(self) -> int | None:
        return max_positions(self.get_base_model())
