"""4-bit and 8-bit backbones: real bitsandbytes on the CPU."""

import importlib.util
import logging

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForMaskedLM, BitsAndBytesConfig

from peft_prompt_ext import engine_status, load_frozen_backbone
from tests.helpers import losses_of, make_batch, make_trainer, one_thread, prompt_of, prompted, weights_hash  # noqa: F401
from tests.zoo import AUTO_CLASSES, tiny_config


# bitsandbytes quantises in blocks of 64
SIZES = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 64},
    "bert": {"hidden_size": 64, "intermediate_size": 128},
    "roberta": {"hidden_size": 64, "intermediate_size": 128},
    "gemma3_text": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_key_value_heads": 2},
}
CASES = [
    ("llama", "CAUSAL_LM"),
    ("gpt2", "CAUSAL_LM"),
    ("gemma3_text", "CAUSAL_LM"),
    ("bert", "SEQ_CLS"),
    ("roberta", "SEQ_CLS"),
    ("llama", "SEQ_CLS"),
]


@pytest.fixture
def folder(tmp_path, build_model):
    """Saves a tiny model: `folder("llama", "CAUSAL_LM")`."""

    def save(architecture, task_type="CAUSAL_LM"):
        path = tmp_path / f"{architecture}-{task_type}"
        model = build_model(architecture, task_type, **SIZES[architecture])
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(path)
        return str(path)

    return save


def quantized_weights(model):
    return [p for p in model.parameters() if p.dtype in {torch.uint8, torch.int8}]


@pytest.mark.filterwarnings("ignore:.*will not detect padding:UserWarning")
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", None])
@pytest.mark.parametrize(("architecture", "task_type"), CASES)
def test_a_frozen_backbone_trains_a_prompt_and_stays_as_it_is(folder, tmp_path, architecture, task_type, quantization):
    base = load_frozen_backbone(folder(architecture, task_type), task_type, quantization, dtype=torch.float32)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert bool(quantized_weights(base)) == (quantization is not None)
    head = (
        base.get_output_embeddings() if task_type == "CAUSAL_LM" else getattr(base, "score", None) or base.classifier
    )
    assert not any(type(module).__module__.startswith("bitsandbytes") for module in head.modules())
    before = weights_hash(base)
    model = prompted(base, task_type)
    trainer = make_trainer(
        model,
        task_type,
        tmp_path / "run",
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        learning_rate=0.3,
        max_steps=3,
        save_strategy="no",
    )

    trainer.train()

    assert engine_status(model).packed == (architecture not in {"bert", "roberta"})
    assert losses_of(trainer)[-1] != losses_of(trainer)[0]
    assert weights_hash(base) == before


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_loss_and_gradient_equal_those_over_the_dequantised_weights(folder, architecture, quantization):
    path, batch, results = folder(architecture), make_batch("CAUSAL_LM"), []
    for dequantized in (False, True):
        base = load_frozen_backbone(path, quantization=quantization, dtype=torch.float32)
        if dequantized:
            base = base.dequantize()
            assert not quantized_weights(base)
        model = prompted(base, "CAUSAL_LM")
        loss = model(**batch).loss
        loss.backward()
        results.append((loss, prompt_of(model).grad))
        assert engine_status(model).packed
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("road", ["ours", "ordinary", "ordinary, evaluated before"])
def test_a_prompt_learns_after_an_evaluation_on_a_cpu_that_packs_weights(folder, monkeypatch, road):
    from bitsandbytes.functional import _convert_weight_packed_for_cpu
    from bitsandbytes.nn import Linear4bit

    path, batch = folder("llama"), make_batch("CAUSAL_LM")
    before = prompted(load_frozen_backbone(path, quantization="nf4", dtype=torch.float32), "CAUSAL_LM").eval()
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    if road == "ours":
        base = load_frozen_backbone(path, quantization="nf4", dtype=torch.float32)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        base = AUTO_CLASSES["CAUSAL_LM"].from_pretrained(path, quantization_config=config, dtype=torch.float32)
    layers = [module for module in base.modules() if isinstance(module, Linear4bit)]
    assert layers
    if road == "ordinary, evaluated before":
        for layer in layers:  # what its first evaluation does there
            layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    model = prompted(base, "CAUSAL_LM").eval()
    with torch.no_grad():
        model(**batch)

    losses = [one.train()(**batch).loss for one in (model, before)]
    for loss in losses:
        loss.backward()

    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)
    near = {"rtol": 2e-2, "atol": 2e-2} if "before" in road else {}
    torch.testing.assert_close(*losses, **near)
    gradients = [prompt_of(one).grad for one in (model, before)]
    assert torch.nn.functional.cosine_similarity(*(gradient.flatten() for gradient in gradients), dim=0) > 0.98


@pytest.mark.parametrize("rows", [2, 7])
def test_each_weight_is_made_whole_once_a_pass_whatever_the_rows(folder, monkeypatch, rows):
    import bitsandbytes.functional

    base = load_frozen_backbone(folder("llama"), quantization="nf4", dtype=torch.float32)
    model = prompted(base, "CAUSAL_LM")
    assert engine_status(model).packed
    calls, dequantize = [], bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(
        bitsandbytes.functional, "dequantize_4bit", lambda *a, **k: calls.append(1) or dequantize(*a, **k)
    )

    model(**make_batch("CAUSAL_LM", rows=rows)).loss.backward()

    assert len(calls) == len(quantized_weights(base))


def test_an_adapter_moves_between_precisions_and_to_stock_peft(folder, tmp_path):
    path, batch = folder("llama"), make_batch("CAUSAL_LM")
    model = prompted(load_frozen_backbone(path, quantization="nf4", dtype=torch.float32), "CAUSAL_LM").eval()
    model.save_pretrained(tmp_path / "adapter")
    stock = get_peft_model(load_frozen_backbone(path), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    stock.prompt_encoder.load_state_dict(model.prompt_encoder.state_dict())

    whole = PeftModel.from_pretrained(load_frozen_backbone(path), tmp_path / "adapter")
    whole.save_pretrained(tmp_path / "again")
    back = PeftModel.from_pretrained(
        load_frozen_backbone(path, quantization="nf4", dtype=torch.float32), tmp_path / "again"
    )

    torch.testing.assert_close(whole(**batch).logits, stock.eval()(**batch).logits, rtol=0, atol=1e-4)
    assert torch.equal(back(**batch).logits, model(**batch).logits)
    assert not torch.equal(back(**batch).logits, whole(**batch).logits)


@pytest.mark.parametrize("init", ["CLASS_LABELS", "SAMPLE_VOCAB", "TEXT", "TRANSFER"])
def test_inits_are_those_of_the_full_precision_model(make, folder, init):
    path = folder("llama")
    kwargs = {"labels": ["positive", "negative"]} if init == "CLASS_LABELS" else {}
    if init == "TRANSFER":
        source = prompted(load_frozen_backbone(path), "CAUSAL_LM", num_virtual_tokens=7)
        kwargs["source"] = f"{path}-source"
        source.save_pretrained(kwargs["source"])
    prompts = [
        prompt_of(make(init, model=load_frozen_backbone(path, quantization=q, dtype=torch.float32), **kwargs))
        for q in (None, "nf4", "int8")
    ]
    assert torch.equal(prompts[0], prompts[1]) and torch.equal(prompts[0], prompts[2])


def test_the_ordinary_roads_give_the_same_loss(folder):
    path, batch = folder("llama"), make_batch("CAUSAL_LM")
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}

    def ordinary():
        return AUTO_CLASSES["CAUSAL_LM"].from_pretrained(
            path, quantization_config=BitsAndBytesConfig(**quantization), dtype=torch.float32
        )

    roads = [load_frozen_backbone(path, quantization="nf4", dtype=torch.float32), ordinary()]
    roads.append(prepare_model_for_kbit_training(ordinary(), use_gradient_checkpointing=False))
    losses = []
    for base in roads:
        model = prompted(base, "CAUSAL_LM")
        losses.append(model(**batch).loss)
        losses[-1].backward()
        assert engine_status(model).packed and prompt_of(model).grad.abs().sum() > 0
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("architecture", "task_type"),
    [("bert", "SEQ_CLS"), ("bert", "TOKEN_CLS"), ("bert", "QUESTION_ANS"), ("llama", "SEQ_CLS")],
)
@pytest.mark.filterwarnings("ignore:.*will not detect padding:UserWarning")
def test_heads_that_the_ordinary_road_quantised_are_trained(folder, monkeypatch, architecture, task_type, bits):
    # where there is AVX512-BF16, bitsandbytes cannot even evaluate a 4-bit head of two labels
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    base = AUTO_CLASSES[task_type].from_pretrained(
        folder(architecture, task_type), quantization_config=config, dtype=torch.float32
    )
    batch = make_batch(task_type)
    with torch.no_grad():
        before = base(**batch).loss
    model = prompted(base, task_type)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(**batch).loss, before, rtol=2e-2, atol=2e-2)

    model(**batch).loss.backward()

    heads = [p for name, p in model.named_parameters() if ".modules_to_save." in name]
    assert heads and all(p.is_floating_point() and p.grad is not None for p in heads)


@pytest.mark.parametrize(("given", "low"), [("auto", None), (torch.bfloat16, torch.bfloat16)])
def test_nothing_is_upcast_and_the_prompt_is_fp32(folder, given, low):
    base = load_frozen_backbone(folder("llama"), quantization="nf4", dtype=given)
    kept = {p.dtype for p in base.parameters()} - {torch.uint8}
    assert len(kept) == 1 and kept <= ({low} if low else {torch.bfloat16, torch.float16, torch.float32})
    model = prompted(base, "CAUSAL_LM")
    model(**make_batch("CAUSAL_LM")).loss.backward()
    assert prompt_of(model).dtype == prompt_of(model).grad.dtype == torch.float32


def test_storage_for_fsdp_and_checkpointing_with_inputs_that_carry_gradients(folder):
    options = {"quant_storage": torch.bfloat16, "gradient_checkpointing": True, "dtype": torch.bfloat16}
    base = load_frozen_backbone(folder("llama"), quantization="nf4", **options).train()
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    assert base.get_input_embeddings()(torch.tensor([3])).requires_grad
    assert base.model.gradient_checkpointing


def test_a_bfloat16_checkpoint_gets_the_type_that_the_device_multiplies(folder, monkeypatch, build_model, tmp_path):
    build_model("llama").bfloat16().save_pretrained(tmp_path / "low")
    for capabilities, wanted in (({"avx512_bf16": True}, torch.bfloat16), ({}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=capabilities: has)
        assert load_frozen_backbone(str(tmp_path / "low"), device_map="cpu").dtype == wanted


def test_a_new_head_is_named(folder, caplog):
    with caplog.at_level(logging.WARNING, "peft_prompt_ext"):
        load_frozen_backbone(folder("llama"), "SEQ_CLS", "nf4", num_labels=3)
    assert "score.weight for SEQ_CLS" in caplog.text and "modules_to_save" in caplog.text


@pytest.mark.parametrize("quantization", ["nf4", "int8", None])
def test_a_layer_of_the_trunk_that_is_new_can_be_trained_and_saved(tmp_path, quantization):
    config = tiny_config("bert", **SIZES["bert"])
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "base")
    model, batch = None, make_batch("SEQ_CLS")
    for seed in (1, 2):
        torch.manual_seed(seed)
        base = load_frozen_backbone(str(tmp_path / "base"), "SEQ_CLS", quantization, dtype=torch.float32)
        assert base.new_modules == ["bert.pooler.dense", "classifier"]
        assert type(base.bert.pooler.dense) is torch.nn.Linear
        if model is None:
            model = prompted(base, "SEQ_CLS")
            model(**batch).loss.backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
            assert model.get_base_model().bert.pooler.dense.modules_to_save["default"].weight.grad.abs().sum() > 0
            model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


def test_int8_says_what_it_casts_once(folder, caplog):
    model = prompted(load_frozen_backbone(folder("llama"), quantization="int8", dtype=torch.float32), "CAUSAL_LM")
    for _ in range(2):
        model(**make_batch("CAUSAL_LM"))
    assert caplog.text.count("cast from") <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"quantization": "nf5"},
            r"quantization \('nf5'\) must be one of .* \(did you mean 'nf4'\?\)",
        ),
        ({"task_type": "SEQ_CLF"}, r"task_type \('SEQ_CLF'\) must be one of .* \(did you mean 'SEQ_CLS'\?\)"),
        ({"quantization": "nf4", "device_map": "mps"}, r"cpu, cuda, hpu, xpu; got device_map='mps'"),
        ({"name_or_path": "nowhere.gguf"}, r"no GGUF file 'nowhere.gguf'"),
    ],
)
def test_bad_values_are_refused_before_anything_is_loaded(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_frozen_backbone(**{"name_or_path": "nowhere", **arguments})


def test_without_bitsandbytes_the_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ImportError, match=r"peft-prompt-ext\[quantization\]"):
        load_frozen_backbone("nowhere", quantization="nf4")


def test_a_checkpoint_is_not_quantised_twice(folder, tmp_path):
    load_frozen_backbone(folder("llama"), quantization="nf4", dtype=torch.float32).save_pretrained(tmp_path / "nf4")
    with pytest.raises(ValueError, match=r"quantised already \(nf4\); quantization='int8'"):
        load_frozen_backbone(str(tmp_path / "nf4"), quantization="int8")
    for quantization in ("nf4", None):
        base = load_frozen_backbone(str(tmp_path / "nf4"), quantization=quantization, dtype=torch.float32)
        assert quantized_weights(base)


def test_a_model_without_linear_layers_is_refused(tmp_path):
    config = AutoConfig.for_model("mobilenet_v1", depth_multiplier=0.25, image_size=32)
    AUTO_CLASSES["FEATURE_EXTRACTION"].from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no Linear layers to quantise"):
        load_frozen_backbone(str(tmp_path), "FEATURE_EXTRACTION", "nf4")
