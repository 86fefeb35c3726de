"""Where a prompt stands in a row: in front of the text, or behind it and in front of the answer.

`start` [B] is the number of the row's columns in front of the prompt: 0 for a prefix. Outputs have the order
`[columns in front | prompt | other columns]`.

Shapes: B rows, T text tokens, P virtual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..labels import IGNORE_INDEX
from .tokens import check_mask


def is_suffix(config: Any) -> bool:
    """Whether a config's prompt stands behind the text; a stock config has no such field."""
    return getattr(config, "prompt_position", "prefix") == "suffix"


def check_decoder(base_model: Any, config: Any) -> None:
    """Raise ValueError if a suffix is for a base model whose text would see it."""
    if not is_suffix(config):
        return
    text_config = base_model.config.get_text_config(decoder=True)
    names = ("is_encoder_decoder", "bidirectional", "use_bidirectional_attention")
    sees_behind = any(getattr(text_config, name, False) for name in names) or any(
        getattr(module, "is_causal", True) is False for module in base_model.modules()
    )
    if sees_behind or (str(config.task_type) == "SEQ_CLS" and not hasattr(base_model, "score")):
        raise ValueError(
            f"prompt_position='suffix' needs a decoder, whose text does not see what is behind it, got "
            f"{type(base_model).__name__}. Use prompt_position='prefix'."
        )


def find_start(
    mask: torch.Tensor, labels: torch.Tensor | None, answer_start: torch.Tensor | None, behind: torch.Tensor
) -> torch.Tensor:
    """Find where the prompt of each row stands. All tensors are on the host.

    Args:
        mask: [B, T], nonzero at real tokens.
        labels: [B, T]: the answer begins at a row's first label.
        answer_start: [B], the column of each row's first answer token, used instead of labels; T or more: no answer.
        behind: Whether the row's prompt is a suffix, [B].

    Returns:
        [B]: 0 for a prefix; the first column of the answer; without one, the column behind the last real token.

    Raises:
        ValueError: No text stands in front of an answer, or a label is in front of `answer_start`.
    """
    real = mask != 0
    rows, columns = real.shape
    column = torch.arange(columns)
    none = torch.full((rows,), columns)
    end = torch.where(real, column + 1, 0).amax(1) if columns else none
    labelled = none
    if labels is not None:
        labelled = torch.where((labels != IGNORE_INDEX) & real, column, columns).amin(1)
    start = labelled if answer_start is None else answer_start.clamp(max=columns)
    late = (labelled < start) & behind
    if bool(late.any()):
        row = int(late.nonzero()[0])
        raise ValueError(
            f"answer_start is {int(start[row])} in row {row}, and the row has a label at column {int(labelled[row])}. "
            "The answer has to begin at the first label or in front of it."
        )
    has_answer = start < end
    start = torch.where(has_answer, start, end)
    text = (real & (column < start[:, None])).any(1)
    empty = ~text & behind & has_answer
    if bool(empty.any()):
        row = int(empty.nonzero()[0])
        raise ValueError(
            f"Row {row} has no text in front of its answer, which begins at column {int(start[row])}, so a prompt "
            "behind the text (prompt_position='suffix') has none to read. Set the labels of the text to -100, as for "
            "prompt-completion data, and truncate the text rather than to nothing."
        )
    return torch.where(behind, start, 0)


@torch.compiler.disable  # reads values, where a trace would break
def place_prompts(
    text: torch.Tensor,
    behind: Sequence[bool],
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor | None = None,
    answer_start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Find where the prompt of each row stands, [B] on the host; see `find_start`.

    Args:
        text: Ids [B, T] or embeddings [B, T, H].
        behind: Whether each row's prompt is a suffix, or the one flag of all rows.
        attention_mask: [B, T], nonzero at real tokens; None: all are.
        labels: See `find_start`.
        answer_start: See `find_start`.

    Raises:
        ValueError: A shape or a column is wrong; see `find_start`.
    """
    from ..shared_prefix.transfer import download

    rows, columns = text.shape[:2]
    check_mask(attention_mask, rows, columns)
    if len(behind) not in {1, rows}:
        raise ValueError(f"adapter_names has {len(behind)} names, the batch has {rows} rows.")
    if labels is not None and labels.shape != (rows, columns):
        raise ValueError(f"labels are {list(labels.shape)}; wanted {[rows, columns]}, one for each text token.")
    if answer_start is not None and (
        not isinstance(answer_start, torch.Tensor) or answer_start.is_floating_point() or answer_start.shape != (rows,)
    ):
        raise ValueError(
            f"answer_start is {answer_start!r}; wanted a tensor of {rows} whole numbers: the column of each row's "
            "first answer token."
        )
    mask = attention_mask if attention_mask is not None else torch.ones(rows, columns, dtype=torch.long)
    read = iter(download(*(x for x in (mask, labels, answer_start) if x is not None)))
    mask = next(read)
    labels, answer_start = (None if x is None else next(read) for x in (labels, answer_start))
    if answer_start is not None and bool((answer_start < 1).any()):
        raise ValueError(
            f"answer_start is {answer_start.tolist()}; wanted {rows} columns, each 1 or more: that of the row's "
            "first answer token."
        )
    return find_start(mask, labels, answer_start, torch.tensor(list(behind)).expand(rows))


def predicting_columns(start: torch.Tensor, columns: int, prompt: int) -> torch.Tensor:
    """Find the column that stands for each text column if virtual columns are left out, [B, T].

    The column before the answer is that of the last virtual token, which predicts the answer's first token.
    """
    column = torch.arange(columns, device=start.device)
    return column + prompt * (column >= start[:, None] - 1)


def order_columns(start: torch.Tensor, columns: int, prompt: int) -> torch.Tensor:
    """Find the column of `[prompt | text]` at each column of the output, [B, P+T]."""
    column = torch.arange(prompt + columns, device=start.device)
    virtual = column - start[:, None]
    in_front, behind = virtual < 0, virtual >= prompt
    return torch.where(in_front, column + prompt, torch.where(behind, column, virtual))
