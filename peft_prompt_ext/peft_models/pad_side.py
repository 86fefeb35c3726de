"""On which side of a text its pads do no harm: found once for a model, with a small batch.

Most base models do not see pads behind the text. Classifiers that read the last column off need them in front. Some
(convolutions, pooled or hashed attention) see them on either side, with a prompt as without one.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch

from ..devices import device_of


logger = logging.getLogger(__name__)

BEHIND, IN_FRONT = "behind", "in front"
REAL, PADS = 3, 2
# relative error of a row beside pads against the row alone; seen pads are far beyond
FP32_TOLERANCE = 1e-3
LOW_PRECISION_TOLERANCE = 5e-2


@torch.no_grad()
def find_pad_side(model: Any) -> str:
    """Compare a row that has pads with the row alone, each through the model's own path.

    Args:
        model: A prompted model; `model.pad_side` decides where its path puts the pads.

    Returns:
        The first of `BEHIND` and `IN_FRONT` that changes nothing. If both do, a warning says so once.
    """
    base_model, words = model.get_base_model(), model.word_embeddings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(words.num_embeddings, (1, REAL + PADS), generator=generator).to(device_of(words))
    mask = (torch.arange(REAL + PADS, device=ids.device) < REAL).long()[None]
    training, errors = [module for module in base_model.modules() if module.training], {}
    base_model.eval()
    try:
        alone = _run(model, ids[:, :REAL], mask[:, :REAL])
        tolerance = FP32_TOLERANCE if alone[0].dtype.itemsize >= 4 else LOW_PRECISION_TOLERANCE
        for side in (BEHIND, IN_FRONT):
            model.pad_side = side
            errors[side] = _difference(_run(model, ids, mask), alone)
            if errors[side] <= tolerance:
                return side
    except Exception as error:  # whatever is wrong, the user's own batch will show it
        logger.debug("Pads stay behind the text; a small batch could not be run: %s", error)
        return BEHIND
    finally:
        for module in training:
            module.training = True
    warnings.warn(
        f"{type(base_model).__name__} sees pads through its mask, with a prompt and without one: a text's result is "
        f"off by {min(errors.values()):.0e} with pads beside it. Make batches of texts of one length.",
        stacklevel=2,
    )
    return BEHIND


def _run(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    return model._prompted_forward({"input_ids": ids, "attention_mask": mask, "return_dict": True})


def _difference(padded: Any, alone: Any) -> float:
    """The largest relative difference between fields of two outputs, over what `alone` has."""
    errors = [0.0]
    for name, want in alone.items():
        if isinstance(want, torch.Tensor) and want.is_floating_point():
            got = padded[name][tuple(slice(size) for size in want.shape)]
            errors.append(float((got - want).norm() / want.norm().clamp(min=torch.finfo(want.dtype).tiny)))
    return max(errors)
