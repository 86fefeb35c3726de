"""Rows that hold several texts, and heads without logits, give what each text gives alone."""

import functools
import types
from dataclasses import dataclass

import pytest
import torch
from transformers import DataCollatorWithFlattening
from transformers.utils import ModelOutput

from peft_prompt_ext import engine_status
from peft_prompt_ext.shared_prefix.layout import find_texts
from tests.helpers import make_batch, one_thread, prompt_of, prompted  # noqa: F401
from tests.shared_prefix.helpers import PACKED, mixed_model, padded


P = 5
LENGTHS = (4, 1, 7, 2)


def texts(seed=3):
    ids = make_batch("CAUSAL_LM", rows=1, text=sum(LENGTHS), seed=seed)["input_ids"][0]
    return list(ids.split(LENGTHS))


def flattened(rows=1, **options):
    """Make a padding-free batch of the Trainer; a text's first token has no label."""
    features = [{"input_ids": text.tolist(), "labels": text.tolist()} for text in texts()]
    return DataCollatorWithFlattening(return_tensors="pt", **options)(features)


def alone(model):
    """Compute each text's logits with its prompt, and the loss of all labels except first tokens."""
    logits = [model(input_ids=text[None]).logits[0, P:] for text in texts()]
    pairs = [(x[:-1], text[1:]) for x, text in zip(logits, texts(), strict=True)]
    loss = torch.nn.functional.cross_entropy(*map(torch.cat, zip(*pairs, strict=True)))
    return torch.cat(logits), loss


@pytest.mark.parametrize("kernel_arguments", [False, True])
@pytest.mark.parametrize("architecture", PACKED)
def test_a_row_of_several_texts_gives_what_each_gives_alone(build_model, architecture, kernel_arguments):
    model = prompted(build_model(architecture), "CAUSAL_LM")
    options = {"return_flash_attn_kwargs": True, "return_seq_idx": True} if kernel_arguments else {}
    wanted, wanted_loss = alone(model)
    (wanted_grad,) = torch.autograd.grad(wanted_loss, prompt_of(model))

    out = model(**flattened(**options))
    out.loss.backward()

    assert engine_status(model).packed, engine_status(model).reason
    assert out.logits.shape[:2] == (1, P + sum(LENGTHS))
    torch.testing.assert_close(out.logits[0, P:], wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(out.loss, wanted_loss, rtol=1e-5, atol=0)
    assert (prompt_of(model).grad - wanted_grad).norm() <= 1e-5 * wanted_grad.norm()


def test_labels_of_logits_alone_and_of_first_tokens(build_model):
    """A first token is predicted by its prompt, never by the text before."""
    model = prompted(build_model("llama"), "CAUSAL_LM", train_logits="supervised").train()
    batch = flattened()
    batch["labels"] = batch["input_ids"].clone()
    losses, count = 0, 0
    for text in texts():
        losses += model(input_ids=text[None], labels=text[None]).loss * len(text)
        count += len(text)

    torch.testing.assert_close(model(**batch).loss, losses / count, rtol=1e-5, atol=0)


def test_padded_rows_of_several_texts_with_prompts_of_their_own(build_model):
    model = mixed_model(build_model).eval()
    one, two, three, four = texts()
    ids, positions, mask = torch.full((2, 11), 2), torch.zeros(2, 11, dtype=torch.long), torch.zeros(2, 11)
    rows = ((one, two), 6), ((three, four), 0)
    for row, (parts, start) in enumerate(rows):
        for part in parts:
            place = slice(start, start + len(part))
            ids[row, place], positions[row, place], mask[row, place] = part, torch.arange(len(part)), 1
            start += len(part)

    out = model(input_ids=ids, position_ids=positions, attention_mask=mask, adapter_names=["b", "c"]).logits

    for row, (name, parts) in enumerate((("b", (one, two)), ("c", (three, four)))):
        model.set_adapter(name)
        wanted = [model(input_ids=part[None]).logits[0, -len(part) :] for part in parts]
        torch.testing.assert_close(out[row, 9:][mask[row] > 0], torch.cat(wanted), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_positions_of_one_text_a_row_change_nothing(build_model, shared_prefix):
    model = prompted(build_model("llama"), "CAUSAL_LM", shared_prefix=shared_prefix)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ids = make_batch("CAUSAL_LM", rows=2, text=5)["input_ids"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    want = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got[:, P:][mask > 0], want[:, P:][mask > 0], rtol=0, atol=1e-5)
    assert engine_status(model).packed == shared_prefix


def test_several_texts_in_a_row_are_refused_on_pefts_path(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM", shared_prefix=False)
    with pytest.raises(ValueError, match="position_ids"):
        model(**flattened())
    with pytest.raises(ValueError, match="hold several texts"):
        model(**flattened(return_flash_attn_kwargs=True, return_position_ids=False))
    classifier = prompted(build_model("llama", "SEQ_CLS"), "SEQ_CLS")
    batch = flattened()
    with pytest.raises(ValueError, match="position_ids"):
        classifier(input_ids=batch["input_ids"], position_ids=batch["position_ids"])


def test_positions_that_skip_are_refused(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM")
    ids = texts()[2][None]
    with pytest.raises(ValueError, match="position_ids"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 5, 6, 7, 8]]))


def test_texts_are_found_by_positions_that_begin_again():
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[9, 0, 1, 9, 0, 1], [0, 0, 1, 2, 3, 0]])
    begins = [[0, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 1]]
    assert find_texts(positions, mask).long().tolist() == begins
    for wrong in ([[1, 2, 3, 4, 5, 6]], [[0, 2, 3, 4, 5, 6]], [[0, 1, 1, 2, 3, 4]]):
        assert find_texts(torch.tensor(wrong), torch.ones(1, 6)) is None


@dataclass
class Scores(ModelOutput):
    log_probs: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None


def with_fused_head(base_model):
    """A head that gives log-probabilities of the labels, as TRL's."""
    original = base_model.forward

    @functools.wraps(type(base_model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            return original(*args, labels=labels, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state[:, :-1]
        logits = self.get_output_embeddings()(hidden).log_softmax(-1)
        wanted = labels[:, 1:]
        found = logits.gather(-1, wanted.clamp(min=0)[..., None])[..., 0].masked_fill(wanted == -100, 0)
        return Scores(log_probs=found, label_mask=wanted != -100)

    base_model.forward = types.MethodType(forward, base_model)
    return base_model


@pytest.mark.parametrize("kind", ["left", "right", "holes"])
def test_a_head_without_logits_runs_on_the_packed_batch(build_model, kind):
    model = prompted(with_fused_head(build_model("llama")), "CAUSAL_LM")
    batch = padded(kind, "CAUSAL_LM")
    plain = model(**batch)
    labels = batch["labels"]

    for gradients in (True, False):  # kept prefixes have no hidden states
        with torch.set_grad_enabled(gradients):
            out = model(**batch, fused_lm_head=True)

            assert engine_status(model).packed
            assert out.log_probs.shape == (len(labels), P + labels.shape[1] - 1)
            assert torch.equal(out.label_mask[:, P - 1 :], labels != -100)
            loss = -out.log_probs.sum() / (labels != -100).sum()
            torch.testing.assert_close(loss, plain.loss, rtol=1e-5, atol=0)
            for row, real in enumerate(batch["attention_mask"].bool()):
                text = batch["input_ids"][row, real][None]
                alone_there = model(input_ids=text, labels=text, fused_lm_head=True).log_probs[0, P - 1 :]
                got = out.log_probs[row, P - 1 :][real]
                torch.testing.assert_close(
                    got, alone_there.masked_fill(labels[row, real] == -100, 0), rtol=0, atol=1e-4
                )


def test_a_head_without_logits_over_rows_of_several_texts(build_model):
    model = prompted(with_fused_head(build_model("llama")), "CAUSAL_LM")
    _, wanted = alone(model)
    out = model(**flattened(), fused_lm_head=True)
    torch.testing.assert_close(-out.log_probs.sum() / out.label_mask.sum(), wanted, rtol=1e-5, atol=0)


def test_columns_of_ones_own_take_pefts_path_with_such_a_head(build_model):
    """`shift_labels` need each column's own hidden state."""
    model = prompted(with_fused_head(build_model("llama")), "CAUSAL_LM")
    ids = texts()[2][None]
    model(input_ids=ids, labels=ids, shift_labels=ids, fused_lm_head=True)
    assert "shift_labels" in engine_status(model).reason
    model(input_ids=ids, labels=ids)
    assert engine_status(model).packed
