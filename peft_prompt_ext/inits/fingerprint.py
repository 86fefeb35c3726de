"""A few figures of a base model's word embeddings, to recognise the base model of a saved prompt.

Shapes: P virtual tokens, H hidden size of the word embeddings.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft.utils.integrations import gather_params_ctx

from .base import InitContext


ROWS = 8  # evenly spaced in the table
# A row's norm in bfloat16 and in float32 differ by a thousandth at most; norms of another model by some percent.
TOLERANCE = 5e-3
# Smaller changes of a row's size do not count as scaling.
LEAST_SCALE = 1.5


def fingerprint(ctx: InitContext, model_type: str | None = None) -> dict[str, Any] | None:
    """Describe the word embeddings of a base model.

    Returns:
        For `prompt_init.json`: `model_type`, `vocab_size`, `hidden_size`, and for some rows as they enter the model
        `embedding_scale` (their root mean square) and `row_norms`. None if the embeddings are no table, or a table
        without data.
    """
    if not hasattr(ctx.word_embeddings, "num_embeddings"):
        return None
    try:
        rows = ctx.embed(_space_rows(ctx.num_embeddings))
    except ValueError:  # on the meta device
        return None
    return {
        "model_type": model_type,
        "vocab_size": ctx.num_embeddings,
        "hidden_size": rows.shape[1],
        "embedding_scale": float(f"{_size(rows):.6g}"),
        "row_norms": [float(f"{norm:.6g}") for norm in rows.double().norm(dim=1).tolist()],
    }


def check_saved(
    ctx: InitContext, prompt: torch.Tensor, saved: Mapping[str, Any] | None, source: str, model_type: str | None = None
) -> None:
    """Warn if a saved prompt belongs to another base model, or to embeddings of another scale.

    Args:
        ctx: Gives the base model's word embeddings.
        prompt: [P, H], as it was saved.
        saved: The fingerprint beside it; None: only the prompt's own size is checked.
        source: What to call it in the warning.
        model_type: Of the base model, if it is known.
    """
    if not hasattr(ctx.word_embeddings, "num_embeddings"):
        return
    try:
        found = _check_base(ctx, saved, model_type) if saved else _check_scale(ctx, prompt)
    except (AttributeError, KeyError, TypeError):
        found = "has an incomplete fingerprint of its base model, so it could not be compared with this one."
    except ValueError:  # the base model has no data yet
        return
    if found:
        warnings.warn(f"{source} {found}", stacklevel=2)


def _space_rows(rows: int) -> list[int]:
    return [(2 * i + 1) * rows // (2 * ROWS) for i in range(ROWS)]


def _check_base(ctx: InitContext, saved: Mapping[str, Any], model_type: str | None) -> str | None:
    """Compare the base model with a saved fingerprint. Returns a warning, or None."""
    if len(saved["row_norms"]) != ROWS:
        raise TypeError(f"{len(saved['row_norms'])} norms instead of {ROWS}")
    ids = _space_rows(saved["vocab_size"])
    original = f"a {saved.get('model_type') or 'model'} with {saved['vocab_size']} words"
    trained_on = f"was trained on another base model ({original})"
    if max(ids) >= ctx.num_embeddings:
        return f"{trained_on}: this one has {ctx.num_embeddings} words. Results are meaningless."
    now = ctx.embed(ids).double().norm(dim=1)
    then = torch.tensor(saved["row_norms"], dtype=torch.float64)
    factor = float(now.norm() / then.norm())
    if not torch.allclose(now, then * factor, rtol=TOLERANCE, atol=0.0):
        return f"{trained_on}: its word embeddings differ. Results are unreliable."
    if abs(factor - 1) > TOLERANCE:
        return (
            f"was trained with embeddings of another scale: here they are {factor:.4g} times as large, perhaps due to "
            f"another version of transformers. Multiply the prompt by {factor:.4g}, or load it with the version that "
            "it was trained with."
        )
    if model_type and saved.get("model_type") not in (None, model_type):
        return f"{trained_on}: this one is a {model_type}. Results are unreliable."
    return None


def _check_scale(ctx: InitContext, prompt: torch.Tensor) -> str | None:
    """Compare a prompt's size with embeddings that the model scales. Returns a warning, or None.

    Until transformers 5.4 Gemma scaled `inputs_embeds`, so older prompts are smaller by the square root of H.
    """
    ids = _space_rows(ctx.num_embeddings)
    weight: Any = next(ctx.word_embeddings.parameters())
    with gather_params_ctx([weight]):
        if weight.is_meta or weight.ndim != 2 or not weight.is_floating_point():
            return None
        table = _size(weight.detach()[ids])
    entering, size = _size(ctx.embed(ids)), _size(prompt)
    if min(table, entering, size) == 0 or max(entering / table, table / entering) < LEAST_SCALE:
        return None
    if abs(torch.tensor(size / table).log()) >= abs(torch.tensor(size / entering).log()):
        return None
    return (
        f"has rows of size {size:.3g}; the word embeddings have size {table:.3g} in their table and enter the model "
        f"{entering / table:.4g} times as large. The prompt was probably trained with transformers before 5.4, which "
        f"scaled prompts inside the model. If so, multiply it by {entering / table:.4g}."
    )


def _size(rows: torch.Tensor) -> float:
    """Root mean square."""
    return float(rows.double().square().mean().sqrt())
