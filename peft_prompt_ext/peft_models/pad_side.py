"""The side of a text where pads do not change results; found once for a model, with a small batch.

- Most base models ignore pads behind the text.
- Classifiers that read the last column need pads in front.
- Some models (convolutions, pooled or hashed attention) see pads on both sides, also without a prompt.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch

from ..devices import device_of
from ..evaluation import evaluation_mode
from ..quantization import ignore_outliers


logger = logging.getLogger(__name__)

BEHIND, IN_FRONT = "behind", "in front"
REAL, PADS = 3, 2
# largest relative error of a row with pads against the row alone; pads that are seen cause far more
FP32_TOLERANCE = 1e-3
LOW_PRECISION_TOLERANCE = 5e-2


@torch.no_grad()
def find_pad_side(model: Any) -> str:
    """Compare a row with pads and the row alone on the model's own path.

    Args:
        model: A model with a prompt; `model.pad_side` is where its path puts pads.

    Returns:
        The first of `BEHIND` and `IN_FRONT` that does not change the result. If both change it: `BEHIND`, with a
        warning.
    """
    base_model, words = model.get_base_model(), model.word_embeddings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(words.num_embeddings, (1, REAL + PADS), generator=generator).to(device_of(words))
    mask = (torch.arange(REAL + PADS, device=ids.device) < REAL).long()[None]
    errors = {}
    try:
        with evaluation_mode(base_model), ignore_outliers(base_model):
            alone = _run(model, ids[:, :REAL], mask[:, :REAL])
            tolerance = FP32_TOLERANCE if alone[0].dtype.itemsize >= 4 else LOW_PRECISION_TOLERANCE
            for side in (BEHIND, IN_FRONT):
                model.pad_side = side
                errors[side] = _compare(_run(model, ids, mask), alone)
                if errors[side] <= tolerance:
                    return side
    except Exception as error:  # the user's batch will raise it
        logger.debug("Pads are put behind the text, because a small batch could not run: %s", error)
        return BEHIND
    warnings.warn(
        f"{type(base_model).__name__} does not mask pads fully, with or without a prompt: pads change results by "
        f"{min(errors.values()):.0e}. Make batches of texts of one length.",
        stacklevel=2,
    )
    return BEHIND


def _run(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    return model._run_prompted({"input_ids": ids, "attention_mask": mask, "return_dict": True})


def _compare(padded: Any, alone: Any) -> float:
    """Return the largest relative difference between the outputs, over the columns of `alone`."""
    errors = [0.0]
    for name, want in alone.items():
        if isinstance(want, torch.Tensor) and want.is_floating_point():
            got = padded[name][tuple(slice(size) for size in want.shape)]
            errors.append(float((got - want).norm() / want.norm().clamp(min=torch.finfo(want.dtype).tiny)))
    return max(errors)
