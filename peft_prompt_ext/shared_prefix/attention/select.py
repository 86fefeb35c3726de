"""Selects the attention of packed batches on a device: the first one that gives the reference's numbers there.

SDPA is there on every device and needs no proof beyond the model's own (probe.py). Another one is compiled for the
device at hand, so it is proved there, on random tokens, for each kind of call that the model makes.

Shapes: N packed tokens, P virtual ones, A heads of the query, key or value, D head size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from ..layout import PackedLayout, pack
from ..precision import Tolerance
from . import flex, reference, sdpa, varlen


VARIABLE = "PEFT_PROMPT_EXT_ATTENTION"  # what to try in place of CANDIDATES
ATTENTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "sdpa": sdpa.packed_attention,
    "varlen": varlen.packed_attention,
    "flex": flex.packed_attention,
}
# by type of device, the best first; SDPA comes last everywhere
CANDIDATES = {"cuda": ("varlen", "flex")}

TOLERANCE = Tolerance(float32=1e-5, reduced=1e-2, low=2e-2)  # of the result and the gradients
# Lengths of prompts, lengths of texts, and which prompt each text has: several blocks of flex.BLOCK tokens, with
# blocks that are seen as a whole, in part and not at all; then few queries, which take other kernels.
BATCHES = (
    ((130, 3), (300, 40, 1, 77), (0, 0, 1, 1)),
    ((60,), (30, 10), (0, 0)),
    ((7, 0), (1, 29, 10), (0, 1, 0)),
    ((5,), (1,), (0,)),
)
LONGEST_WINDOW = 100  # a longer one would leave nothing out


class AttentionCall(NamedTuple):
    """What a layer asks of attention.

    Attributes:
        device: Where.
        tensors: Heads, head size and dtype of query, key and value.
        options: Names and values of `packed_attention`'s options but dropout.
    """

    device: torch.device
    tensors: tuple[tuple[int, int, torch.dtype], ...]
    options: tuple[tuple[str, Any], ...]


def candidates(device: torch.device) -> tuple[str, ...]:
    """What may be used on a device before SDPA.

    Raises:
        ValueError: The environment variable has no attention's name.
    """
    asked = os.environ.get(VARIABLE)
    if not asked:
        return CANDIDATES.get(device.type, ())
    if asked not in ATTENTIONS:
        raise ValueError(f"{VARIABLE} is {asked!r}; it can be {' or '.join(map(repr, ATTENTIONS))}.")
    return () if asked == "sdpa" else (asked,)


def select(names: Iterable[str], calls: Iterable[AttentionCall]) -> tuple[str, list[str]]:
    """Take the first attention that every call can have.

    Args:
        names: Of `ATTENTIONS`, the best first.
        calls: Of all layers of a model.

    Returns:
        Its name ("sdpa" if none is proved), and for each name before it why it is not taken.
    """
    kinds = set(calls)
    refused: list[str] = []
    for name in names:
        try:
            obstacle = next(filter(None, (differs(ATTENTIONS[name], call) for call in kinds)), None)
        except Exception as error:  # compilers and kernels raise what they like
            obstacle = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        if obstacle is None:
            return name, refused
        refused.append(f"{name} attention is not used ({obstacle})")
    return "sdpa", refused


@torch.inference_mode(False)
def differs(function: Callable[..., torch.Tensor], call: AttentionCall) -> str | None:
    """Compare an attention and its gradients with the reference's in float64; None if they are the same."""
    options = dict(call.options)
    if options.get("sliding_window") is not None:
        options["sliding_window"] = min(options["sliding_window"], LONGEST_WINDOW)
    generator = torch.Generator().manual_seed(0)
    for prompts, texts, prompt_of_row in BATCHES:
        mask = torch.arange(max(texts)) < torch.tensor(texts)[:, None]
        layout = pack(mask, prompts, torch.tensor(prompt_of_row)).to(call.device)
        count = layout.position_ids.shape[1]
        tokens = [  # as a projection leaves them: [1, N, A, D], then the heads first
            torch.randn(1, count, heads, size, generator=generator).to(call.device, dtype).transpose(1, 2)
            for heads, size, dtype in call.tensors
        ]
        got = _results(function, tokens, layout, options)
        want = _results(reference.packed_attention, [x.double() for x in tokens], layout, options)
        errors = [(x.double() - y).norm() / y.norm() for x, y in zip(got, want, strict=True)]
        error, dtype = float(torch.stack(errors).max()), got[0].dtype
        if not error <= TOLERANCE.of(call.device, dtype):  # NaN differs as well
            return f"relative error {error:.1e} of its results or gradients in {dtype}, {count} tokens"
    return None


def _results(
    function: Callable[..., torch.Tensor], tokens: list[torch.Tensor], layout: PackedLayout, options: dict[str, Any]
) -> list[torch.Tensor]:
    """The result, its gradients, and the result for the queries of the text alone."""
    with torch.enable_grad():
        inputs = [x.clone().requires_grad_() for x in tokens]
        out = function(*(x * 1 for x in inputs), layout, **options)  # in a layer they are no leaves
        weight = torch.arange(out.numel(), device=out.device, dtype=torch.float64).sin().view(out.shape)
        gradients = torch.autograd.grad((out * weight).sum(), inputs)
    query, key, value = tokens
    with torch.no_grad():
        text = function(query[:, :, layout.num_prompt_tokens :], key, value, layout, **options)
    return [out.detach(), *gradients, text]
