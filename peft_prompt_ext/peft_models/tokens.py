"""Inputs and outputs per token, recognised by their shape: adding the prompt's columns, reordering, cutting.

Shapes: B rows, T text tokens, P virtual tokens, W = P + T columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .padding import reorder


# values of virtual tokens in arguments with a value, or a vector, for each token
VIRTUAL_TOKEN_VALUES = {"attention_mask": 1, "bbox": 0, "global_attention_mask": 0}
VIRTUAL_TOKEN_VALUES |= {"token_type_ids": 0, "mm_token_type_ids": 0}  # 0: first text; text, not image
# arguments with these prefixes are not per token, also if they are as long as the text
_OTHER_PREFIXES = (
    *("decoder_", "entity_", "pixel_", "image_", "video_", "audio_", "feature_", "input_features", "start_", "end_"),
    *("output_", "return_", "logits_to_keep", "num_items_in_batch"),
)
# arguments of kernels for rows that hold several texts
PACKED_ROW_INPUTS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


def check_mask(attention_mask: Any, rows: int, columns: int) -> None:
    """Raise ValueError unless a mask has one value for each text token, [B, T]."""
    if attention_mask is None or getattr(attention_mask, "shape", None) == (rows, columns):
        return
    shape = getattr(attention_mask, "shape", None)
    got = f"is {list(shape)}" if shape is not None else f"is a {type(attention_mask).__name__}"
    raise ValueError(
        f"attention_mask {got}; wanted {[rows, columns]}, one value for each text token: 1 for a real token, 0 for a "
        "pad. The model adds the prompt's columns. Pass no mask of more dimensions."
    )


def widen(
    arguments: dict[str, Any], fills: Mapping[str, int], of_rows: set[str], text: tuple[int, int], prompt: int
) -> dict[str, torch.Tensor]:
    """Add the values of virtual tokens to the arguments per token.

    Args:
        arguments: The base model's arguments; those per token are removed.
        fills: The value of a virtual token, by argument.
        of_rows: Arguments per row.
        text: B and T.
        prompt: P.

    Returns:
        The arguments per token, [B, P+T, ...].

    Raises:
        ValueError: A known argument is not as long as the text, an unknown one is, or rows hold several texts.
    """
    (rows, columns), names = text, list(arguments)
    wide = {}
    for name in names:
        value = arguments[name]
        if name in PACKED_ROW_INPUTS:
            raise ValueError(
                f"{name} is for rows that hold several texts, which need a packed batch. Pass position_ids that begin "
                "again at 0 with each text, or one text per row."
            )
        if name in fills and name not in of_rows:
            del arguments[name]
            if tuple(value.shape[:2]) != (rows, columns):
                raise ValueError(
                    f"{name} is {list(value.shape)}; wanted {[rows, columns]}, one for each text token. The model "
                    "adds the values of virtual tokens."
                )
            front = value.new_full((rows, prompt, *value.shape[2:]), fills[name])
            wide[name] = torch.cat([front, value], dim=1)
        elif name not in of_rows and _is_per_token(name, value, rows, columns):
            raise ValueError(
                f"{name} is {list(value.shape)}, as long as the text ({rows} rows of {columns} tokens), and has no "
                f"known value for the {prompt} virtual tokens. Leave it out, or run the base model without the prompt "
                "(disable_adapter())."
            )
    return wide


def _is_per_token(name: str, value: Any, rows: int, columns: int) -> bool:
    if not isinstance(value, torch.Tensor) or name.startswith(_OTHER_PREFIXES):
        return False
    shape = tuple(value.shape)
    if columns > 1 and (shape == (1, columns) or (shape == (columns,) and rows != columns)):
        return True  # the same for every row
    return (rows, columns) in (shape[:2], shape[1:3])


def shift_positions(
    position_ids: torch.Tensor, attention_mask: torch.Tensor | None, rows: int, prompt: int
) -> torch.Tensor:
    """Extend positions of the text [B, T] to the prompt, [B, P+T]; they keep their first number.

    Raises:
        ValueError: Positions do not count a row's real tokens one by one: several texts in a row, gaps, several axes.
    """
    if position_ids.dim() == 2:
        position_ids = position_ids.expand(rows, -1)
        real = torch.ones_like(position_ids) if attention_mask is None else (attention_mask != 0).to(position_ids)
        place = real.cumsum(1) - 1  # of each real token in its row
        first = (position_ids - place).masked_fill(real == 0, int(position_ids.max())).amin(1, keepdim=True)
        if not bool(((position_ids != first + place) & (real != 0)).any()):
            return torch.cat([first + torch.arange(prompt, device=first.device), position_ids + prompt], dim=1)
    raise ValueError(
        f"position_ids {list(position_ids.shape)} do not count each row's real tokens one by one. Pass one text per "
        "row, or leave position_ids out."
    )


def shift_column(column: torch.Tensor, prompt: int, order: torch.Tensor | None) -> torch.Tensor:
    """Shift a column of the text, one for each row, by the prompt; a column beyond the text stays beyond."""
    column = column.clamp(min=0) + prompt
    if order is None:
        return column
    inside = column < order.shape[1]
    moved = order.argsort(1).to(column.device).gather(1, column.where(inside, 0).view(len(order), -1))
    return moved.view_as(column).where(inside, column)


def put_back(output: Any, names: Iterable[str], order: torch.Tensor, predicts_next: bool = False) -> None:
    """Restore the caller's order of columns in an output.

    Fields per token have the shape [B, W, ...] or [B*W, ...]; attention weights [B, heads, W, W] or [B, heads, D, W];
    predictions of the next token, in a causal model, also [B, W-1, ...].

    Args:
        output: A mapping whose fields are tensors or tuples of tensors; changed in place.
        names: Fields that may be per token.
        order: The caller's column at each column of the base model, [B, W].
        predicts_next: Whether the base model is causal.
    """
    back = order.argsort(1)
    for name in list(names):
        output[name] = _put_back(output[name], back, "cross" in name, predicts_next)


def _put_back(value: Any, back: torch.Tensor, cross: bool, predicts_next: bool) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_put_back(x, back, cross, predicts_next) for x in value)
    if not isinstance(value, torch.Tensor) or value.dim() < 1:
        return value
    back, (rows, columns), shape = back.to(value.device), back.shape, tuple(value.shape)
    if len(shape) == 4 and shape[0] == rows and shape[3] == columns:  # weights over keys
        if shape[2] == columns and not cross:
            value = reorder(value.transpose(1, 2), back).transpose(1, 2)
        return reorder(value.transpose(1, 3), back).transpose(1, 3)
    if shape[:2] == (rows, columns):
        return reorder(value, back)
    if predicts_next and shape[:2] == (rows, columns - 1):
        of_column = torch.cat([torch.zeros_like(value[:, :1]), value], dim=1)  # nothing predicts the first one
        return reorder(of_column, back)[:, 1:]
    if shape[0] == rows * columns:
        return reorder(value.unflatten(0, (rows, columns)), back).flatten(0, 1)
    return value


def cut_prompt(
    output: Any,
    names: Iterable[str],
    text: Sequence[int],
    prompt: int,
    predicts_next: bool,
    kept: torch.Tensor | None = None,
) -> None:
    """Cut the virtual tokens off an output's fields, so that column t belongs to text token t.

    Args:
        output: A mapping whose fields are tensors [B, P+T, ...], or tuples of tensors; changed in place.
        names: Fields that may be per token.
        text: B and T.
        prompt: P.
        predicts_next: Whether fields [B, P+T-1] are predictions of the next token.
        kept: The column of each text token, [B, T]; by default the last ones.
    """
    rows, columns = text[0], prompt + text[1]

    def cut(value: Any, widths: set[int]) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(one, widths) for one in value)
        of_columns = isinstance(value, torch.Tensor) and value.dim() > 1 and len(value) == rows
        if not of_columns or value.shape[1] not in widths:
            return value
        return (
            value[:, prompt:] if kept is None else reorder(value, kept[:, : value.shape[1] - prompt].to(value.device))
        )

    for name in list(names):
        all_but_last = predicts_next and name not in {"logits", "hidden_states"}
        output[name] = cut(output[name], {columns, columns - all_but_last})
