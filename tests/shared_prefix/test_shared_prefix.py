"""A row's result in any batch is its result alone, in a packed batch and on PEFT's path."""

import contextlib
import copy
import logging
import subprocess
import sys
from functools import partial
from itertools import product

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig

from peft_prompt_ext import PromptTuningExtConfig, engine_status
from peft_prompt_ext._versions import checkpoint_activations
from peft_prompt_ext.shared_prefix import forward, interface, probe
from peft_prompt_ext.shared_prefix.packed_pass import PackedPass
from tests.helpers import make_batch, make_trainer, one_thread, prompt_of, prompted  # noqa: F401
from tests.shared_prefix.helpers import (
    MASKS,
    PACKED,
    P,
    assert_rows_equal_those_alone,
    mixed_model,
    padded,
)
from tests.zoo import AUTO_CLASSES, tiny_config


@pytest.mark.filterwarnings("ignore:.*will not detect padding:UserWarning")
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize("architecture", PACKED)
def test_packed_batches_equal_each_row_alone_in_stock_peft(build_model, architecture, task_type, kind):
    model = prompted(build_model(architecture, task_type), task_type)

    assert_rows_equal_those_alone(model, padded(kind, task_type), task_type)

    assert engine_status(model).packed


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bloom", "gemma3_text"])
def test_without_the_engine_padded_batches_equal_each_row_alone_too(build_model, architecture, task_type, kind):
    model = prompted(build_model(architecture, task_type), task_type, shared_prefix=False)

    assert_rows_equal_those_alone(model, padded(kind, task_type), task_type)

    assert not engine_status(model).packed


@pytest.mark.parametrize("size", [1, 2, 50, 200])
@pytest.mark.parametrize("architecture", [*PACKED, "mixtral", "phi3", "smollm3"])
def test_any_number_of_virtual_tokens(build_model, architecture, size):
    positions = {"gpt2": "n_positions"}.get(architecture, "max_position_embeddings")
    build = other_model if architecture in MORE else build_model
    model = prompted(build(architecture, **{positions: 256}), "CAUSAL_LM", num_virtual_tokens=size)

    assert_rows_equal_those_alone(model, padded("holes", "CAUSAL_LM"), "CAUSAL_LM")

    assert engine_status(model).packed


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_random_batches_equal_each_row_alone(data):
    rows, text, size = (data.draw(st.integers(1, most)) for most in (4, 12, 9))
    bits = st.lists(st.booleans(), min_size=text, max_size=text)
    mask = torch.tensor([data.draw(bits.filter(any)) for _ in range(rows)]).long()
    labelled = torch.tensor([data.draw(bits) for _ in range(rows)]) & mask.bool()
    ids = make_batch("CAUSAL_LM", rows, text, seed=data.draw(st.integers(0, 99)))["input_ids"]
    assume(labelled.any())

    assert_rows_equal_those_alone(
        prompted(random_llama(), "CAUSAL_LM", num_virtual_tokens=size),
        {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~labelled, -100)},
        "CAUSAL_LM",
    )


def random_llama():
    torch.manual_seed(0)
    return AUTO_CLASSES["CAUSAL_LM"].from_config(tiny_config("llama")).eval()


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "mistral"])
def test_rows_longer_than_the_window(build_model, architecture):
    """The window is 16: 13 virtual tokens and 11 real ones."""
    model = prompted(build_model(architecture), "CAUSAL_LM", num_virtual_tokens=13)

    assert_rows_equal_those_alone(model, padded("holes", "CAUSAL_LM"), "CAUSAL_LM")

    assert engine_status(model) == engine_status(model)
    assert engine_status(model).max_tokens is None


MORE = {
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 48},
    "phi3": {"pad_token_id": 2, "num_key_value_heads": 2},
    "smollm3": {"pad_token_id": 2},
    "starcoder2": {},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.5},
    "olmo2": {},
    "stablelm": {},
    "gptj": {"n_embd": 24, "n_layer": 2, "n_head": 2, "rotary_dim": 4},
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 48},
    "mamba": {"num_hidden_layers": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon": {"alibi": True},
    "qwen3_next": {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "num_experts": 3, "num_experts_per_tok": 2},
}
REFUSED = {"mamba", "lfm2", "falcon", "qwen3_next", "stablelm"}
if Version(transformers.__version__) < Version("5.24"):  # 5.24 added the attention interface
    REFUSED.add("gptj")


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("architecture", MORE)
def test_other_architectures_are_right_or_refused_with_a_reason(architecture, kind):
    model = prompted(other_model(architecture), "CAUSAL_LM")

    status = engine_status(model)

    assert status.packed == (architecture not in REFUSED), status
    assert status.reason
    if status.packed:
        assert_rows_equal_those_alone(model, padded(kind, "CAUSAL_LM"), "CAUSAL_LM")


def other_model(architecture, **changes):
    shape = tiny_config("llama").to_dict()
    sizes = {k: shape[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")}
    ids = {"vocab_size": 331, "bos_token_id": 0, "eos_token_id": 1, "intermediate_size": 41}
    config = AutoConfig.for_model(architecture, **{**sizes, **ids, **MORE[architecture], **changes})
    torch.manual_seed(0)
    base = AUTO_CLASSES["CAUSAL_LM"].from_config(config).eval()
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # large enough for attention to matter
    return base


def test_a_wrong_attention_is_refused_with_its_figure(build_model, monkeypatch, caplog):
    def sees_neighbours(query, key, value, layout, **kwargs):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        ).transpose(1, 2)

    monkeypatch.setattr(probe, "PackedPass", partial(PackedPass, attention=sees_neighbours))
    model = prompted(build_model("llama"), "CAUSAL_LM")
    for parameter in model.base_model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with caplog.at_level(logging.INFO, "peft_prompt_ext"):
        status = engine_status(model)
        model(**padded("right", "CAUSAL_LM"))

    assert not status.packed
    assert "relative error" in status.reason
    assert caplog.text.count("relative error") == 1
    assert model.get_base_model().config._attn_implementation == "sdpa"


def test_the_probe_can_be_switched_off(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM", shared_prefix_probe=False)
    assert engine_status(model) == type(engine_status(model))(True, "not probed", keeps_prompts=True, attention="sdpa")


def test_the_probe_leaves_training_mode_and_random_state_alone(build_model):
    base = build_model("llama").train()
    base.model.layers[1].eval()
    model = prompted(base, "CAUSAL_LM")
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()

    engine_status(model)

    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_other_models_have_no_engine(build_model):
    lora = get_peft_model(build_model("llama"), LoraConfig(task_type="CAUSAL_LM"))
    assert not engine_status(lora).packed
    assert not engine_status(prompted(build_model("t5", "SEQ_2_SEQ_LM"), "SEQ_2_SEQ_LM")).packed
    bert = prompted(build_model("bert", "SEQ_CLS"), "SEQ_CLS")
    assert "causal" in engine_status(bert).reason


def test_changing_the_attention_implementation_proves_the_model_again(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM")
    batch = padded("left", "CAUSAL_LM")
    before = model(**batch).loss
    model.get_base_model().set_attn_implementation("eager")

    torch.testing.assert_close(model(**batch).loss, before)

    assert model.get_base_model().config._attn_implementation == "eager"


def test_a_packed_model_works_in_a_process_that_never_packed_one(build_model, tmp_path, pytestconfig):
    model = prompted(build_model("llama"), "CAUSAL_LM").eval()
    batch = padded("left", "CAUSAL_LM")
    torch.save((model, batch, model(**batch).loss), tmp_path / "model.pt")
    command = (
        "import sys, torch, peft_prompt_ext\n"
        "model, batch, loss = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.testing.assert_close(model(**batch).loss, loss)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", command, str(tmp_path / "model.pt")],
        capture_output=True,
        text=True,
        cwd=pytestconfig.rootpath,
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_passes_without_a_layout_are_the_original_implementation(build_model, implementation):
    base = build_model("llama", attn_implementation=implementation)
    batch = padded("right", "CAUSAL_LM")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    before = base(**inputs).logits
    model = prompted(base, "CAUSAL_LM")
    assert engine_status(model).packed

    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, before)


def test_supervised_logits_have_the_same_loss_and_gradient(build_model):
    batch = padded("holes", "CAUSAL_LM")
    results = []
    for train_logits in ("all", "supervised"):
        model = prompted(build_model("llama"), "CAUSAL_LM", train_logits=train_logits).train()
        out = model(**batch, num_items_in_batch=torch.tensor(13))
        out.loss.backward()
        results.append((out.loss, prompt_of(model).grad))
    labelled = int((batch["labels"] != -100).sum())
    assert out.logits.shape == (1, labelled, 331)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
    assert model.eval()(**batch).logits.shape == (3, P + 11, 331)


def test_supervised_logits_without_labels_are_pefts(build_model):
    batch = padded("left", "CAUSAL_LM")
    del batch["labels"]
    model = prompted(build_model("llama"), "CAUSAL_LM", train_logits="supervised").eval()
    wanted = model(**batch).logits

    assert wanted.shape == (3, P + 11, 331)
    assert torch.equal(model.train()(**batch).logits, wanted)


def test_labels_of_another_width_than_the_texts_are_refused(build_model):
    batch = padded("right", "CAUSAL_LM")
    batch["labels"] = torch.nn.functional.pad(batch["labels"], (P, 0), value=-100)
    with pytest.raises(ValueError, match=r"labels are \[3, 16\]; wanted \[3, 11\]"):
        prompted(build_model("llama"), "CAUSAL_LM")(**batch)


def noised(module, inputs, output):
    """As NEFTune's hook: it needs embeddings [B, T, H], and its noise depends on their shape."""
    rows, tokens, _ = output.shape
    return output + module.training * torch.arange(rows * tokens).view(rows, tokens, 1) / tokens


def test_hooks_on_the_embeddings_see_the_whole_batch(build_model):
    losses, batch = [], padded("right", "CAUSAL_LM")
    for shared_prefix in (True, False):
        model = prompted(build_model("llama"), "CAUSAL_LM", shared_prefix=shared_prefix).train()
        plain = model(**batch).loss
        model.get_base_model().get_input_embeddings().register_forward_hook(noised)
        model._engine.forget_proofs()  # so that the probe runs with the hook
        losses.append(model(**batch).loss)
        assert engine_status(model).packed == shared_prefix
        assert abs(losses[-1] - plain) > 1e-2
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("kind", ["right", "left"])
def test_token_types_count_where_a_classifiers_base_model_reads_them(build_model, kind):
    batch = padded(kind, "SEQ_CLS")
    batch["token_type_ids"] = 1 + batch["input_ids"] % 2
    model = prompted(build_model("gpt2", "SEQ_CLS"), "SEQ_CLS").eval()
    without = model(**{**batch, "token_type_ids": None}).logits

    together = model(**batch).logits

    assert (together - without).abs().max() > 1e-3
    for row, real in enumerate(batch["attention_mask"].bool()):
        one = {name: batch[name][row, real][None] for name in ("input_ids", "attention_mask", "token_type_ids")}
        torch.testing.assert_close(together[row], model(**one).logits[0], rtol=0, atol=1e-4)


def test_rows_past_the_short_rotary_positions_take_pefts_path(build_model):
    """LongRoPE: a row longer than 16 tokens changes the positions of all rows, but not those of a kept prefix."""
    factors = {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    positions = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    model = prompted(other_model("phi3", **positions, rope_parameters=rope), "CAUSAL_LM").eval()
    assert engine_status(model).max_tokens == 16
    ids = make_batch("CAUSAL_LM", rows=2, text=20)["input_ids"]
    with torch.no_grad():
        for text in (ids[:, : 16 - P], ids):
            packed, alone = model(input_ids=text).logits, [model(input_ids=row[None]).logits[0] for row in text]
            torch.testing.assert_close(packed, torch.stack(alone), rtol=0, atol=1e-4)
            exact = model(input_ids=text, use_cache=True).logits  # PEFT's path
            torch.testing.assert_close(packed, exact, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_status_is_found_inside_a_compiled_model(build_model):
    assert engine_status(torch.compile(prompted(build_model("llama"), "CAUSAL_LM"))).packed


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([2, 7, 9])])
@pytest.mark.parametrize("shared_prefix", [True, False])
def test_logits_to_keep_counts_columns_of_the_padded_batch(build_model, keep, shared_prefix):
    model = prompted(build_model("llama"), "CAUSAL_LM", shared_prefix=shared_prefix)
    batch = padded("left", "CAUSAL_LM")
    del batch["labels"]
    columns = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
    real = torch.cat([torch.ones(3, P), batch["attention_mask"]], 1)[:, columns].bool()

    kept = model(**batch, logits_to_keep=keep).logits

    torch.testing.assert_close(kept[real], model(**batch).logits[:, columns][real])


@pytest.mark.parametrize("train_logits", ["all", "supervised"])
def test_shift_labels_name_what_the_kept_columns_predict(build_model, train_logits):
    batch = padded("right", "CAUSAL_LM")
    columns = torch.tensor([P - 1, P, P + 3])
    shift_labels = batch["input_ids"][:, [0, 1, 4]].masked_fill(batch["attention_mask"][:, [0, 1, 4]] == 0, -100)
    losses = []
    for shared_prefix in (True, False):
        options = {"shared_prefix": shared_prefix, "train_logits": train_logits}
        model = prompted(build_model("llama"), "CAUSAL_LM", **options).train()
        out = model(**batch, logits_to_keep=columns, shift_labels=shift_labels)
        assert out.logits.shape == (3, 3, 331)
        losses.append(out.loss)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("train_logits", ["all", "supervised"])
def test_a_first_token_is_predicted_by_the_prompts_last_one(build_model, train_logits):
    batch = padded("right", "CAUSAL_LM")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    batch["labels"][:, 0] = batch["input_ids"][:, 0]
    losses = []
    for shared_prefix in (True, False):
        options = {"shared_prefix": shared_prefix, "train_logits": train_logits}
        losses.append(prompted(build_model("llama"), "CAUSAL_LM", **options).train()(**batch).loss)
    torch.testing.assert_close(*losses)


def test_return_dict_false_gives_tuples(build_model):
    batch = padded("left", "CAUSAL_LM")
    for shared_prefix in (True, False):
        model = prompted(build_model("llama"), "CAUSAL_LM", shared_prefix=shared_prefix)
        loss, logits, *_ = model(**batch, return_dict=False)
        assert loss.dim() == 0
        assert logits.shape == (3, P + 11, 331)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions", "use_cache"])
def test_unsupported_outputs_take_pefts_path(build_model, asked):
    model = prompted(build_model("llama", attn_implementation="eager"), "CAUSAL_LM")
    out = model(**make_batch("CAUSAL_LM"), **{asked: True})
    name = {"use_cache": "past_key_values"}.get(asked, asked.removeprefix("output_"))
    assert out[name] is not None


@pytest.mark.parametrize("kind", ["left", "holes"])
def test_hidden_states_and_attentions_of_padded_rows_stand_at_their_columns(build_model, kind):
    model = prompted(build_model("llama", attn_implementation="eager"), "CAUSAL_LM")
    batch, asked = padded(kind, "CAUSAL_LM"), {"output_hidden_states": True, "output_attentions": True}
    together = model(**batch, **asked)
    for row, real in enumerate(batch["attention_mask"].bool()):
        one = model(input_ids=batch["input_ids"][row, real][None], **asked)
        places = torch.cat([torch.arange(P), P + real.nonzero()[:, 0]])
        torch.testing.assert_close(together.hidden_states[-1][row, places], one.hidden_states[-1][0])
        seen = together.attentions[-1][row][:, places][:, :, places]
        torch.testing.assert_close(seen, one.attentions[-1][0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(build_model, reentrant):
    batch = padded("holes", "CAUSAL_LM")
    gradients = []
    for checkpointing in (False, True):
        model = prompted(build_model("llama"), "CAUSAL_LM").train()
        if checkpointing:
            checkpoint_activations(model, use_reentrant=reentrant)
        model(**batch).loss.backward()
        gradients.append(prompt_of(model).grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


def test_autocast_and_bf16_backbones_are_as_close_as_pefts_own_path(build_model):
    batch = padded("right", "CAUSAL_LM")
    exact = prompted(build_model("llama"), "CAUSAL_LM")(**batch).loss.item()
    for low in (torch.bfloat16, torch.float16, "bf16"):
        errors = []
        for shared_prefix in (True, False):
            base = build_model("llama")
            model = prompted(base.bfloat16() if low == "bf16" else base, "CAUSAL_LM", shared_prefix=shared_prefix)
            with contextlib.nullcontext() if low == "bf16" else torch.autocast("cpu", low):
                out = model(**batch)
            out.loss.backward()
            assert prompt_of(model).grad.dtype == torch.float32
            assert engine_status(model).packed == shared_prefix
            errors.append(abs(out.loss.item() - exact))
        assert errors[0] <= errors[1] + 5e-3, (low, errors)


@pytest.mark.parametrize(
    ("task_type", "train_logits"), [("CAUSAL_LM", "all"), ("CAUSAL_LM", "supervised"), ("SEQ_CLS", "all")]
)
def test_the_trainer_gets_the_same_losses_with_and_without_the_engine(
    build_model, tmp_path, monkeypatch, task_type, train_logits
):
    name = "causal_lm" if task_type == "CAUSAL_LM" else "sequence_classification"
    packed, calls = getattr(forward, name), []
    monkeypatch.setattr(forward, name, lambda *args, **kwargs: calls.append(1) or packed(*args, **kwargs))
    losses = []
    for shared_prefix in (True, False):
        options = {"shared_prefix": shared_prefix, "train_logits": train_logits}
        model = prompted(build_model("llama", task_type), task_type, **options)
        engine_status(model)
        calls.clear()
        trainer = make_trainer(model, task_type, tmp_path / str(shared_prefix), gradient_accumulation_steps=2)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        assert len(calls) == 6 * 2 * shared_prefix  # two batches per step
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-4)


def test_a_backbone_that_was_packed_saves_and_loads_as_before(build_model, tmp_path):
    base = build_model("llama")
    assert engine_status(prompted(base, "CAUSAL_LM")).packed

    base.save_pretrained(tmp_path)

    assert "shared_prefix" not in (tmp_path / "config.json").read_text()
    loaded = AUTO_CLASSES["CAUSAL_LM"].from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["right", "left", "holes"])
def test_mixed_batches_equal_each_row_with_its_own_adapter(build_model, kind):
    model = mixed_model(build_model).eval()
    batch = padded(kind, "CAUSAL_LM")
    ids, mask = (batch[name].repeat(2, 1) for name in ("input_ids", "attention_mask"))
    names = ["default", "b", "c", "__base__", "c", "b"]

    logits = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits

    assert logits.shape == (6, 9 + 11, 331)  # the longest prompt; shorter ones are aligned right
    for row, name in enumerate(names):
        real = mask[row].bool()
        text = ids[row, real][None]
        if name == "__base__":
            wanted = model.get_base_model()(input_ids=text).logits[0]
        else:
            model.set_adapter(name)
            wanted = model(input_ids=text).logits[0, -text.shape[1] :]
        torch.testing.assert_close(logits[row, 9:][real], wanted, rtol=0, atol=1e-4)


def test_a_mixed_batch_trains_every_adapter_in_it(build_model):
    model = mixed_model(build_model).train()
    batch = padded("right", "CAUSAL_LM")
    names = ["default", "b", "c"]
    with pytest.raises(ValueError, match=r"'[bc]', which is not in training.*set_requires_grad"):
        model(**batch, adapter_names=names)

    model.set_requires_grad(names)
    model(**batch, adapter_names=names).loss.backward()

    assert prompt_of(model).grad.abs().sum() > 0
    assert prompt_of(model, "c").grad is not None


def test_each_row_of_a_mixed_batch_has_its_adapters_own_head(build_model):
    model = mixed_model(build_model, "SEQ_CLS").eval()
    for number, head in enumerate(model.base_model.score.modules_to_save.values()):
        torch.nn.init.normal_(head.weight, std=number + 1.0)
    batch = padded("left", "SEQ_CLS")
    del batch["labels"]
    names = ["c", "__base__", "b"]

    logits = model(**batch, adapter_names=names).logits

    wanted = []
    for row, name in enumerate(names):
        model.set_adapter("default" if name == "__base__" else name)
        one = {key: value[row : row + 1] for key, value in batch.items()}
        if name == "__base__":
            with model.disable_adapter():
                text = one["input_ids"][one["attention_mask"].bool()][None]
                wanted.append(model(input_ids=text).logits[0])
        else:
            wanted.append(model(**one).logits[0])
    torch.testing.assert_close(logits, torch.stack(wanted), rtol=0, atol=1e-4)


def test_mixed_batches_are_refused_where_adapters_have_other_modules_of_their_own(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM", modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="each adapter has its own lm_head"):
        model(**padded("right", "CAUSAL_LM"), adapter_names=["default", "default", "__base__"])


def packed_tokens(monkeypatch):
    """Collect the number of tokens of each packed pass."""
    seen, run = [], forward.run
    monkeypatch.setattr(
        forward, "run", lambda model, embeds, *a, **k: seen.append(embeds.shape[1]) or run(model, embeds, *a, **k)
    )
    return seen


@pytest.mark.filterwarnings("ignore:.*will not detect padding:UserWarning")
@pytest.mark.parametrize(
    ("architecture", "task_type"),
    [*product(PACKED, ["CAUSAL_LM", "SEQ_CLS"]), ("phi3", "CAUSAL_LM"), ("mixtral", "CAUSAL_LM")],
)
def test_without_gradients_the_prompt_runs_once_and_the_results_stay(
    build_model, architecture, task_type, monkeypatch
):
    base = other_model(architecture) if architecture in MORE else build_model(architecture, task_type)
    model = prompted(base, task_type, num_virtual_tokens=13).eval()
    batch = padded("holes", task_type)
    wanted = model(**batch)
    assert engine_status(model).keeps_prompts
    seen = packed_tokens(monkeypatch)

    with torch.no_grad():
        results = [model(**batch) for _ in range(3)]

    text = int(batch["attention_mask"].sum())
    assert seen.count(text) == 3
    assert len(seen) == 4 + (task_type == "CAUSAL_LM")  # the prompt runs once, and again for its logits
    for result in results:
        torch.testing.assert_close(result.loss, wanted.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(result.logits, wanted.logits, rtol=0, atol=1e-4)


def change_the_prompt(model):
    prompt_of(model).data.mul_(3)


def change_the_base_model(model):
    with torch.no_grad():
        model.get_base_model().get_parameter("model.layers.0.self_attn.k_proj.weight").mul_(3)


def replace_a_weight(model):
    weight = model.get_base_model().get_parameter("model.layers.0.self_attn.v_proj.weight")
    weight.data = weight.data * 3


def train_through_a_raw_pointer(model):
    model.train()
    weight = model.get_base_model().get_parameter("model.layers.0.self_attn.v_proj.weight")
    weight.detach().numpy()[:] *= 3
    model.eval()


def merge_into_a_weight(model):
    """Write as LoRA's merging does; evaluation begins afterwards."""
    model.get_base_model().get_parameter("model.layers.0.self_attn.v_proj.weight").data += 1
    model.eval()


def disable_adapters_of_the_base_model(model):
    for module in model.get_base_model().modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)


def change_the_precision(model):
    model.double()


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize(
    "change",
    [
        change_the_prompt,
        change_the_base_model,
        replace_a_weight,
        train_through_a_raw_pointer,
        merge_into_a_weight,
        disable_adapters_of_the_base_model,
        change_the_precision,
    ],
)
def test_a_kept_prompt_runs_again_after(build_model, change):
    base = build_model("llama")
    if change is disable_adapters_of_the_base_model:
        inject_adapter_in_model(LoraConfig(init_lora_weights=False), base)
    model = prompted(base, "CAUSAL_LM").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = padded("left", "CAUSAL_LM")
    with torch.no_grad():
        model(**batch)
        change(model)
        kept = model(**batch).logits
    torch.testing.assert_close(kept, model(**batch).logits, rtol=0, atol=1e-4)


def test_autocast_and_heads_have_kept_prompts_of_their_own(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM", modules_to_save=["lm_head"]).eval()
    model.add_adapter("b", model.peft_config["default"])
    torch.nn.init.normal_(model.base_model.lm_head.modules_to_save["b"].weight)
    model.prompt_encoder["b"].load_state_dict(model.prompt_encoder["default"].state_dict())
    batch = padded("left", "CAUSAL_LM")
    for name in ("default", "b"):
        model.set_adapter(name)
        for low in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                wanted = model(**batch).logits
                with torch.no_grad():
                    torch.testing.assert_close(model(**batch).logits, wanted, rtol=0, atol=2e-2 if low else 1e-5)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS"])
def test_kept_prompts_are_not_pickled_and_rows_without_text_take_theirs_along(build_model, task_type):
    model = prompted(build_model("llama", task_type), task_type).eval()
    batch = padded("left", task_type)
    batch["attention_mask"][2] = 0
    del batch["labels"]
    with torch.no_grad():
        model(**padded("left", task_type))
        assert model._engine.prefixes
        kept = model(**batch).logits
    assert not copy.deepcopy(model)._engine.prefixes
    torch.testing.assert_close(kept, model(**batch).logits)


def test_wrong_adapter_names_are_refused(build_model):
    model = mixed_model(build_model)
    batch = padded("right", "CAUSAL_LM")
    with pytest.raises(ValueError, match=r"\['d'\].*'default', 'b', 'c'"):
        model(**batch, adapter_names=["default", "d", "b"])
    with pytest.raises(ValueError, match="1 names, the batch has 3 rows"):
        model(**batch, adapter_names=["default"])
    with pytest.raises(ValueError, match="do not support use_cache"):
        model(**batch, adapter_names=["default", "b", "c"], use_cache=True)


def test_reading_a_padded_text_in_chunks_is_refused(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM")
    batch = padded("left", "CAUSAL_LM")
    del batch["labels"]
    with pytest.raises(ValueError, match=r"prefill_chunk_size \(3\)"):
        model.generate(**batch, max_new_tokens=2, prefill_chunk_size=3)


def test_windows_that_attention_does_not_get_limit_the_rows(build_model, monkeypatch):
    """Mistral with its window of 16 only in its masks."""

    def windowless(*args, sliding_window=None, **kwargs):
        return attend(*args, **kwargs)

    attend = interface._attention
    monkeypatch.setattr(interface, "_attention", windowless)
    model = prompted(build_model("mistral"), "CAUSAL_LM", num_virtual_tokens=4)
    assert engine_status(model).max_tokens == 16

    assert_rows_equal_those_alone(model, padded("left", "CAUSAL_LM"), "CAUSAL_LM")  # 4 + 11 tokens are packed
    wide = prompted(build_model("mistral"), "CAUSAL_LM", num_virtual_tokens=9)
    assert_rows_equal_those_alone(wide, padded("left", "CAUSAL_LM"), "CAUSAL_LM")  # 9 + 11 are not


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "gemma3_text", "opt"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_generating_from_left_padded_rows_equals_each_row_alone(build_model, architecture, use_cache):
    model = prompted(build_model(architecture), "CAUSAL_LM")
    batch = padded("left", "CAUSAL_LM")
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "use_cache": use_cache,
        "eos_token_id": None,
        "pad_token_id": 2,
    }
    together = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options)[:, 11:]
    for row, real in enumerate(batch["attention_mask"].bool()):
        text = batch["input_ids"][row, real][None]
        one = model.generate(input_ids=text, attention_mask=torch.ones_like(text), **options)[0, text.shape[1] :]
        assert together[row].tolist() == one.tolist()


@pytest.mark.parametrize("values", [{"shared_prefix": 1}, {"shared_prefix_probe": "no"}, {"train_logits": "some"}])
def test_bad_values_are_refused_by_name(values):
    (name,) = values
    with pytest.raises(ValueError, match=name):
        PromptTuningExtConfig(task_type="CAUSAL_LM", **values)


def test_a_batch_without_any_label_has_the_loss_that_peft_gives(build_model):
    batch = padded("right", "CAUSAL_LM")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for shared_prefix in (True, False):
        assert prompted(build_model("llama"), "CAUSAL_LM", shared_prefix=shared_prefix)(**batch).loss.isnan()


def test_a_copy_has_an_engine_of_its_own(build_model):
    model, other = prompted(build_model("llama"), "CAUSAL_LM").eval(), build_model("llama")
    batch = padded("left", "CAUSAL_LM")
    with torch.no_grad():
        wanted = model(**batch).logits
        shallow = copy.copy(model)
        shallow(**batch, output_hidden_states=True)
        shallow._modules = {**model._modules, "base_model": other}

        torch.testing.assert_close(shallow(**batch).logits, wanted)
    assert engine_status(model).packed
    assert set(model._engine.prefixes) == {"default"}


def test_the_status_is_of_a_packed_batch_that_raises(build_model):
    model, batch = prompted(build_model("llama"), "CAUSAL_LM"), padded("left", "CAUSAL_LM")
    model(**batch, output_hidden_states=True)
    with pytest.raises(ValueError, match="labels"):
        model(**{**batch, "labels": batch["labels"][:, 1:]})

    assert engine_status(model).packed
