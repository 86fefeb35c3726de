"""Inputs and outputs per token are recognised by their shape."""

import pytest
import torch
from transformers.modeling_outputs import ModelOutput

from peft_prompt_ext.labels import IGNORE_INDEX
from peft_prompt_ext.peft_models.tokens import (
    VIRTUAL_TOKEN_VALUES,
    check_mask,
    cut_prompt,
    put_back,
    shift_column,
    shift_positions,
    widen,
)


B, T, P = 3, 7, 5
W = P + T
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 0, 0, 1, 0]])
WIDE_MASK = torch.cat([torch.ones(B, P, dtype=torch.long), MASK], 1)
ORDER = (WIDE_MASK == 0).long().argsort(dim=1, stable=True)  # pads behind
COLUMNS = torch.arange(W).expand(B, W)


# --- arguments


def widened(**arguments):
    return widen(arguments, {**VIRTUAL_TOKEN_VALUES, "labels": IGNORE_INDEX}, set(), (B, T), P)


@pytest.mark.parametrize(
    ("name", "first"), [("attention_mask", 1), ("token_type_ids", 0), ("labels", -100), ("bbox", 0)]
)
def test_known_arguments_get_values_of_virtual_tokens(name, first):
    rest = (4,) if name == "bbox" else ()
    value = torch.full((B, T, *rest), 9)

    wide = widened(**{name: value})[name]

    assert wide.shape == (B, W, *rest) and wide.dtype == value.dtype
    assert (wide[:, :P] == first).all() and torch.equal(wide[:, P:], value)


@pytest.mark.parametrize("name", ["attention_mask", "token_type_ids", "labels", "bbox"])
@pytest.mark.parametrize("shape", [(B, T - 1), (B, W), (B - 1, T)])
def test_a_known_argument_of_another_size_is_refused(name, shape):
    with pytest.raises(ValueError, match=rf"{name} is \[{shape[0]}, {shape[1]}\].*\[3, 7\]"):
        widened(**{name: torch.ones(shape, dtype=torch.long)})


@pytest.mark.parametrize("shape", [(B, T), (B, T, 2), (B, T, T), (2, B, T), (1, T), (T,)], ids=str)
def test_an_unknown_argument_as_long_as_the_text_is_refused_by_name(shape):
    with pytest.raises(ValueError, match=r"loss_weights is \[.*as long as the text.*Leave it out"):
        widened(loss_weights=torch.ones(shape))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decoder_input_ids", torch.ones(B, T)),
        ("pixel_values", torch.ones(B, T, 4, 4)),
        ("image_grid_thw", torch.ones(T, 3)),
        ("logits_to_keep", torch.arange(T)),
        ("loss_weights", torch.ones(B, T + 1)),
        ("temperature", 0.5),
        ("num_items_in_batch", torch.tensor(T)),
    ],
)
def test_other_arguments_are_unchanged(name, value):
    arguments = {name: value}

    assert widen(arguments, VIRTUAL_TOKEN_VALUES, set(), (B, T), P) == {}
    assert arguments == {name: value}


def test_labels_of_rows_are_left_alone_also_where_they_are_as_many_as_the_tokens():
    arguments = {"labels": torch.ones(B, T)}

    assert widen(arguments, VIRTUAL_TOKEN_VALUES, {"labels"}, (B, T), P) == {} and list(arguments) == ["labels"]


@pytest.mark.parametrize(
    "mask", [torch.ones(B, T + 1), torch.ones(B, W), torch.ones(B, 1, T, T), torch.ones(T), {"full": MASK}], ids=str
)
def test_a_mask_that_is_not_one_value_a_token_is_refused(mask):
    with pytest.raises(ValueError, match=r"attention_mask is .*\[3, 7\]"):
        check_mask(mask, B, T)


def test_positions_that_count_on_count_on_from_the_prompt():
    counted = torch.tensor([[1, 1, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6], [1, 4, 5, 1, 1, 6, 1]])  # 1 at pads

    wide = shift_positions(counted, MASK, B, P)

    for row, real in enumerate(WIDE_MASK.bool()):
        start = 4 if row == 2 else 0
        assert wide[row, real].tolist() == list(range(start, start + int(real.sum())))


@pytest.mark.parametrize(
    "positions",
    [[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 5, 6, 7], [0] * 7, [6, 5, 4, 3, 2, 1, 0]],
    ids=["two texts", "a gap", "all the same", "backwards"],
)
def test_positions_that_do_not_count_on_are_refused(positions):
    with pytest.raises(ValueError, match="one by one"):
        shift_positions(torch.tensor([positions]), None, B, P)


def test_positions_of_three_axes_are_refused():
    with pytest.raises(ValueError, match=r"position_ids \[3, 3, 7\]"):
        shift_positions(torch.arange(T).expand(3, B, T), None, B, P)


@pytest.mark.parametrize("order", [None, ORDER])
def test_a_column_stands_where_its_token_went(order):
    column = torch.tensor([3, 0, 5])

    behind = shift_column(column, P, order)

    seen = COLUMNS if order is None else order
    assert seen.gather(1, behind[:, None])[:, 0].tolist() == (column + P).tolist()
    assert shift_column(torch.tensor([T, T, 99]), P, order).tolist() == [W, W, 99 + P]
    assert shift_column(torch.tensor([-1, -1, -1]), P, None).tolist() == [P] * B  # as in transformers


# --- outputs

STATES = torch.randn(B, W, 11)
WEIGHTS = torch.randn(B, 2, W, W)


def seen(x, *axes):
    """Make the outputs of a base model with reordered columns."""
    for axis in axes:
        index = ORDER.reshape(B, *[W if a == axis else 1 for a in range(1, x.dim())]).expand_as(x)
        x = x.gather(axis, index)
    return x


FIELDS = {
    "of a vector": (STATES, (1,)),
    "of a number": (STATES[..., 0], (1,)),
    "as wide as the columns": (torch.randn(B, W, W), (1,)),
    "attention": (WEIGHTS, (2, 3)),
    "with as many heads": (torch.randn(B, W, W, W), (2, 3)),
    "cross_attentions": (WEIGHTS, (3,)),
    "cross_attentions of another length": (WEIGHTS[:, :, :2], (3,)),
    "of a row": (torch.randn(B, 11), ()),
    "of nothing": (torch.randn(()), ()),
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("layers", [False, True])
def test_an_output_comes_back_in_the_callers_order_whatever_its_name(field, layers):
    wanted, axes = FIELDS[field]
    given = seen(wanted, *axes)
    output = ModelOutput({field: (given, (given,)) if layers else given})

    put_back(output, [field], ORDER)

    got = output[field]
    for one in (got[0], got[1][0]) if layers else (got,):
        torch.testing.assert_close(one, wanted, rtol=0, atol=0)


def test_tokens_in_one_line_come_back():
    output = ModelOutput(router=seen(STATES, 1).flatten(0, 1))

    put_back(output, ["router"], ORDER)

    assert torch.equal(output["router"], STATES.flatten(0, 1))


def test_what_predicts_the_next_column_comes_back_at_the_real_ones():
    """[B, W-1]: item i belongs to column i+1."""
    at_columns = seen(STATES, 1)[:, 1:]
    output = ModelOutput(log_probs=at_columns)

    put_back(output, ["log_probs"], ORDER, predicts_next=True)

    assert torch.equal(output["log_probs"], STATES[:, 1:])


def test_fields_that_are_not_named_and_caches_stay_as_they_are():
    cache = object()
    output = ModelOutput(pooled=STATES, cache=cache)

    put_back(output, ["cache"], ORDER)

    assert output["pooled"] is STATES and output["cache"] is cache


@pytest.mark.parametrize("predicts_next", [False, True])
def test_the_prompts_columns_are_cut_off_every_tensor_of_tokens(predicts_next):
    output = ModelOutput(
        logits=STATES, scores=STATES[:, :-1], start=STATES[..., 0], loss=torch.zeros(()), hidden=(STATES,), rest=STATES
    )

    cut_prompt(output, set(output) - {"rest"}, (B, T), P, predicts_next)

    assert torch.equal(output["logits"], STATES[:, P:]) and torch.equal(output["start"], STATES[:, P:, 0])
    assert torch.equal(output["hidden"][0], STATES[:, P:]) and output["loss"].dim() == 0
    assert torch.equal(output["scores"], STATES[:, P:-1] if predicts_next else STATES[:, :-1])
    assert output["rest"] is STATES
