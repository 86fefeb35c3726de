"""Finds how long a row and a pack may be, without running long batches.

A small batch runs with late positions for a row, with late places for the pack, and the model's mask functions are
called for late tokens. If that changes a result, the length at which the change begins is searched among the numbers
of the config.

Shapes: N packed tokens, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.weak import WeakIdKeyDictionary
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from .attention.sdpa import packed_attention
from .interface import IMPLEMENTATIONS, NotPackable, Observer
from .layout import PackedLayout
from .packed_pass import PackedPass


FAR = 2**20  # latest place, and latest position in a model without a limit
# largest relative difference of two runs on the same shapes, in float32 and in lower precision
EXACT, ROUNDED = 1e-5, 1e-2


class Trial(NamedTuple):
    """A small packed batch that runs several times.

    Attributes:
        config: The text model's config.
        layout: Makes the batch's layout.
        run: Runs the batch in a packed pass.
        run_alone: Runs the model on one row, with the given keyword arguments.
        last: The number of text tokens in the last row.
        positions: The model's number of positions.
        exact: Whether the model computes in float32, without quantised weights.
    """

    config: Any
    layout: Callable[[], PackedLayout]
    run: Callable[[PackedPass], Any]
    run_alone: Callable[..., Any]
    last: int
    positions: int
    exact: bool


def find_longest(trial: Trial) -> tuple[int | None, int | None]:
    """Find the longest row and the longest pack with correct results; None: no limit.

    Raises:
        NotPackable: No length is correct, or none can be found.
    """
    before = _run(trial, trial.layout())
    pack, row = _find_longest_pack(trial, before), _find_longest_mask(trial)
    try:
        rows = [limit for limit in (row, _find_longest_row(trial, before)) if limit is not None]
    finally:
        trial.run(PackedPass(trial.layout()))  # restores rotary embeddings that depend on the length
    return min(rows, default=None), pack


def _find_longest_row(trial: Trial, before: list[torch.Tensor]) -> int | None:
    """Find the longest row that does not change the others."""
    positions = trial.layout().position_ids[0]
    others, length_now = len(positions) - trial.last, int(positions[-1]) + 1

    def is_unchanged(length: int) -> bool:
        layout = trial.layout()
        layout.position_ids = layout.position_ids.clone()
        layout.position_ids[:, others:] += length - length_now
        return _is_same(_run(trial, layout), before, others, trial.exact)

    found = _search(is_unchanged, _list_numbers(trial.config, length_now, trial.positions))
    if found == 0:
        raise NotPackable("a row's positions change the results of other rows")
    return found


def _find_longest_pack(trial: Trial, before: list[torch.Tensor]) -> int | None:
    """Find the longest pack in which a token's place does not matter."""
    tokens = trial.layout().position_ids.shape[1]

    def is_unchanged(length: int) -> bool:
        with _LatePlaces(tokens, length - tokens):
            return _is_same(_run(trial, trial.layout()), before, tokens, trial.exact)

    found = _search(is_unchanged, _list_numbers(trial.config, tokens, FAR))
    if found == 0:
        raise NotPackable("its layers count the tokens of the whole batch")
    return found


def _find_longest_mask(trial: Trial) -> int | None:
    """Find the longest row where the model's own masks agree with packed attention."""
    layers: dict[Any, None] = {}  # unique pairs of mask function and window

    def observe(module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any) -> None:
        function: Any = causal_mask_function
        if attention_mask is not None:
            function = functions.get(attention_mask.data_ptr())
            if function is None:
                raise NotPackable(f"it makes an attention mask of its own, {list(attention_mask.shape)}")
        layers[function, kwargs.get("sliding_window")] = None

    observer = Observer(observe)
    with _collect_mask_functions() as functions:
        trial.run_alone(**observer.arguments)
    try:
        limits = [_find_mask_limit(function, window, trial) for function, window in layers]
    except Exception as error:  # a mask function may support only the tokens of one batch
        raise NotPackable(f"its masks cannot be computed for late tokens ({error})") from error
    found = min((limit for limit in limits if limit is not None), default=None)
    if found == 0:
        raise NotPackable("its masks are not those of causal attention")
    return found


def _list_numbers(config: Any, least: int, most: int) -> list[int]:
    """List the lengths where a number of the config may matter, in ascending order; the last is `most`."""
    found = {most}
    values = [config.to_dict()]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values += value.values()
        elif isinstance(value, (list, tuple)):
            values += value
        elif isinstance(value, int):  # both, because lengths start at 1 and places at 0
            found |= {value - 1, value}
    return sorted(number for number in found if least < number <= most)


def _search(holds: Callable[[int], bool], numbers: list[int]) -> int | None:
    """Find the last number that holds, if all numbers after it do not; 0 if none holds, None if all do."""
    if not numbers or holds(numbers[-1]):
        return None
    low, high = 0, len(numbers) - 1  # all before `low` hold, the one at `high` does not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if holds(numbers[middle]) else (low, middle)
    return numbers[low - 1] if low else 0


def _run(trial: Trial, layout: PackedLayout) -> list[torch.Tensor]:
    """Run the trial. Returns queries, keys and values of every layer, [1, N, heads, D] each."""
    seen: list[torch.Tensor] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            seen.extend(x.transpose(1, 2).clone() for x in (query, key, value))
            return packed_attention(query, key, value, *args, **kwargs)

    trial.run(PackedPass(layout, attend))
    return seen


def _is_same(got: list[torch.Tensor], want: list[torch.Tensor], tokens: int, exact: bool) -> bool:
    """Whether the first `tokens` tokens agree."""
    differences = [
        (x[:, :tokens].float() - y[:, :tokens].float()).norm() / y[:, :tokens].float().norm()
        for x, y in zip(got, want, strict=True)
    ]
    return bool(torch.stack([d.cpu() for d in differences]).max() <= (EXACT if exact else ROUNDED))


class _LatePlaces(TorchFunctionMode):
    """Shifts the places that a model computes for its tokens by `shift`.

    A model computes places with `arange` or `cumsum` over the sequence. Each result that depends on them is computed
    for late places too. The model gets the late result if it has floats or booleans. Integers may be indices of the
    sequence, which keeps its length, so they stay; their late values are stored.
    """

    def __init__(self, tokens: int, shift: int) -> None:
        super().__init__()
        self.tokens, self.shift = tokens, shift
        self.late = WeakIdKeyDictionary()  # late values by their original

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        given = (args, kwargs or {})
        late = tree_map(self._get_late, given)
        if any(word in name for word in _LOOKUPS):  # only the looked-up values may be late, not the indices
            late = ((*late[0][:1], *args[1:]), given[1])
        is_counted = any(x is not y for x, y in zip(tree_iter(late), tree_iter(given), strict=True))
        if is_counted and name.endswith("_") and late[0][0] is args[0]:  # in-place, into a tensor without late values
            return func(*late[0], **late[1])
        out = func(*args, **given[1])
        if not isinstance(out, torch.Tensor):
            return out
        is_index = not out.is_floating_point() and out.dtype != torch.bool
        if is_counted:
            late_out = func(*late[0], **late[1])
            if not is_index:
                return late_out
            self.late[out] = late_out
        elif is_index and name in ("arange", "cumsum") and self.tokens in out.shape:
            self.late[out] = out + self.shift
        return out

    def _get_late(self, value: Any) -> Any:
        return self.late.get(value, value) if isinstance(value, torch.Tensor) else value


_LOOKUPS = ("getitem", "setitem", "embedding", "index", "gather", "scatter", "take", "one_hot")


@contextmanager
def _collect_mask_functions() -> Iterator[dict[int, Any]]:
    """Collect the mask functions that a model uses inside, by the memory address of their mask."""
    functions: dict[int, Any] = {}
    masks = []  # keeps the addresses in use
    thread = get_ident()

    def make(own: Callable[..., Any], **kwargs: Any) -> Any:
        if get_ident() != thread:
            return own(**kwargs)
        mask = own(**{**kwargs, "allow_is_causal_skip": False})
        if isinstance(mask, torch.Tensor):
            masks.append(mask)
            functions[mask.data_ptr()] = kwargs["mask_function"]
        return mask

    registry = ALL_MASK_ATTENTION_FUNCTIONS
    local = {name: registry._local_mapping.get(name) for name in IMPLEMENTATIONS}
    for name in IMPLEMENTATIONS:
        registry[name] = partial(make, registry[name])
    try:
        yield functions
    finally:
        for name, own in local.items():
            if own is None:
                del registry[name]
            else:
                registry[name] = own


def _find_mask_limit(function: Any, window: int | None, trial: Trial) -> int | None:
    """Find the longest row where a mask function agrees with a window; 0 if none, None if all."""
    numbers = [0, 1, 2, *_list_numbers(trial.config, 2, trial.positions)]
    numbers = sorted({*numbers, *(number + 1 for number in numbers)})
    ends = torch.tensor(numbers)
    distances = torch.tensor([*numbers, *(-number for number in numbers[1:])])
    query = ends[:, None].expand(-1, 3 * len(numbers) - 1)
    key = torch.cat([ends[:, None] - distances, ends.expand(len(ends), -1)], 1)
    key = key.clamp(min=0)
    seen = key <= query
    if window is not None:
        seen = seen & (query - key < window)
    zero = torch.zeros((), dtype=torch.long)
    mask = function(zero, zero, query, key)
    wrong = (torch.as_tensor(mask).expand_as(seen) != seen).any(1).nonzero()
    if not len(wrong):
        return None
    first = int(wrong[0])
    return numbers[first - 1] + 1 if first else 0
