"""A prompt is as wide as the word embeddings, and trains on models whose sizes PEFT cannot read."""

import copy

import pytest
import torch
import transformers
from peft import PeftModel, PromptTuningConfig, get_peft_model

from peft_prompt_ext import PromptTuningExtConfig
from peft_prompt_ext.encoder import token_dim
from tests.helpers import VIRTUAL, make_batch, make_trainer, one_thread, prompt_of, prompted  # noqa: F401
from tests.zoo import AUTO_CLASSES


WIDTH, NARROW = 24, 12
BERT = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 41}
SIZES = {
    # word embeddings narrower than the hidden states
    "albert": {**BERT, "embedding_size": NARROW},
    "electra": {**BERT, "embedding_size": NARROW},
    "convbert": {**BERT, "embedding_size": NARROW},
    "roformer": {**BERT, "embedding_size": NARROW},
    "rembert": {**BERT, "input_embedding_size": NARROW},
    "mobilebert": {**BERT, "embedding_size": NARROW, "intra_bottleneck_size": WIDTH, "true_hidden_size": WIDTH},
    "opt": {
        **{key: BERT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
        **{"ffn_dim": 41, "word_embed_proj_dim": NARROW},
    },
    # other names for width, layers and heads than PEFT's
    "distilbert": {"dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": 41},
    "flaubert": {"emb_dim": WIDTH, "n_layers": 2, "n_heads": 2},
    "xlm": {"emb_dim": WIDTH, "n_layers": 2, "n_heads": 2},
    "mpt": {"d_model": WIDTH, "n_layers": 2, "n_heads": 2},
    "fnet": {"hidden_size": WIDTH, "num_hidden_layers": 2, "intermediate_size": 41, "max_position_embeddings": 64},
    # no limit of positions: -1 in the config
    "xlnet": {"d_model": WIDTH, "n_layer": 2, "n_head": 2, "d_inner": 41},
    # several sizes: encoder and decoder have their own
    "t5gemma": {
        side: {**BERT, "num_key_value_heads": 1, "head_dim": NARROW, "vocab_size": 331, "layer_types": None}
        for side in ("encoder", "decoder")
    },
    "prophetnet": {
        **{"hidden_size": WIDTH, "num_encoder_layers": 2, "num_decoder_layers": 2, "decoder_ffn_dim": 41},
        **{"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2, "encoder_ffn_dim": 41},
        "decoder_start_token_id": 2,
    },
}
NARROWER = ("albert", "electra", "convbert", "roformer", "rembert", "mobilebert", "opt")
CASES = [
    *((name, "SEQ_CLS") for name in SIZES if name not in ("t5gemma", "prophetnet")),
    *((name, "TOKEN_CLS") for name in ("albert", "electra", "distilbert", "flaubert", "fnet", "xlnet", "mpt")),
    *((name, "QUESTION_ANS") for name in ("albert", "electra", "distilbert", "xlm", "fnet", "xlnet", "mpt")),
    *((name, "FEATURE_EXTRACTION") for name in ("albert", "distilbert", "fnet", "xlnet")),
    *((name, "CAUSAL_LM") for name in ("opt", "mpt", "xlnet")),
    *((name, "SEQ_2_SEQ_LM") for name in ("t5gemma", "prophetnet")),
]
cases = pytest.mark.parametrize(("architecture", "task_type"), CASES)


def build(architecture, task_type):
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = transformers.AutoConfig.for_model(architecture, vocab_size=331, **ids, **SIZES[architecture])
    return AUTO_CLASSES[task_type].from_config(config).eval()


def unpadded(architecture, task_type):
    batch = make_batch(task_type)
    if architecture == "fnet":  # takes no mask
        del batch["attention_mask"]
    return batch


def loss_of(output):
    return output.last_hidden_state.square().mean() if "last_hidden_state" in output else output.loss


@cases
@pytest.mark.filterwarnings("ignore:.*XLNet.*:UserWarning")
def test_loss_and_gradient_are_those_of_stock_peft_with_given_sizes(architecture, task_type):
    base, batch = build(architecture, task_type), unpadded(architecture, task_type)
    model = prompted(copy.deepcopy(base), task_type)
    width = NARROW if architecture in NARROWER else WIDTH
    sizes = {"token_dim": width, "num_layers": 2, "num_attention_heads": 2, "num_transformer_submodules": 1}
    sizes["modules_to_save"] = model.peft_config["default"].modules_to_save
    stock = get_peft_model(base, PromptTuningConfig(task_type=task_type, num_virtual_tokens=VIRTUAL, **sizes))
    stock.load_state_dict(model.state_dict())
    stock_batch = dict(batch)
    if task_type == "TOKEN_CLS":
        stock_batch["labels"] = torch.nn.functional.pad(batch["labels"], (VIRTUAL, 0), value=-100)
    if task_type == "QUESTION_ANS":
        stock_batch |= {name: batch[name] + VIRTUAL for name in ("start_positions", "end_positions")}

    losses = [loss_of(model.eval()(**batch)), loss_of(stock.eval()(**stock_batch))]
    for loss in losses:
        loss.backward()

    assert prompt_of(model).shape == (VIRTUAL, width)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(prompt_of(model).grad, prompt_of(stock).grad, rtol=1e-4, atol=1e-7)
    assert prompt_of(model).grad.abs().sum() > 0


@pytest.mark.parametrize("architecture", ["albert", "distilbert", "fnet", "mpt", "xlnet"])
def test_what_is_saved_loads_here_and_in_stock_peft(tmp_path, seam, architecture):
    model = prompted(build(architecture, "SEQ_CLS"), "SEQ_CLS").eval()
    batch = unpadded(architecture, "SEQ_CLS")
    model.save_pretrained(tmp_path)

    here = PeftModel.from_pretrained(build(architecture, "SEQ_CLS"), tmp_path).eval()
    seam.deactivate()
    stock = PeftModel.from_pretrained(build(architecture, "SEQ_CLS"), tmp_path).eval()

    assert type(stock).__module__ == "peft.peft_model"
    for loaded in (here, stock):
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:No tokenizer:UserWarning")
@pytest.mark.parametrize("init", ["RANDOM", "RANDOM_UNIFORM", "SAMPLE_VOCAB"])
def test_inits_are_as_wide_as_the_words(init):
    model = prompted(build("albert", "SEQ_CLS"), "SEQ_CLS", prompt_tuning_init=init)

    assert prompt_of(model).shape == (VIRTUAL, NARROW)
    assert model.peft_config["default"].token_dim == NARROW


def test_the_trainer_trains_it(tmp_path):
    trainer = make_trainer(prompted(build("electra", "TOKEN_CLS"), "TOKEN_CLS"), "TOKEN_CLS", tmp_path, max_steps=2)

    assert trainer.train().training_loss > 0


def test_a_width_that_is_not_the_words_is_refused():
    with pytest.raises(ValueError, match=r"token_dim is 24.* 12 wide"):
        prompted(build("albert", "SEQ_CLS"), "SEQ_CLS", token_dim=WIDTH)


def test_the_width_of_sharded_words_is_known():
    words = torch.nn.Embedding(7, NARROW)
    words.weight = torch.nn.Parameter(torch.empty(0))  # as DeepSpeed leaves it outside of a pass

    assert token_dim(PromptTuningExtConfig(task_type="SEQ_CLS"), words) == NARROW


def test_sizes_that_peft_reads_are_those_of_stock_peft(build_model):
    init = {"prompt_tuning_init": "RANDOM"}
    for architecture, task_type in (("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")):
        ours, stock = (
            get_peft_model(build_model(architecture, task_type), kind(task_type=task_type, **init)).peft_config[
                "default"
            ]
            for kind in (PromptTuningExtConfig, lambda **kw: PromptTuningConfig(num_virtual_tokens=2, **kw))
        )
        for name in ("num_layers", "token_dim", "num_attention_heads"):
            assert getattr(ours, name) == getattr(stock, name)


def test_a_model_without_a_vocabulary_is_refused():
    config = transformers.CanineConfig(**BERT)

    with pytest.raises(ValueError, match="CanineForSequenceClassification has no vocabulary"):
        prompted(transformers.CanineForSequenceClassification(config), "SEQ_CLS")


def test_embeddings_that_give_more_than_vectors_are_refused():
    config = transformers.IBertConfig(vocab_size=331, **BERT)

    with pytest.raises(ValueError, match="QuantEmbedding"):
        prompted(transformers.IBertForSequenceClassification(config), "SEQ_CLS")
