"""The engine on a CUDA device: every attention against the oracle, models against their rows alone, and its waits.

Left out by default, and skipped where there is no such device: `python -m pytest -m gpu`.
"""

import warnings
from functools import partial
from itertools import product

import pytest
import torch

from peft_prompt_ext import engine_status
from peft_prompt_ext._versions import checkpoint_activations
from peft_prompt_ext.shared_prefix.attention import select
from peft_prompt_ext.shared_prefix.attention.select import ATTENTIONS, AttentionCall, differs
from tests.helpers import prompt_of, prompted
from tests.peft_models.suffix import make_suffix_batch, run_alone
from tests.shared_prefix.helpers import alone, mixed_model, padded


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # kernels and compilers warn
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(params=["float32", "tf32", "bfloat16", "float16"])
def numbers(request):
    """The dtype, and the largest relative error of a small model in it."""
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    yield DTYPES.get(request.param, torch.float32), {"float32": 1e-5, "tf32": 1e-2}.get(request.param, 5e-2)
    torch.set_float32_matmul_precision("highest")


def call_of(dtype, heads=(8, 2), size=64, **options):
    tensors = tuple((count, size, dtype) for count in (*heads, heads[1]))
    return AttentionCall(torch.device("cuda", 0), tensors, tuple(sorted(options.items())))


OPTIONS = ({}, {"scaling": 0.3}, {"sliding_window": 50}, {"softcap": 20.0})
CALLS = [
    *product(("sdpa", "varlen"), ((8, 8), (8, 2), (9, 3)), OPTIONS),
    *(("flex", (8, 2), options) for options in OPTIONS),  # each compiles
    *(("flex", heads, {}) for heads in ((8, 8), (9, 3))),
]


@pytest.mark.parametrize(("name", "heads", "options"), CALLS, ids=str)
def test_attention_equals_the_dense_oracle(numbers, name, heads, options):
    dtype, _ = numbers
    if name == "varlen" and (dtype == torch.float32 or "softcap" in options):
        with pytest.raises(NotImplementedError):
            differs(ATTENTIONS[name], call_of(dtype, heads, **options))
        return
    assert differs(ATTENTIONS[name], call_of(dtype, heads, **options)) is None


@pytest.mark.parametrize("size", [16, 80, 128])
@pytest.mark.parametrize("name", ["sdpa", "varlen", "flex"])
def test_heads_of_other_sizes(name, size):
    assert differs(ATTENTIONS[name], call_of(torch.bfloat16, (4, 2), size)) is None


ARCHITECTURES = ("llama", "gpt2", "gemma2", "gemma3_text", "mistral")
MODELS = [
    *product(ARCHITECTURES, ("left", "holes"), ("sdpa", "varlen")),
    ("llama", "holes", "flex"),
    ("gemma2", "holes", "flex"),
]


@pytest.mark.parametrize(("architecture", "kind", "attention"), MODELS)
def test_a_batch_equals_each_row_alone_in_stock_peft(build_model, monkeypatch, numbers, architecture, kind, attention):
    """The windows are 16: 13 virtual tokens and 11 real ones."""
    dtype, tolerance = numbers
    monkeypatch.setenv(select.VARIABLE, attention)
    sizes = {"gpt2": {"n_embd": 64, "n_head": 4}}.get(architecture, {"head_dim": 16})
    model = prompted(build_model(architecture, **sizes).to("cuda", dtype), "CAUSAL_LM", num_virtual_tokens=13)
    batch = {name: x.cuda() for name, x in padded(kind, "CAUSAL_LM").items()}
    wanted_loss, wanted_logits, wanted_grad = alone(model, batch, "CAUSAL_LM")

    out = model(**batch)
    out.loss.backward()

    expected = attention
    if attention == "varlen" and (dtype == torch.float32 or architecture == "gemma2"):
        expected = "sdpa"
    assert engine_status(model).attention == expected, engine_status(model).reason
    assert abs(out.loss.item() - wanted_loss) <= tolerance * abs(wanted_loss)
    assert (prompt_of(model).grad - wanted_grad).norm() <= 2 * tolerance * wanted_grad.norm()
    for row, wanted in enumerate(wanted_logits):
        got = torch.cat([out.logits[row][:13], out.logits[row][13:][batch["attention_mask"][row].bool()]])
        assert (got - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("attention", ["sdpa", "varlen", "flex"])
def test_mixed_batches_and_kept_prompts(build_model, monkeypatch, attention):
    monkeypatch.setenv(select.VARIABLE, attention)
    model = mixed_model(partial(build_model, head_dim=16)).to("cuda", torch.bfloat16).eval()
    batch = {name: x.cuda() for name, x in padded("left", "CAUSAL_LM").items()}
    names = ["b", "__base__", "c"]
    results = []
    for gradients in (True, False):  # without gradients, prefixes are kept
        with torch.set_grad_enabled(gradients):
            results.append(model(**batch, adapter_names=names).logits[:, 9:][batch["attention_mask"].bool()].float())
    wanted = []
    for row, name in enumerate(names):
        text = batch["input_ids"][row, batch["attention_mask"][row].bool()][None]
        if name == "__base__":
            wanted.append(model.get_base_model()(input_ids=text).logits[0].float())
        else:
            model.set_adapter(name)
            wanted.append(model(input_ids=text).logits[0, -text.shape[1] :].float())
    for result in results:
        assert (result - torch.cat(wanted)).norm() <= 5e-2 * torch.cat(wanted).norm()
    assert set(model._engine.prefixes) == {"b", "c"}


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mistral"])
def test_a_suffix_batch_equals_each_row_alone(build_model, monkeypatch, numbers, architecture, attention):
    """The windows are 16: texts of up to eleven tokens and 13 virtual ones."""
    dtype, tolerance = numbers
    monkeypatch.setenv(select.VARIABLE, attention)
    base_model = build_model(architecture, head_dim=16).to("cuda", dtype)
    model = prompted(base_model, "CAUSAL_LM", prompt_position="suffix", num_virtual_tokens=13).train()
    batch = {name: x.cuda() for name, x in make_suffix_batch("holes").items()}
    prompt = prompt_of(model)
    wanted_loss, _, _ = run_alone(base_model, [prompt.to(dtype)] * 3, batch)
    wanted_loss.backward()
    wanted = prompt.grad.clone()
    for _ in range(2):  # the second step finds the texts
        prompt.grad = None
        loss = model(**batch).loss
        loss.backward()
        assert abs(loss.item() - wanted_loss.item()) <= tolerance * abs(wanted_loss.item())
        assert (prompt.grad - wanted).norm() <= 2 * tolerance * wanted.norm()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(build_model, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = prompted(build_model("llama", head_dim=16).to("cuda", torch.bfloat16), "CAUSAL_LM").train()
        if checkpointing:
            checkpoint_activations(model, use_reentrant=reentrant)
        model(**{name: x.cuda() for name, x in padded("holes", "CAUSAL_LM").items()}).loss.backward()
        gradients.append(prompt_of(model).grad)
    assert (gradients[0] - gradients[1]).norm() <= 2e-2 * gradients[0].norm()


@pytest.mark.parametrize("logits", ["all", "supervised"])
def test_a_training_step_waits_for_the_device_twice_at_most(build_model, logits):
    model = prompted(build_model("llama", head_dim=16).cuda(), "CAUSAL_LM", train_logits=logits).train()
    batch = {name: x.cuda() for name, x in padded("left", "CAUSAL_LM").items()}
    model(**batch).loss.backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            model(**batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{wait.filename}:{wait.lineno}" for wait in waits if "synchroniz" in str(wait.message)]
    assert 1 <= len(places) <= 2, places
