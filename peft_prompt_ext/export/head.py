"""Rows of the embedding and of the head for the prompts' tokens, so that they are read and never answered.

Without a bias a row w of the head gives the logit w @ h, which is 0 for a zero row: often above real words. Behind an
RMSNorm no row can be low for every conceivable h, for -h would have the negative logit. But the final states of real
texts lie on one side: there is a u with u @ h near 1 for all of them (behind a LayerNorm with a bias exactly 1). u is
fitted on texts and on random tokens, w = -scale * u, and the export is refused where other texts come near the other
side. Shapes: N states, H hidden size, S new rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


MARGIN = 10.0  # the least distance of a new token's logit below the lowest other one
LEAST = 0.2  # the smallest u @ h that other states may have
BUILT_FOR = 0.1  # the u @ h at which a new token still has its margin
RIDGE = 1e-2  # of the fit; without it u follows the random tokens, and rounding to 16 bits shows


@dataclass(frozen=True)
class LowRow:
    """A row of the head whose logit is below all others.

    Attributes:
        weight: [H].
        bias: Its bias, 0 if the head has none.
        least: The smallest u @ h over states that it was not fitted on; 1 if the head has a bias.
    """

    weight: torch.Tensor
    bias: float
    least: float


def check_untied(config: Any) -> None:
    """Raise ValueError if a model's head cannot be a table of its own beside the embedding. No weights are loaded."""
    from transformers import AutoModelForCausalLM

    name = getattr(config, "model_type", type(config).__name__)
    if config.get_text_config() is not config:
        raise ValueError(f"{name} reads more than text, and an export is of a model of text alone: choose such a one.")
    plain = type(config).from_dict({**config.to_dict(), "tie_word_embeddings": False})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plain)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if (
        not isinstance(head, nn.Linear)
        or head.weight is embedding.weight
        or head.weight.shape != embedding.weight.shape
    ):
        raise ValueError(
            f"{name} has no head that can be untied from its embedding ({type(model).__name__} with "
            f"{type(head).__name__}): a prompt's tokens would be answers. Choose another base model."
        )


def untie(model: Any) -> bool:
    """Give the head a table of its own. Returns whether it shared the embedding's."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    if tied:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}  # what transformers leaves out of the saved file
    return tied


def grow(model: Any, rows: int) -> None:
    """Give embedding and head at least so many rows."""
    if rows > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)


def write_vectors(model: Any, ids: Sequence[int], vectors: torch.Tensor) -> float:
    """Write vectors [S, H] as rows of the embedding, so that the rows come out of it as the vectors.

    Returns:
        The largest change that the model's dtype makes, as a part of the vector's size.
    """
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        table = embedding.weight
        table[ids] = (vectors.float() / scale_of(embedding)).to(table.device, table.dtype)
        read = embedding(torch.tensor(ids, device=table.device)).float().cpu()
    return float(((read - vectors).norm(dim=1) / vectors.norm(dim=1).clamp(min=1e-12)).max())


def scale_of(embedding: nn.Module) -> float:
    """What an embedding multiplies its rows by, as Gemma's does.

    Raises:
        ValueError: It does something else with them.
    """
    table: torch.Tensor = embedding.weight.detach()  # type: ignore[operator]
    ids = torch.linspace(0, len(table) - 1, 16, device=table.device).long()
    with torch.no_grad():
        rows, read = table[ids].float(), embedding(ids).float()
    scale = float((rows * read).sum() / (rows * rows).sum())
    if not torch.allclose(read, scale * rows, rtol=1e-2, atol=1e-6):
        raise ValueError(
            f"{type(embedding).__name__} does more than multiply a row by a number, so no row gives a prompt's "
            "vectors. Choose another base model."
        )
    return scale


def find_low_row(model: Any, fit: Sequence[torch.Tensor], held_out: Sequence[torch.Tensor]) -> LowRow:
    """Find a row for the head that is below all others.

    Args:
        model: The model, its head untied and the prompts' vectors in its embedding.
        fit: Batches of ids [B, T] to fit on.
        held_out: Batches to test it on.

    Raises:
        ValueError: Some states lie on the other side.
    """
    head = model.get_output_embeddings()
    states, lows = zip(*_final_states(model, fit), strict=True)
    size = (MARGIN + 2 * max(0.0, -min(lows))) / BUILT_FOR
    if head.bias is not None:
        return LowRow(torch.zeros(head.in_features), -size, 1.0)
    seen = torch.cat(states).double()
    squares = seen.T @ seen / len(seen)
    ridge = RIDGE * squares.diagonal().mean() * torch.eye(len(squares), dtype=torch.float64)
    u = torch.linalg.solve(squares + ridge, seen.mean(0))
    # of tensors, because the least of floats may leave a NaN out
    least = torch.stack([(new.double() @ u).min() for new, _ in _final_states(model, held_out)]).min().item()
    if not least >= LEAST:
        raise ValueError(
            f"A prompt's token could be answered: a row of the head without a bias has to be low for every text, and "
            f"the final states of {type(model).__name__} do not lie on one side (smallest projection {least:.3f}, "
            f"wanted {LEAST} or more). Choose a base model whose head has a bias, or serve the adapter with PEFT."
        )
    return LowRow((-size * u).float(), 0.0, least)


def write_low_rows(model: Any, ids: Sequence[int], low: LowRow) -> None:
    """Write a row of the head for each id."""
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[list(ids)] = low.weight.to(head.weight.device, head.weight.dtype)
        if head.bias is not None:
            head.bias[list(ids)] = low.bias


def _final_states(model: Any, batches: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, float]]:
    """What the head reads, [N, H] on the CPU, and the lowest logit, for each batch."""
    kept: list[tuple[torch.Tensor, float]] = []

    def keep(_: nn.Module, inputs: tuple[torch.Tensor, ...], logits: torch.Tensor) -> None:
        kept.append((inputs[0].detach().flatten(0, -2).float().cpu(), float(logits.min())))

    hook = model.get_output_embeddings().register_forward_hook(keep)
    try:
        for ids in batches:
            with torch.inference_mode():
                all_logits(model, ids)
            yield kept.pop()
    finally:
        hook.remove()


def all_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The logits [B, T, V] of ids [B, T], every one of which counts, also that of a pad."""
    ids = ids.to(model.device)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def lowest_margin(logits: torch.Tensor, ids: Sequence[int]) -> float:
    """How far the highest logit of some ids is below the lowest other one, at the worst position of [..., V]."""
    new = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    new[list(ids)] = True
    logits = logits.float()
    return float((logits[..., ~new].amin(-1) - logits[..., new].amax(-1)).min())
