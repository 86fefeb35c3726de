"""Selects the attention of packed batches on a device: the first one that agrees with the reference there.

SDPA runs on every device and is proved with the model (probe.py). The others have kernels for a device, so they are
proved on it, with random tokens, for each kind of call that the model makes.

Shapes: N packed tokens, P virtual tokens, A heads of the query, key or value, D head size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from ..layout import PackedLayout, pack
from ..precision import Tolerance
from . import flex, reference, sdpa, varlen


VARIABLE = "PEFT_PROMPT_EXT_ATTENTION"  # replaces CANDIDATES
ATTENTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "sdpa": sdpa.packed_attention,
    "varlen": varlen.packed_attention,
    "flex": flex.packed_attention,
}
# for each device type, the best first; SDPA is the last everywhere
CANDIDATES = {"cuda": ("varlen", "flex")}

TOLERANCE = Tolerance(float32=1e-5, reduced=1e-2, low=2e-2)  # for the result and the gradients
# Lengths of trunks, lengths of branches, the trunk of each branch. The first has blocks of flex.BLOCK tokens that are
# seen fully, partly and not at all; the others have few queries, which take other kernels.
BATCHES = (
    ((130, 3), (300, 40, 1, 77), (0, 0, 1, 1)),
    ((60,), (30, 10), (0, 0)),
    ((7, 0), (1, 29, 10), (0, 1, 0)),
    ((5,), (1,), (0,)),
)
LONGEST_WINDOW = 100  # a longer window would mask nothing in BATCHES


class AttentionCall(NamedTuple):
    """A kind of attention call of a layer.

    Attributes:
        device: The device.
        tensors: Heads, head size and dtype of query, key and value.
        options: Names and values of `packed_attention`'s options, without dropout.
    """

    device: torch.device
    tensors: tuple[tuple[int, int, torch.dtype], ...]
    options: tuple[tuple[str, Any], ...]


def list_candidates(device: torch.device) -> tuple[str, ...]:
    """List the attentions to try on a device before SDPA.

    Raises:
        ValueError: The environment variable is not the name of an attention.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return CANDIDATES.get(device.type, ())
    if name not in ATTENTIONS:
        raise ValueError(f"{VARIABLE} is {name!r}. Set it to {' or '.join(map(repr, ATTENTIONS))}.")
    return () if name == "sdpa" else (name,)


def select(names: Iterable[str], calls: Iterable[AttentionCall]) -> tuple[str, list[str]]:
    """Select the first attention that supports every call.

    Args:
        names: Names from `ATTENTIONS`, the best first.
        calls: The calls of all layers of a model.

    Returns:
        Its name ("sdpa" if none is proved), and for each name before it the reason why it is not used.
    """
    kinds = set(calls)
    refused: list[str] = []
    for name in names:
        try:
            obstacle = next(filter(None, (differs(ATTENTIONS[name], call) for call in kinds)), None)
        except Exception as error:  # compilers and kernels raise many types
            obstacle = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        if obstacle is None:
            return name, refused
        refused.append(f"{name} attention is not used ({obstacle})")
    return "sdpa", refused


@torch.inference_mode(False)
def differs(function: Callable[..., torch.Tensor], call: AttentionCall) -> str | None:
    """Compare an attention and its gradients with the reference in float64; None if they agree."""
    options = dict(call.options)
    if options.get("sliding_window") is not None:
        options["sliding_window"] = min(options["sliding_window"], LONGEST_WINDOW)
    generator = torch.Generator().manual_seed(0)
    for prompts, texts, prompt_of_row in BATCHES:
        mask = torch.arange(max(texts)) < torch.tensor(texts)[:, None]
        layout = pack(mask, prompts, torch.tensor(prompt_of_row)).to(call.device)
        count = layout.num_tokens
        tokens = [  # with the strides of a projection's output: [1, N, A, D] transposed
            torch.randn(1, count, heads, size, generator=generator).to(call.device, dtype).transpose(1, 2)
            for heads, size, dtype in call.tensors
        ]
        got = _run(function, tokens, layout, options)
        want = _run(reference.packed_attention, [x.double() for x in tokens], layout, options)
        errors = [(x.double() - y).norm() / y.norm() for x, y in zip(got, want, strict=True)]
        error, dtype = float(torch.stack(errors).max()), got[0].dtype
        if not error <= TOLERANCE.of(call.device, dtype):  # NaN differs as well
            return f"relative error {error:.1e} of its results or gradients in {dtype}, {count} tokens"
    return None


def _run(
    function: Callable[..., torch.Tensor], tokens: list[torch.Tensor], layout: PackedLayout, options: dict[str, Any]
) -> list[torch.Tensor]:
    """Compute the result and its gradients, of all tokens and of the branches with constant trunks."""
    count = layout.num_trunk_tokens
    _, *trunks = (x[:, :, :count] for x in tokens)
    branches = [x[:, :, count:] for x in tokens]
    return [
        *_differentiate(function, tokens, layout, options),
        *_differentiate(function, branches, layout, {**options, "kept": tuple(trunks)}),
    ]


def _differentiate(
    function: Callable[..., torch.Tensor], tokens: list[torch.Tensor], layout: PackedLayout, options: dict[str, Any]
) -> list[torch.Tensor]:
    with torch.enable_grad():
        inputs = [x.clone().requires_grad_() for x in tokens]
        out = function(*(x * 1 for x in inputs), layout, **options)  # non-leaf tensors, as in a layer
        weight = torch.arange(out.numel(), device=out.device, dtype=torch.float64).sin().view(out.shape)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]
