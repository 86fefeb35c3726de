"""Where a prompt stands in a row: in front of the text, or behind it and in front of the answer.

`start` [B] is the number of the row's columns in front of the prompt: 0 for a prefix. Outputs have the order
`[columns in front | prompt | other columns]`.

Shapes: B rows, T text tokens, P virtual tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from ..labels import IGNORE_INDEX


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


def wide_columns(start: torch.Tensor, columns: int, prompt: int) -> torch.Tensor:
    """Find the column of each text token among those of text and prompt, [B, T]."""
    column = torch.arange(columns, device=start.device)
    return column + prompt * (column >= start[:, None])


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
