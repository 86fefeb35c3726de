"""A text behind its prompt, through the base model as PEFT runs it: any task, any base model, every row padded.

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
from .tokens import OF_VIRTUAL_TOKENS, check_mask, column_behind, positions_behind, put_back, widen


class PeftPathMixin(PeftModel):
    """Goes in front of PEFT's model class of a task, whose `forward` tells the order of the arguments."""

    pad_side: str | None = None  # where the base model does not see pads; None until it is asked for
    _token_inputs: ClassVar[Mapping[str, int]] = OF_VIRTUAL_TOKENS
    _row_inputs: ClassVar[set[str]] = {"labels"}  # not of each token, whatever their shape
    _row_outputs: ClassVar[set[str]] = {"pooler_output"}
    _column_inputs: ClassVar[tuple[str, ...]] = ()  # each names a column of the text
    predicts_next: ClassVar[bool] = False  # whether a column's output is of the next column's token

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See PEFT's class of the task.

        Raises:
            ValueError: The text has no room behind the prompt, or nobody knows what the prompt has of an argument that
                is as long as the text.
        """
        inputs = self._by_name(args, kwargs)
        return self._prompted_forward({name: value for name, value in inputs.items() if value is not None})

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of `forward` by the names that PEFT's class of the task gives them."""
        if not args:
            return kwargs
        stock: Any = next(kind for kind in type(self).__mro__ if kind.__module__.startswith("peft."))
        return {**dict(zip(list(signature(stock.forward).parameters)[1:], args, strict=False)), **kwargs}

    def _prompted_forward(self, inputs: dict[str, Any]) -> Any:
        """Run the base model on the prompt and the text behind it; no pad stands between them."""
        if "adapter_names" in inputs:
            raise ValueError(f"{type(self).__name__} takes no adapter_names: set_adapter chooses one for all rows.")
        return_dict = inputs.pop("return_dict", None)
        tokens, others = self._behind_prompt(inputs)
        mask = tokens.get("attention_mask")
        order = None if mask is None else self._order(mask)
        for name in filter(others.__contains__, self._column_inputs):
            others[name] = column_behind(others[name], self.active_peft_config.num_virtual_tokens, order)
        if order is None:
            asked = {} if return_dict is None else {"return_dict": return_dict}
            return self._base_forward({**others, **tokens}, **asked)
        tokens = {name: reorder(value, order.to(value.device)) for name, value in tokens.items()}
        if "position_ids" not in tokens and self._takes("position_ids"):
            if bool((tokens["attention_mask"][:, 0] == 0).any()):
                tokens["position_ids"] = count_real(tokens["attention_mask"])
        output = self._base_forward({**others, **tokens}, return_dict=True)
        put_back(output, filter(self._is_of_tokens, output), order, self.predicts_next)
        return output if self._wants_dict(return_dict) else output.to_tuple()

    def _base_forward(self, inputs: dict[str, Any], **options: Any) -> Any:
        return self.get_base_model()(**inputs, **options)

    def _behind_prompt(self, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Inputs of each token, [B, P+T, ...], and the others."""
        ids, text = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
        if ids is None and text is None:
            raise ValueError("The model got neither input_ids nor inputs_embeds: it needs a text.")
        rows, columns = (ids if text is None else text).shape[:2]
        self._check_length(columns)
        mask, prompt = inputs.get("attention_mask"), self.active_peft_config.num_virtual_tokens
        check_mask(mask, rows, columns)
        positions = inputs.pop("position_ids", None)
        inputs.pop("task_ids", None)  # of other prompt methods
        self._drop_unused(inputs)
        tokens = widen(inputs, self._token_inputs, self._row_inputs, (rows, columns), prompt)
        if positions is not None:
            positions = positions_behind(positions, mask, rows, prompt)
            if self._takes("position_ids"):
                tokens["position_ids"] = positions
        text = self.word_embeddings(ids) if text is None else text  # type: ignore[misc]
        virtual = self.get_prompt(batch_size=rows).to(text.device, text.dtype)
        tokens["inputs_embeds"] = torch.cat([virtual, text], dim=1)
        return tokens, inputs

    def _drop_unused(self, inputs: dict[str, Any]) -> None:
        """Drop what a tokenizer gives and the base model does not read."""
        if "token_type_ids" in inputs and not self._takes("token_type_ids"):
            warnings.warn("The base model has no token types: token_type_ids are left out.", stacklevel=2)
            del inputs["token_type_ids"]
        if "attention_mask" in inputs and not self._takes("attention_mask"):
            if is_padded(inputs.pop("attention_mask")):
                raise ValueError(
                    f"attention_mask has pads, and {type(self.get_base_model()).__name__} takes no mask: its tokens "
                    "see every pad. Make batches of texts of one length, or leave the mask out and have pads read."
                )

    @property
    def device(self) -> torch.device:
        """Where the base model computes; what is new beside an offloaded one goes there."""
        base_model: Any = self.base_model
        device: torch.device = base_model.device
        words = getattr(self, "word_embeddings", None)
        return device if device.type != "meta" or words is None else device_of(words)

    def _takes(self, name: str) -> bool:
        """Whether the base model reads an argument; one that names none (a wrapper's `*args, **kwargs`) reads all."""
        return name in self._base_arguments or "input_ids" not in self._base_arguments

    @cached_property
    def _base_arguments(self) -> set[str]:
        return set(signature(self.get_base_model().forward).parameters)

    def _order(self, mask: torch.Tensor) -> torch.Tensor | None:
        """Columns of the mask [B, P+T] as the base model should see them; None: as they are."""
        side = self._find_pad_side()  # with the first mask: where weights are gathered, on every process at once
        if not is_padded(mask) or (side == BEHIND and pads_behind(mask)):
            return None
        return real_first(mask) if side == BEHIND else real_last(mask)

    def _find_pad_side(self) -> str:
        if self.pad_side is None:
            self.pad_side = BEHIND  # while it is found
            if not torch.compiler.is_compiling():
                self.pad_side = find_pad_side(self)
        return self.pad_side

    def _is_of_tokens(self, name: str) -> bool:
        """Whether an output's field may have something for each token of the text."""
        return name not in self._row_outputs

    def _wants_dict(self, return_dict: bool | None) -> bool:
        return return_dict if return_dict is not None else getattr(self.config, "return_dict", True)

    def _check_length(self, text_tokens: int, virtual_tokens: int | None = None) -> None:
        limit = self._max_positions
        prompt = virtual_tokens if virtual_tokens is not None else self.active_peft_config.num_virtual_tokens
        if limit is not None and prompt + text_tokens > limit:
            raise ValueError(
                f"{prompt} virtual tokens and {text_tokens} text tokens make {prompt + text_tokens}; the base model "
                f"has {limit} positions. Truncate the text to {max(limit - prompt, 0)} tokens or lower "
                "num_virtual_tokens."
            )

    @cached_property
    def _max_positions(self) -> int | None:
        return max_positions(self.get_base_model())
