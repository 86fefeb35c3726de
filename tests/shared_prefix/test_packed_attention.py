"""The layout's index maths and the fast attention, against rows run one by one and against the dense oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_prompt_ext.shared_prefix.attention import reference
from peft_prompt_ext.shared_prefix.attention.sdpa import packed_attention
from peft_prompt_ext.shared_prefix.layout import pack


HEADS, GROUPS, SIZE = 6, 3, 5  # A, G, D


@st.composite
def layouts(draw):
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    bits = st.lists(st.booleans(), min_size=columns, max_size=columns)
    mask = torch.tensor(draw(st.lists(bits, min_size=rows, max_size=rows)))
    lengths = tuple(draw(st.lists(st.integers(0, 6), min_size=1, max_size=3)))
    which = draw(st.lists(st.integers(0, len(lengths) - 1), min_size=rows, max_size=rows))
    return pack(mask.long(), lengths, torch.tensor(which)), mask


def tokens(layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = layout.position_ids.shape[1]
    return tuple(
        torch.randn(1, heads, count, SIZE, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    )


@settings(max_examples=150, deadline=None)
@given(layouts(), st.sampled_from([None, 1, 2, 4, 100]), st.sampled_from([None, 3.0]), st.sampled_from([None, 0.3]))
def test_outputs_and_gradients_equal_the_dense_oracles(case, sliding_window, softcap, scaling):
    layout, _ = case
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
@given(layouts(), st.sampled_from([None, 2]))
def test_queries_of_the_text_alone_give_the_texts_outputs(case, sliding_window):
    layout, _ = case
    if not len(layout.text):
        return
    query, key, value = tokens(layout)
    for function in (packed_attention, reference.packed_attention):
        whole = function(query, key, value, layout, sliding_window=sliding_window)
        text = function(query[:, :, layout.num_prompt_tokens :], key, value, layout, sliding_window=sliding_window)
        torch.testing.assert_close(text, whole[:, layout.num_prompt_tokens :], rtol=1e-9, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(layouts(), st.data())
def test_the_oracle_sees_the_own_prompt_and_the_own_text_causally_and_nothing_else(case, data):
    layout, mask = case
    begins = torch.tensor([[data.draw(st.booleans()) for _ in row] for row in mask])
    layout = pack(mask, layout.prompt_lengths, layout.prompt_of_row, begins)
    seen, places = reference.make_mask(layout), places_of(layout)
    starts = torch.tensor([0, *layout.prompt_lengths]).cumsum(0).tolist()
    for row, real in enumerate(mask):
        number, text = int(layout.prompt_of_row[row]), set()
        for column in real.nonzero()[:, 0].tolist():
            text = {places[row, column]} | (set() if begins[row, column] else text)
            prompt = set(range(starts[number], starts[number + 1]))
            assert set(seen[places[row, column]].nonzero()[:, 0].tolist()) == prompt | text
            position = layout.position_ids[0, places[row, column]]
            assert position == layout.prompt_lengths[number] + len(text) - 1
    for number, length in enumerate(layout.prompt_lengths):
        for k in range(length):
            token = starts[number] + k
            assert seen[token].nonzero()[:, 0].tolist() == list(range(starts[number], token + 1))


def places_of(layout):
    """Find the place of each real token in the packed sequence, by row and column."""
    rows, columns = layout.source // layout.shape[1], layout.source % layout.shape[1]
    tokens = zip(rows.tolist(), columns.tolist(), strict=True)
    return {token: layout.num_prompt_tokens + number for number, token in enumerate(tokens)}


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_positions_run_on_from_the_prompt_and_columns_find_their_tokens(case):
    layout, mask = case
    sources, previous, longest = layout.column_sources(), layout.previous(), max(layout.prompt_lengths)
    assert sources.shape == (len(mask), longest + mask.shape[1])
    for row, real in enumerate(mask):
        length = layout.prompt_lengths[int(layout.prompt_of_row[row])]
        places = sources[row][sources[row] >= 0]
        assert layout.position_ids[0, places].tolist() == list(range(length + int(real.sum())))
        assert (sources[row, longest:] >= 0).tolist() == real.tolist()
        assert (sources[row, :longest] >= 0).sum() == length
        assert layout.last[row] == (places[-1] if len(places) else layout.last[row])
        own = layout.source // mask.shape[1] == row
        assert previous[own].tolist() == [-1, *places.tolist()][length : length + int(real.sum())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_reaches_both_parts(dtype):
    layout = pack(torch.ones(2, 3), (4,))
    query, key, value = (x.detach().to(dtype) for x in tokens(layout))
    kept, dropped = (packed_attention(query, key, value, layout, dropout=p) for p in (0.0, 0.5))
    assert not torch.equal(kept[:, :4], dropped[:, :4])
    assert not torch.equal(kept[:, 4:], dropped[:, 4:])
    assert kept.dtype == dtype
