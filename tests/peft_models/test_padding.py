"""For every task, a row's outputs in a padded batch are its outputs alone, with pads anywhere."""

import pytest
import torch

from tests.helpers import make_batch, one_thread, prompted  # noqa: F401
from tests.zoo import CASES


P = 5
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 0, 0, 1, 0]])
OF_TOKENS = {
    "TOKEN_CLS": ["logits"],
    "QUESTION_ANS": ["start_logits", "end_logits"],
    "FEATURE_EXTRACTION": ["last_hidden_state"],
}


def model_and_batch(build_model, architecture, task_type):
    model = prompted(build_model(architecture, task_type), task_type, shared_prefix=False).eval()
    batch = make_batch(task_type)
    batch["input_ids"] = batch["input_ids"].masked_fill(MASK == 0, 2)
    batch["attention_mask"] = MASK.clone()
    if task_type == "TOKEN_CLS":
        batch["labels"] = batch["labels"].masked_fill(MASK == 0, -100)
    if task_type == "QUESTION_ANS":
        batch["start_positions"], batch["end_positions"] = torch.tensor([3, 2, 2]), torch.tensor([6, 4, 99])
    return model, batch


def alone(batch, task_type, row):
    """The row without its pads."""
    real = MASK[row].bool()
    one = {name: x[row, real][None] for name, x in batch.items() if name in {"input_ids", "attention_mask"}}
    labels = batch.get("labels")
    if labels is not None:
        one["labels"] = labels[row, real][None] if task_type == "TOKEN_CLS" else labels[row][None]
    for name in ("start_positions", "end_positions"):
        if name in batch:
            column = int(batch[name][row])
            one[name] = torch.tensor([int(real[:column].sum()) if column < len(real) else column])
    return one


@pytest.mark.filterwarnings("ignore:.*will not detect padding:UserWarning")
@pytest.mark.parametrize(("architecture", "task_type"), [case for case in CASES if case[1] != "CAUSAL_LM"])
def test_a_rows_outputs_are_its_outputs_alone(build_model, architecture, task_type):
    model, batch = model_and_batch(build_model, architecture, task_type)

    together = model(**batch)

    losses = []
    for row, real in enumerate(MASK.bool()):
        one = model(**alone(batch, task_type, row))
        losses.append(one.get("loss"))
        for name in OF_TOKENS.get(task_type, ["logits"]):
            got = together[name][row]
            if task_type == "FEATURE_EXTRACTION":
                got = torch.cat([got[:P], got[P:][real]])
            elif task_type in OF_TOKENS:
                got = got[real]
            torch.testing.assert_close(got, one[name][0], rtol=1e-5, atol=1e-5)
    if task_type == "SEQ_CLS":
        torch.testing.assert_close(together.loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)
    if task_type == "TOKEN_CLS":
        each = torch.stack(losses) * MASK.sum(1) / MASK.sum()
        torch.testing.assert_close(together.loss, each.sum(), rtol=1e-5, atol=1e-5)


def test_positions_that_are_given_move_with_their_tokens(build_model):
    model, batch = model_and_batch(build_model, "gpt2", "SEQ_CLS")
    positions = 11 + (MASK.cumsum(1) - 1).clamp(min=0)

    together = model(**batch, position_ids=positions).logits

    for row, real in enumerate(MASK.bool()):
        one = model(**alone(batch, "SEQ_CLS", row), position_ids=positions[row, real][None]).logits[0]
        torch.testing.assert_close(together[row], one, rtol=1e-5, atol=1e-5)


def test_answer_positions_move_with_their_tokens(build_model):
    model, batch = model_and_batch(build_model, "bert", "QUESTION_ANS")
    order = [row.nonzero()[:, 0].tolist() + (row == 0).nonzero()[:, 0].tolist() for row in MASK]
    behind = {name: x.gather(1, torch.tensor(order)) for name, x in batch.items() if x.dim() == 2}
    for name in ("start_positions", "end_positions"):
        columns = batch[name].tolist()
        behind[name] = torch.tensor([row.index(c) if c < 7 else c for row, c in zip(order, columns, strict=True)])

    torch.testing.assert_close(model(**batch).loss, model(**behind).loss)


@pytest.mark.parametrize(
    ("architecture", "task_type"), [("bert", "TOKEN_CLS"), ("t5", "SEQ_2_SEQ_LM"), ("llama", "SEQ_CLS")]
)
def test_hidden_states_and_attentions_stand_at_their_columns(build_model, architecture, task_type):
    base = build_model(architecture, task_type, attn_implementation="eager")
    model = prompted(base, task_type, shared_prefix=False).eval()
    _, batch = model_and_batch(build_model, architecture, task_type)
    asked = {"output_hidden_states": True, "output_attentions": True}
    side = "encoder_" if architecture == "t5" else ""

    together = model(**batch, **asked)

    for row, real in enumerate(MASK.bool()):
        one = model(**alone(batch, task_type, row), **asked)
        places = torch.cat([torch.arange(P), P + real.nonzero()[:, 0]])
        torch.testing.assert_close(
            together[side + "hidden_states"][-1][row, places], one[side + "hidden_states"][-1][0]
        )
        weights = together[side + "attentions"][-1][row]
        torch.testing.assert_close(weights[:, places][:, :, places], one[side + "attentions"][-1][0])
        if architecture == "t5":
            torch.testing.assert_close(together.cross_attentions[-1][row][:, :, places], one.cross_attentions[-1][0])


def test_encoder_decoders_generate_what_they_generate_alone(build_model):
    model, batch = model_and_batch(build_model, "t5", "SEQ_2_SEQ_LM")
    options = {"max_new_tokens": 5, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    together = model.generate(input_ids=batch["input_ids"], attention_mask=MASK, **options).scores
    for row in range(len(MASK)):
        one = alone(batch, "SEQ_2_SEQ_LM", row)
        del one["labels"]
        scores = model.generate(**one, **options).scores
        torch.testing.assert_close(torch.cat(scores), torch.stack([step[row] for step in together]))
