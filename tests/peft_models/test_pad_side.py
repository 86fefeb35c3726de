"""Pads go to the side where they change no result; a warning says if there is none."""

import warnings

import pytest
import torch
import transformers

from peft_prompt_ext.peft_models.pad_side import BEHIND, IN_FRONT, find_pad_side
from tests.helpers import VIRTUAL, one_thread, prompted  # noqa: F401
from tests.zoo import AUTO_CLASSES


MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 0, 0, 0], [1] * 7, [1, 1, 1, 1, 1, 1, 0]],
    "holes": [[0, 1, 0, 1, 1, 1, 0], [1] * 7, [0, 1, 1, 0, 0, 1, 0]],
}
BERT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 41}
SIZES = {
    "ctrl": {"n_embd": 24, "n_layer": 2, "n_head": 2, "dff": 41},
    "xlnet": {"d_model": 24, "n_layer": 2, "n_head": 2, "d_inner": 41},
    "modernbert-decoder": BERT,
    "mpt": {"d_model": 24, "n_layers": 2, "n_heads": 2},
    "bert": BERT,
    "distilbert": {"dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": 41},
    "convbert": {**BERT, "embedding_size": 24},
    "yoso": BERT,
    "nystromformer": BERT,
}
SEES_PADS = ("convbert", "yoso", "nystromformer")


def build(architecture, task_type="SEQ_CLS"):
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = transformers.AutoConfig.for_model(architecture, vocab_size=331, **ids, **SIZES[architecture])
    base = AUTO_CLASSES[task_type].from_config(config)
    for parameter in base.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return base.eval()


def ids_of():
    return torch.randint(3, 300, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("architecture", [name for name in SIZES if name not in SEES_PADS])
def test_a_row_is_classified_as_it_is_alone(architecture, kind):
    model, ids, mask = prompted(build(architecture), "SEQ_CLS").eval(), ids_of(), torch.tensor(MASKS[kind])

    together = model(input_ids=ids.masked_fill(mask == 0, 2), attention_mask=mask).logits

    for row, real in enumerate(mask.bool()):
        one = {"input_ids": ids[row, real][None], "attention_mask": torch.ones(1, int(real.sum()), dtype=torch.long)}
        torch.testing.assert_close(together[row], model(**one).logits[0], rtol=1e-4, atol=1e-5)


def test_a_base_model_that_counts_itself_gets_no_positions():
    class Strict(transformers.BloomForSequenceClassification):
        def forward(self, inputs_embeds=None, attention_mask=None, input_ids=None, return_dict=None):
            return super().forward(inputs_embeds=inputs_embeds, attention_mask=attention_mask)

    config = transformers.BloomConfig(vocab_size=331, pad_token_id=2, hidden_size=24, n_layer=2, n_head=2)
    model, ids, mask = prompted(Strict(config), "SEQ_CLS").eval(), ids_of(), torch.tensor(MASKS["left"])

    together = model(input_ids=ids, attention_mask=mask).logits

    torch.testing.assert_close(together[0], model(input_ids=ids[:1, 3:]).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "side"),
    [("ctrl", IN_FRONT), ("xlnet", IN_FRONT), ("modernbert-decoder", IN_FRONT), ("bert", BEHIND)],
)
def test_the_side_is_that_of_what_the_classifier_reads(architecture, side):
    assert find_pad_side(prompted(build(architecture), "SEQ_CLS")) == side


@pytest.mark.parametrize("architecture", SEES_PADS)
@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_model_that_sees_pads_says_so_once(architecture, task_type):
    model, ids, mask = prompted(build(architecture, task_type), task_type), ids_of(), torch.tensor(MASKS["right"])

    with pytest.warns(UserWarning, match=r"For(Sequence|Token)Classification does not mask pads .* one length"):
        model(input_ids=ids, attention_mask=mask)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids, attention_mask=mask)


def test_a_search_leaves_training_as_it_was():
    base = build("ctrl").train()
    base.transformer.h[0].eval()
    model = prompted(base, "SEQ_CLS")
    before = [module.training for module in model.modules()]

    find_pad_side(model)

    assert [module.training for module in model.modules()] == before


def test_a_text_without_room_for_the_search_has_its_pads_behind():
    base = build("bert")
    base.config.max_position_embeddings = VIRTUAL + 4

    assert find_pad_side(prompted(base, "SEQ_CLS")) == BEHIND


def test_a_mask_that_the_base_model_cannot_read_is_refused_where_it_has_pads():
    config = transformers.FNetConfig(vocab_size=331, hidden_size=24, num_hidden_layers=2, intermediate_size=41)
    model, ids = prompted(transformers.FNetForSequenceClassification(config), "SEQ_CLS").eval(), ids_of()

    with pytest.raises(ValueError, match="attention_mask has pads, and FNetForSequenceClassification takes no mask"):
        model(input_ids=ids, attention_mask=torch.tensor(MASKS["right"]))

    assert torch.equal(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, model(input_ids=ids).logits)
