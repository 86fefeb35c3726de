"""How long a row and a whole pack may be: what changes far behind the few tokens of a proof.

Nothing long runs for it. A row is told late positions, a pack late places, and the model's own mask functions are
asked about late tokens. Where that changes what it must not, the length at which it begins is a number of the
config, and it is searched among them.

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
from .interface import IMPLEMENTATIONS, Listener, NotPackable
from .layout import PackedLayout
from .packed_pass import PackedPass


FAR = 2**20  # places that a pack is told, and positions of a model that has no number of them
# what two runs on tensors of the same shapes may differ by, in float32 and below
EXACT, ROUNDED = 1e-5, 1e-2


class Trial(NamedTuple):
    """A packed batch that can run again and again.

    Attributes:
        config: The text model's.
        layout: Makes the batch's layout.
        run: Runs the batch in a packed pass.
        run_alone: Runs the model on a row of its own, with the keyword arguments that it is given.
        last: Tokens of the last row, without its prompt.
        positions: How many positions the model has.
        exact: The model computes in float32, with weights that are not quantised.
    """

    config: Any
    layout: Callable[[], PackedLayout]
    run: Callable[[PackedPass], Any]
    run_alone: Callable[..., Any]
    last: int
    positions: int
    exact: bool


def longest(trial: Trial) -> tuple[int | None, int | None]:
    """The longest row and the longest pack of which the trial's result holds as well; None: there is no limit.

    Raises:
        NotPackable: It does not hold for any, or nobody can tell.
    """
    before = _run(trial, trial.layout())
    pack, row = _longest_pack(trial, before), _longest_mask(trial)
    try:
        rows = [limit for limit in (row, _longest_row(trial, before)) if limit is not None]
    finally:
        trial.run(PackedPass(trial.layout()))  # rotary positions that grew with a row shrink again
    return min(rows, default=None), pack


def _longest_row(trial: Trial, before: list[torch.Tensor]) -> int | None:
    """The longest row beside which the others stay as they are."""
    positions = trial.layout().position_ids[0]
    others, length_now = len(positions) - trial.last, int(positions[-1]) + 1

    def unchanged(length: int) -> bool:
        layout = trial.layout()
        layout.position_ids = layout.position_ids.clone()
        layout.position_ids[:, others:] += length - length_now
        return _same(_run(trial, layout), before, others, trial.exact)

    found = _search(unchanged, _numbers(trial.config, length_now, trial.positions))
    if found == 0:
        raise NotPackable("a row's positions change what other rows give")
    return found


def _longest_pack(trial: Trial, before: list[torch.Tensor]) -> int | None:
    """The longest pack in which a token's place does not matter."""
    tokens = trial.layout().position_ids.shape[1]

    def unchanged(length: int) -> bool:
        with _LatePlaces(tokens, length - tokens):
            return _same(_run(trial, trial.layout()), before, tokens, trial.exact)

    found = _search(unchanged, _numbers(trial.config, tokens, FAR))
    if found == 0:
        raise NotPackable("its layers count the tokens of the whole batch")
    return found


def _longest_mask(trial: Trial) -> int | None:
    """The longest row whose tokens see in the model's own masks what they see in packed attention."""
    layers: dict[Any, None] = {}  # mask function and window of each layer, each pair once

    def hear(module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any) -> None:
        function: Any = causal_mask_function
        if attention_mask is not None:
            function = functions.get(attention_mask.data_ptr())
            if function is None:
                raise NotPackable(f"it makes an attention mask of its own, {list(attention_mask.shape)}")
        layers[function, kwargs.get("sliding_window")] = None

    listener = Listener(hear)
    with _mask_functions() as functions:
        trial.run_alone(**listener.arguments)
    try:
        limits = [_first_difference(function, window, trial) for function, window in layers]
    except Exception as error:  # made for the tokens of one batch
        raise NotPackable(f"its masks cannot be asked about late tokens ({error})") from error
    found = min((limit for limit in limits if limit is not None), default=None)
    if found == 0:
        raise NotPackable("its masks are not those of causal attention")
    return found


def _numbers(config: Any, least: int, most: int) -> list[int]:
    """The lengths at which a number of the config may make a difference, in order; the last is `most`."""
    found = {most}
    values = [config.to_dict()]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values += value.values()
        elif isinstance(value, (list, tuple)):
            values += value
        elif isinstance(value, int):  # a length counts its own token, a place does not
            found |= {value - 1, value}
    return sorted(number for number in found if least < number <= most)


def _search(holds: Callable[[int], bool], numbers: list[int]) -> int | None:
    """The last number that holds, given that those behind it do not; 0 if none does, None if all do."""
    if not numbers or holds(numbers[-1]):
        return None
    low, high = 0, len(numbers) - 1  # all before `low` hold, that at `high` does not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if holds(numbers[middle]) else (low, middle)
    return numbers[low - 1] if low else 0


def _run(trial: Trial, layout: PackedLayout) -> list[torch.Tensor]:
    """Queries, keys and values of every layer, [1, N, heads, D] each."""
    seen: list[torch.Tensor] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            seen.extend(x.transpose(1, 2).clone() for x in (query, key, value))
            return packed_attention(query, key, value, *args, **kwargs)

    trial.run(PackedPass(layout, attend))
    return seen


def _same(got: list[torch.Tensor], want: list[torch.Tensor], tokens: int, exact: bool) -> bool:
    """Whether the first tokens are what they were."""
    differences = [
        (x[:, :tokens].float() - y[:, :tokens].float()).norm() / y[:, :tokens].float().norm()
        for x, y in zip(got, want, strict=True)
    ]
    return bool(torch.stack([d.cpu() for d in differences]).max() <= (EXACT if exact else ROUNDED))


class _LatePlaces(TorchFunctionMode):
    """Tells a model that its tokens stand `shift` places further behind.

    A model knows places from `arange` or `cumsum` over the sequence. Whatever it computes from them is computed of
    the late ones beside it; the model gets that where it is a number or a comparison. Whole numbers may be indices
    into the sequence, which is no longer than it was.
    """

    def __init__(self, tokens: int, shift: int) -> None:
        super().__init__()
        self.tokens, self.shift = tokens, shift
        self.late = WeakIdKeyDictionary()  # by what it is for an index

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        given = (args, kwargs or {})
        late = tree_map(self._late, given)
        if any(word in name for word in _LOOKUPS):  # what is looked up may be places, where stays where
            late = ((*late[0][:1], *args[1:]), given[1])
        is_counted = any(x is not y for x, y in zip(tree_iter(late), tree_iter(given), strict=True))
        if is_counted and name.endswith("_") and late[0][0] is args[0]:  # into a tensor that is no place
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

    def _late(self, value: Any) -> Any:
        return self.late.get(value, value) if isinstance(value, torch.Tensor) else value


_LOOKUPS = ("getitem", "setitem", "embedding", "index", "gather", "scatter", "take", "one_hot")


@contextmanager
def _mask_functions() -> Iterator[dict[int, Any]]:
    """By the place of its mask in memory, each mask function that a model uses inside."""
    functions: dict[int, Any] = {}
    masks = []  # so that no other tensor gets the place of one
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


def _first_difference(function: Any, window: int | None, trial: Trial) -> int | None:
    """The longest row of which a mask function and a window show the same; 0 if there is none, None if all."""
    numbers = [0, 1, 2, *_numbers(trial.config, 2, trial.positions)]
    numbers = sorted({*numbers, *(number + 1 for number in numbers)})
    ends = torch.tensor(numbers)
    distances = torch.tensor([*numbers, *(-number for number in numbers[1:])])
    query = ends[:, None].expand(-1, 3 * len(numbers) - 1)
    key = torch.cat([ends[:, None] - distances, ends.expand(len(ends), -1)], 1)
    key = key.clamp(min=0)
    seen = key <= query
    if window is not None:
        seen = seen & (query - key < window)
    none = torch.zeros((), dtype=torch.long)
    shown = function(none, none, query, key)
    wrong = (torch.as_tensor(shown).expand_as(seen) != seen).any(1).nonzero()
    if not len(wrong):
        return None
    first = int(wrong[0])
    return numbers[first - 1] + 1 if first else 0
