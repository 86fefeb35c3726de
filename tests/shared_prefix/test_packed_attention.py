"""The layout's index maths and the fast attention, against rows run one by one and against the dense oracle."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_prompt_ext.shared_prefix.attention import reference
from peft_prompt_ext.shared_prefix.attention.sdpa import packed_attention
from peft_prompt_ext.shared_prefix.layout import pack, pack_behind


HEADS, GROUPS, SIZE = 6, 3, 5  # A, G, D


@st.composite
def layouts(draw):
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    bits = st.lists(st.booleans(), min_size=columns, max_size=columns)
    mask = torch.tensor(draw(st.lists(bits, min_size=rows, max_size=rows)))
    lengths = tuple(draw(st.lists(st.integers(0, 6), min_size=1, max_size=3)))
    which = draw(st.lists(st.integers(0, len(lengths) - 1), min_size=rows, max_size=rows))
    return pack(mask.long(), lengths, torch.tensor(which)), mask


@st.composite
def layouts_behind(draw):
    """Prompts in front of some texts and behind others; rows with the same mask may share their text."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    bits = st.lists(st.booleans(), min_size=columns, max_size=columns)
    mask = torch.tensor(draw(st.lists(bits, min_size=rows, max_size=rows)))
    lengths = tuple(draw(st.lists(st.integers(0, 6), min_size=1, max_size=3)))
    which = torch.tensor(draw(st.lists(st.integers(0, len(lengths) - 1), min_size=rows, max_size=rows)))
    start = torch.tensor(draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows)))
    if draw(st.booleans()) and rows > 1:
        mask[1], start[1] = mask[0], start[0]
    shares = draw(st.booleans())
    texts = [bytes(row[:end].tolist()) if shares else object() for row, end in zip(mask, start.tolist(), strict=True)]
    return pack_behind(mask.long(), lengths, which, start, texts), mask, which, start, lengths


def assert_equal_with_kept_trunks(function, layout, **options):
    """Outputs and gradients of the branches, whose trunks are constants, are those of the dense oracle."""
    count = layout.num_trunk_tokens
    whole = tokens(layout)
    want = reference.packed_attention(*whole, layout, **options)[:, count:]
    weight = torch.arange(want.numel(), dtype=want.dtype).view(want.shape).sin()
    gradients = torch.autograd.grad((want * weight).sum(), whole)
    branches = [x.detach()[:, :, count:].requires_grad_() for x in whole]
    got = function(*branches, layout, kept=tuple(x.detach()[:, :, :count] for x in whole[1:]), **options)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for mine, other in zip(torch.autograd.grad((got * weight).sum(), branches), gradients, strict=True):
        torch.testing.assert_close(mine, other[:, :, count:], rtol=1e-9, atol=1e-9)


def tokens(layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = layout.position_ids.shape[1]
    return tuple(
        torch.randn(1, heads, count, SIZE, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    )


@settings(max_examples=200, deadline=None)
@given(
    layouts() | layouts_behind(),
    st.sampled_from([None, 1, 2, 4, 100]),
    st.sampled_from([None, 3.0]),
    st.sampled_from([None, 0.3]),
)
def test_outputs_and_gradients_equal_the_dense_oracles(case, sliding_window, softcap, scaling):
    layout, *_ = case
    if layout.position_ids.shape[1] == 0:
        return  # neither a virtual nor a real token
    results = []
    for function in (packed_attention, reference.packed_attention):
        inputs = tokens(layout)
        out = function(*inputs, layout, scaling=scaling, sliding_window=sliding_window, softcap=softcap)
        weight = torch.arange(out.numel(), dtype=out.dtype).view(out.shape).sin()
        results.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(layouts() | layouts_behind(), st.sampled_from([None, 2]))
def test_branches_with_kept_trunks_have_their_outputs_and_gradients(case, sliding_window):
    layout, *_ = case
    if not len(layout.branch):
        return
    for function in (packed_attention, reference.packed_attention):
        assert_equal_with_kept_trunks(function, layout, sliding_window=sliding_window)


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_branches_that_share_a_long_text_do_not_copy_it(scaling):
    mask = torch.tensor([[1] * 11 + [1, 0]] * 3)
    mask[1, 12] = 1
    layout = pack_behind(mask, (2, 3), torch.tensor([0, 1, 1]), torch.tensor([11, 11, 11]), "aaa")
    query, key, value = (x.detach() for x in tokens(layout))
    with torch.no_grad():
        want = reference.packed_attention(query, key, value, layout, scaling=scaling)
        torch.testing.assert_close(packed_attention(query, key, value, layout, scaling=scaling), want)
        branches = [x[:, :, 11:] for x in (query, key, value)]
        got = packed_attention(*branches, layout, kept=(key[:, :, :11], value[:, :, :11]), scaling=scaling)
    torch.testing.assert_close(got, want[:, 11:])


@settings(max_examples=100, deadline=None)
@given(layouts(), st.data())
def test_the_oracle_sees_the_own_prompt_and_the_own_text_causally_and_nothing_else(case, data):
    layout, mask = case
    begins = torch.tensor([[data.draw(st.booleans()) for _ in row] for row in mask])
    which = data.draw(st.lists(st.integers(0, len(layout.trunk_lengths) - 1), min_size=len(mask), max_size=len(mask)))
    layout = pack(mask, layout.trunk_lengths, torch.tensor(which), begins)
    seen, places = reference.make_mask(layout), layout.places_of_text()
    starts = torch.tensor([0, *layout.trunk_lengths]).cumsum(0).tolist()
    for row, real in enumerate(mask):
        number, text = which[row], set()
        for column in real.nonzero()[:, 0].tolist():
            place = int(places[row, column])
            text = {place} | (set() if begins[row, column] else text)
            prompt = set(range(starts[number], starts[number + 1]))
            assert set(seen[place].nonzero()[:, 0].tolist()) == prompt | text
            assert layout.position_ids[0, place] == layout.trunk_lengths[number] + len(text) - 1
    for number, length in enumerate(layout.trunk_lengths):
        for k in range(length):
            token = starts[number] + k
            assert seen[token].nonzero()[:, 0].tolist() == list(range(starts[number], token + 1))


@settings(max_examples=200, deadline=None)
@given(layouts_behind())
def test_a_row_is_its_text_its_prompt_and_its_answer_in_this_order(case):
    """Each row's columns are its real tokens with the prompt at its place; each sees those before it in the row."""
    layout, mask, which, start, lengths = case
    starts, columns = [0, *itertools.accumulate(lengths)], mask.shape[1]
    seen, longest = reference.make_mask(layout), max(lengths)

    def name(source):  # rows that share a text have the same columns there
        return source if source < starts[-1] else ("column", (source - starts[-1]) % columns)

    for row, real in enumerate(mask):
        prompt, begin = int(which[row]), int(start[row])
        virtual = [*range(starts[prompt], starts[prompt + 1])]
        text = [("column", column) for column in real.nonzero()[:, 0].tolist()]
        in_front = int(real[:begin].sum())
        places = layout.columns[row][layout.columns[row] >= 0]
        wanted = [*text[:in_front], *virtual, *text[in_front:]]
        assert [name(source) for source in layout.sources[places].tolist()] == wanted
        assert layout.position_ids[0, places].tolist() == list(range(len(wanted)))
        for number, place in enumerate(places.tolist()):
            assert sorted(seen[place].nonzero()[:, 0].tolist()) == sorted(places[: number + 1].tolist())
            assert layout.previous()[place] == (places[number - 1] if number else -1)
        assert (layout.columns[row, begin : begin + longest] >= 0).sum() == len(virtual)
        if len(places):
            assert layout.last[row] == places[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_reaches_both_parts(dtype):
    layout = pack(torch.ones(2, 3), (4,))
    query, key, value = (x.detach().to(dtype) for x in tokens(layout))
    kept, dropped = (packed_attention(query, key, value, layout, dropout=p) for p in (0.0, 0.5))
    assert not torch.equal(kept[:, :4], dropped[:, :4])
    assert not torch.equal(kept[:, 4:], dropped[:, 4:])
    assert kept.dtype == dtype
