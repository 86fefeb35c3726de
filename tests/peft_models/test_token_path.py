"""A prompt of words gives the results of their ids, or the base model is refused."""

import copy

import pytest
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from transformers import BertForTokenClassification, LlamaForCausalLM, T5ForConditionalGeneration

from peft_prompt_ext.peft_models import token_path
from tests.helpers import (
    VIRTUAL,
    make_batch,
    make_trainer,
    one_thread,  # noqa: F401
    prompt_of,
    prompted,
)
from tests.zoo import AUTO_CLASSES, CASES, HIDDEN, tiny_config


REFUSED = "gives other .* relative error .* with 5 words in place of a prompt"
OPTIONS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 2}
# PEFT warns in every generate
pytestmark = pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")


def scrambled(model, std=0.3):
    """Make weights large enough that tokens differ."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0.5 * (parameter.dim() == 1), std, generator=generator)
    return model.eval()


def reads_ids_twice(cls, how):
    """Make a model of `cls` that uses ids for more than word embeddings."""

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        if input_ids is not None:
            inputs_embeds = how(self.get_input_embeddings()(input_ids), input_ids)
        return cls.forward(self, inputs_embeds=inputs_embeds, **kwargs)

    return type(f"Odd{cls.__name__}", (cls,), {"forward": forward})


WAYS = {
    "a scale": lambda embeds, ids: embeds * 1.01,
    "an embedding of its own": lambda embeds, ids: embeds + 0.05 * ids[..., None] / 331,
    "the last token alone": lambda embeds, ids: torch.cat([embeds[:, :-1], -embeds[:, -1:]], 1),
    "not a number": lambda embeds, ids: embeds * torch.nan,
}


def odd(architecture="llama", task_type="CAUSAL_LM", way="a scale"):
    cls = type(AUTO_CLASSES[task_type].from_config(tiny_config(architecture)))
    return scrambled(reads_ids_twice(cls, WAYS[way])(tiny_config(architecture)))


def gemma_3n():
    sizes = {
        "vocab_size": 331,
        "vocab_size_per_layer_input": 331,
        "hidden_size": 32,
        "hidden_size_per_layer_input": 8,
        "intermediate_size": [64] * 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "num_kv_shared_layers": 0,
        "layer_types": ["full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 2,
    }
    return scrambled(transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**sizes)))


def gemma_4(per_layer=8):
    sizes = {
        "vocab_size": 331,
        "vocab_size_per_layer_input": 331,
        "hidden_size": 32,
        "hidden_size_per_layer_input": per_layer,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return scrambled(transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**sizes)))


def qwen2_vl():
    text = {
        "vocab_size": 331,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: 320 + i for i, name in enumerate(names)}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    return scrambled(transformers.Qwen2VLForConditionalGeneration(config))


# --- accepted


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("architecture", "task_type"), CASES)
def test_a_prompt_of_words_gives_what_the_words_give(build_model, architecture, task_type, packed):
    base = scrambled(build_model(architecture, task_type))
    ids, words = make_batch(task_type)["input_ids"], torch.arange(3, 3 + VIRTUAL)
    decoder = {"decoder_input_ids": ids[:, :2]} if task_type == "SEQ_2_SEQ_LM" else {}
    with torch.no_grad():
        want = base(input_ids=torch.cat([words.expand(len(ids), -1), ids], 1), **decoder)
        model = prompted(base, task_type, shared_prefix=packed).eval()
        prompt_of(model).copy_(base.get_input_embeddings()(words))

        got = model(input_ids=ids, **decoder)

    name = "last_hidden_state" if task_type == "FEATURE_EXTRACTION" else "logits"
    name = "start_logits" if task_type == "QUESTION_ANS" else name
    expected = want[name][:, VIRTUAL:] if task_type in {"TOKEN_CLS", "QUESTION_ANS"} else want[name]
    torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2", "opt"])
def test_every_precision_is_proved_in_its_own_tolerance(build_model, architecture, dtype):
    base = scrambled(build_model(architecture), std=0.1).to(dtype)

    assert token_path.prove(base, base.get_input_embeddings()) is None


@pytest.mark.parametrize("build", [gemma_4, qwen2_vl])
def test_models_whose_text_path_is_embeddings_alone_are_taken(build):
    base = build(per_layer=0) if build is gemma_4 else build()

    assert torch.isfinite(prompted(base, "CAUSAL_LM")(**make_batch("CAUSAL_LM")).loss)


def test_a_model_that_scales_embeddings_in_place_is_taken():
    base = scrambled(
        transformers.CTRLLMHeadModel(
            transformers.CTRLConfig(vocab_size=331, n_embd=HIDDEN, n_layer=2, n_head=2, dff=41, n_positions=67)
        )
    )

    assert torch.isfinite(prompted(base, "CAUSAL_LM")(**make_batch("CAUSAL_LM")).loss)


def test_dropout_is_no_difference(build_model):
    model = prompted(build_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5), "CAUSAL_LM").train()

    assert torch.isfinite(model(**make_batch("CAUSAL_LM")).loss)


# --- refused on every path


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("packed", [True, False])
def test_a_model_that_makes_more_of_ids_is_refused_with_its_figure(way, packed):
    model = prompted(odd(way=way), "CAUSAL_LM", shared_prefix=packed)

    with pytest.raises(ValueError, match=REFUSED):
        model(**make_batch("CAUSAL_LM"))
    with pytest.raises(ValueError, match=REFUSED):  # and in the second call
        model(**make_batch("CAUSAL_LM"))


@pytest.mark.parametrize(
    ("architecture", "task_type"),
    [
        ("llama", "SEQ_CLS"),
        ("bert", "SEQ_CLS"),
        ("bert", "TOKEN_CLS"),
        ("roberta", "QUESTION_ANS"),
        ("bert", "FEATURE_EXTRACTION"),
        ("t5", "SEQ_2_SEQ_LM"),
    ],
)
def test_it_is_refused_in_every_task(architecture, task_type):
    model = prompted(odd(architecture, task_type), task_type)

    with pytest.raises(ValueError, match=REFUSED):
        model(**make_batch(task_type))


@pytest.mark.parametrize(("architecture", "task_type"), [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_it_is_refused_before_the_first_token_is_generated(architecture, task_type):
    model = prompted(odd(architecture, task_type), task_type)

    with pytest.raises(ValueError, match=REFUSED):
        model.generate(input_ids=make_batch(task_type)["input_ids"], **OPTIONS)


def test_text_given_as_embeddings_is_no_way_around():
    with pytest.raises(ValueError, match=REFUSED):
        prompted(odd(), "CAUSAL_LM")(inputs_embeds=torch.ones(1, 3, HIDDEN))


def test_it_is_refused_in_low_precision():
    base = odd(way="the last token alone").to(torch.bfloat16)

    with pytest.raises(ValueError, match=REFUSED):
        prompted(base, "CAUSAL_LM")(**make_batch("CAUSAL_LM"))


def test_nothing_is_trained_before(tmp_path):
    model = prompted(odd(), "CAUSAL_LM")
    before = prompt_of(model).clone()
    trainer = make_trainer(model, "CAUSAL_LM", tmp_path)

    with pytest.raises(ValueError, match=REFUSED):
        trainer.train()

    assert trainer.state.global_step == 0 and torch.equal(prompt_of(model), before)


def test_embeddings_of_each_layer_are_refused():
    with pytest.raises(ValueError, match=REFUSED):
        prompted(gemma_3n(), "CAUSAL_LM")(**make_batch("CAUSAL_LM"))


@pytest.mark.parametrize("init", ["RANDOM_UNIFORM", "SAMPLE_VOCAB"])
@pytest.mark.filterwarnings("ignore:No tokenizer for the base model:UserWarning")
def test_a_model_that_looks_for_the_ids_of_embeddings_is_refused(init):  # SAMPLE_VOCAB has ids before the first step
    with pytest.raises(ValueError, match="does not run with inputs_embeds of no ids"):
        prompted(gemma_4(), "CAUSAL_LM", prompt_tuning_init=init)(**make_batch("CAUSAL_LM"))


def test_a_head_that_finds_the_question_by_its_ids_is_refused():
    sizes = {"vocab_size": 331, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 41, "max_position_embeddings": 67, "attention_type": "original_full"}
    base = scrambled(transformers.BigBirdForQuestionAnswering(transformers.BigBirdConfig(**sizes, sep_token_id=1)))

    with pytest.raises(ValueError, match=REFUSED):
        prompted(base, "QUESTION_ANS")(**make_batch("QUESTION_ANS"))


@pytest.mark.parametrize("architecture", ["t5", "bart", "mbart"])
def test_a_classifier_that_finds_its_token_by_its_id_is_refused(architecture):
    sizes = {"vocab_size": 331, "d_model": HIDDEN, "decoder_start_token_id": 2}
    if architecture == "t5":
        sizes |= {"d_kv": 12, "d_ff": 41, "num_layers": 2, "num_heads": 2}
    else:
        sizes |= {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = transformers.AutoConfig.for_model(architecture, **sizes)
    base = AUTO_CLASSES["SEQ_CLS"].from_config(config)

    with pytest.raises(ValueError, match=r"does not run with inputs_embeds.*not supported"):
        prompted(base, "SEQ_CLS")(**make_batch("SEQ_CLS"))


# --- refused by the config or the signature


@pytest.mark.parametrize("architecture", ["t5", "bart", "mt5", "marian", "pegasus"])
def test_an_encoder_decoder_is_refused_as_a_causal_model(architecture):
    sizes = {"vocab_size": 331, "d_model": 16, "pad_token_id": 2, "decoder_start_token_id": 2}
    sizes |= {"num_layers": 1, "encoder_layers": 1, "decoder_layers": 1}
    config = transformers.AutoConfig.for_model(architecture, **sizes)
    with torch.device("meta"):
        base = AUTO_CLASSES["SEQ_2_SEQ_LM"].from_config(config)

    with pytest.raises(ValueError, match=r"'CAUSAL_LM' needs a decoder; .* Set task_type='SEQ_2_SEQ_LM'"):
        prompted(base, "CAUSAL_LM")


def test_the_decoder_of_an_encoder_decoder_is_a_causal_model():
    sizes = {"d_model": HIDDEN, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 41}
    config = transformers.BartConfig(vocab_size=331, max_position_embeddings=67, **sizes)
    base = scrambled(transformers.BartForCausalLM(config))

    assert torch.isfinite(prompted(base, "CAUSAL_LM")(**make_batch("CAUSAL_LM")).loss)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_decoder_is_refused_as_an_encoder_decoder(build_model, architecture):
    with pytest.raises(ValueError, match=r"needs an encoder-decoder.*Set task_type='CAUSAL_LM'"):
        prompted(build_model(architecture), "SEQ_2_SEQ_LM")


def test_a_forward_without_embeddings_is_refused_when_the_model_is_made():
    class OfIds(LlamaForCausalLM):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids, attention_mask)

    with pytest.raises(ValueError, match=r"OfIds\.forward takes input_ids, attention_mask\. Use LoRA"):
        prompted(OfIds(tiny_config("llama")), "CAUSAL_LM")


# --- inputs beside the text


def image(ids):
    return {
        "mm_token_type_ids": (ids == 320).int(),
        "pixel_values": torch.ones(16, 96),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_an_image_beside_the_text_is_refused(call):
    model = prompted(qwen2_vl(), "CAUSAL_LM")
    ids = torch.tensor([[9, 322, 320, 320, 320, 320, 323, 8]])

    with pytest.raises(ValueError, match=r"got image_grid_thw, mm_token_type_ids, pixel_values beside the text"):
        getattr(model, call)(input_ids=ids, **image(ids))


def test_an_image_is_known_by_the_parts_of_the_config_as_well():  # Qwen3.5's classifier declares text inputs
    base = qwen2_vl()
    base.input_modalities = "text"

    with pytest.raises(ValueError, match="got pixel_values beside the text"):
        prompted(base, "CAUSAL_LM")(**make_batch("CAUSAL_LM"), pixel_values=torch.ones(16, 96))


def test_other_inputs_of_a_text_model_are_accepted(build_model):
    assert token_path.check_inputs(build_model("llama"), {"anything": torch.ones(3)}) is None


def test_zero_markers_of_text_are_accepted():
    model, batch = prompted(qwen2_vl(), "CAUSAL_LM"), make_batch("CAUSAL_LM")

    assert torch.isfinite(model(**batch, mm_token_type_ids=torch.zeros_like(batch["input_ids"])).loss)


def test_state_of_an_earlier_image_changes_nothing():
    base, ids = qwen2_vl(), torch.tensor([[9, 322, 320, 320, 320, 320, 323, 8]])
    model, batch = prompted(base, "CAUSAL_LM").eval(), make_batch("CAUSAL_LM")
    want = model(**batch).loss
    base(input_ids=ids, **image(ids))

    torch.testing.assert_close(model(**batch).loss, want)


# --- no effect on other models


def test_without_its_adapter_a_refused_model_is_the_base_model():
    base, batch = odd(), make_batch("CAUSAL_LM")
    want = base(**batch)
    model = prompted(base, "CAUSAL_LM")

    with model.disable_adapter():
        got = model(**batch)
        tokens = model.generate(input_ids=batch["input_ids"], **OPTIONS)

    assert torch.equal(got.logits, want.logits)
    assert torch.equal(tokens, base.generate(input_ids=batch["input_ids"], **OPTIONS))


def test_a_stock_config_is_not_proved():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)

    assert torch.isfinite(get_peft_model(odd(), config)(**make_batch("CAUSAL_LM")).loss)


def test_the_probe_runs_twice_for_each_precision_and_no_more(build_model):
    base, calls = build_model("llama"), []
    base.register_forward_hook(lambda module, inputs, output: calls.append(module))

    model = prompted(base, "CAUSAL_LM", shared_prefix=False)
    counts = []
    for _ in range(3):
        model(**make_batch("CAUSAL_LM"))
        counts.append(len(calls))
    with torch.autocast("cpu", torch.bfloat16):
        model(**make_batch("CAUSAL_LM"))

    assert [*counts, len(calls)] == [3, 4, 5, 8]


def test_the_probe_leaves_modes_attributes_modules_and_random_numbers(build_model):
    class Marks(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            self.last = self.model.layers[0].left = object()
            self.model.layers[0].mlp = copy.copy(self.model.layers[0].mlp)
            torch.rand(1)
            return super().forward(*args, **kwargs)

    base = Marks(tiny_config("llama")).train()
    base.model.norm.eval()
    layer = base.model.layers[0]
    mlp, modes, state = layer.mlp, [m.training for m in base.modules()], torch.get_rng_state()

    token_path.prove(base, base.get_input_embeddings())

    assert layer.mlp is mlp and not hasattr(base, "last") and not hasattr(layer, "left")
    assert [m.training for m in base.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_big_bird_keeps_its_sparse_attention():
    sizes = {"vocab_size": 331, "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = transformers.BigBirdForSequenceClassification(transformers.BigBirdConfig(**sizes, intermediate_size=41))

    token_path.prove(base, base.get_input_embeddings())

    assert base.bert.attention_type == "block_sparse"


def test_a_model_that_draws_random_numbers_is_proved_with_the_same(build_model):
    class Noisy(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output["logits"] = output.logits + torch.randn_like(output.logits)
            return output

    base = Noisy(tiny_config("llama"))

    assert token_path.prove(base, base.get_input_embeddings()) is None


def test_an_offloaded_base_model_is_proved_too(build_model):
    from accelerate import cpu_offload

    for base in (odd(), scrambled(build_model("llama"))):
        cpu_offload(base, execution_device="cpu")
        if isinstance(base, LlamaForCausalLM) and type(base) is not LlamaForCausalLM:
            with pytest.raises(ValueError, match=REFUSED):
                token_path.prove(base, base.get_input_embeddings())
        else:
            token_path.prove(base, base.get_input_embeddings())


def test_a_model_that_needs_other_inputs_is_accepted():
    class OfBoxes(BertForTokenClassification):
        def forward(self, input_ids=None, bbox=None, **kwargs):
            if bbox is None:
                raise ValueError("You have to specify bbox")
            return super().forward(input_ids, **kwargs)

    base = OfBoxes(tiny_config("bert"))

    assert token_path.prove(base, base.get_input_embeddings()) is None


def test_a_model_on_meta_is_accepted(build_model):
    base = build_model("llama").to("meta")

    assert token_path.prove(base, base.get_input_embeddings()) is None


def test_a_decoder_with_few_positions_is_proved_in_them(build_model):
    base = scrambled(build_model("gpt2", n_positions=7))

    assert token_path.prove(base, base.get_input_embeddings(), limit=7) is None


def test_an_encoder_decoder_is_proved_with_its_decoder(build_model):
    base = odd("t5", "SEQ_2_SEQ_LM")
    assert isinstance(base, T5ForConditionalGeneration)

    with pytest.raises(ValueError, match=REFUSED):
        token_path.prove(base, base.get_input_embeddings(), decoder=True)
