"""Changes that make a kept prefix invalid are detected."""

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.output_capturing import install_all_output_capturing_hooks

from peft_prompt_ext.shared_prefix.watch import Watch
from tests.helpers import make_batch, one_thread, prompted  # noqa: F401


def base_model(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 41}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=331, **sizes, **changes)).eval()
    # `add_adapter` of transformers 5.24 needs a later PEFT
    lora = LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    return inject_adapter_in_model(lora, model).eval()


def attention(model):
    return model.model.layers[1].self_attn


def doubled(module, args, output):
    return (2 * output[0], *output[1:])


def set_a_scale(model):
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 5.0)


def wrap_a_forward(model):
    own = attention(model).forward
    attention(model).forward = lambda *args, **kwargs: doubled(None, None, own(*args, **kwargs))


def write(name, tensor_of):
    def change(model):
        with torch.no_grad():
            tensor_of(model).mul_(3)

    change.__name__ = name
    return change


CHANGES = [
    set_a_scale,
    lambda model: attention(model).q_proj.enable_adapters(False),
    lambda model: model.set_adapter([]) if False else attention(model).v_proj.merge(),
    lambda model: setattr(attention(model), "scaling", 0.7),
    lambda model: attention(model).register_forward_hook(doubled),
    lambda model: attention(model).register_forward_pre_hook(lambda module, args: None),
    wrap_a_forward,
    lambda model: model.train(),
    lambda model: attention(model).train(),
    write("parameter", lambda model: attention(model).k_proj.weight),
    write("view of a parameter", lambda model: attention(model).k_proj.weight[0]),
    write("buffer", lambda model: model.model.rotary_emb.inv_freq),
    write("norm", lambda model: model.model.layers[0].input_layernorm.weight),
    lambda model: setattr(attention(model).k_proj, "weight", nn.Parameter(torch.ones(24, 24))),
    lambda model: setattr(attention(model), "k_proj", nn.Linear(24, 24, bias=False)),
    lambda model: setattr(model.model.rotary_emb, "inv_freq", torch.ones(6)),
    lambda model: model.model.layers.append(model.model.layers[0]),
    lambda model: setattr(model.config, "_attn_implementation", "eager"),
    lambda model: setattr(attention(model), "new", 1),
    lambda model: delattr(attention(model), "scaling"),
    lambda model: model.model.layers[0].mlp.register_buffer("new", torch.ones(1)),
    lambda model: attention(model).q_proj.scaling.clear(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change):
    model = base_model()
    watch = Watch(model)
    assert watch.constant
    model(input_ids=make_batch("CAUSAL_LM")["input_ids"])
    assert watch.holds()

    change(model)

    assert not watch.holds()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: attention(model).register_forward_hook(doubled),
        lambda model: attention(model).register_forward_pre_hook(lambda module, args: None),
        wrap_a_forward,
        lambda model: attention(model).train(),
    ],
)
def test_unknown_hooks_and_forwards_are_not_constant(change):
    model = base_model()
    change(model)
    watch = Watch(model)

    assert not watch.constant
    assert watch.holds()  # so it is not built again


def test_hooks_that_only_collect_outputs_are_constant():
    model = base_model()
    install_all_output_capturing_hooks(model)
    assert any(module._forward_hooks for module in model.modules())
    assert Watch(model).constant


@pytest.mark.parametrize("offload", [True, False])
def test_weights_that_come_for_each_pass_are_not_constant_and_weights_that_stay_are(offload):
    from accelerate import cpu_offload
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = base_model()
    if offload:
        cpu_offload(model, execution_device="cpu")
    else:
        add_hook_to_module(attention(model), AlignDevicesHook(io_same_device=True))
    assert Watch(model).constant == (not offload)


def test_weights_made_in_inference_mode_are_not_constant():
    with torch.inference_mode():
        model = LlamaForCausalLM(LlamaConfig(vocab_size=31, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    watch = Watch(model.eval())
    assert not watch.constant
    assert watch.holds()


def test_what_a_pass_writes_itself_counts_by_its_values():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
    model = base_model(rope_parameters={**rope, "original_max_position_embeddings": 40}, max_position_embeddings=80)
    ids = make_batch("CAUSAL_LM", rows=1, text=50)["input_ids"]
    model(input_ids=ids[:, :5])
    watch = Watch(model)
    model(input_ids=ids[:, :7])
    # transformers 5.17 writes frequencies only on a change
    assert not watch.holds() or Version(transformers.__version__) < Version("5.23")

    watch.expect()
    model(input_ids=ids[:, :9])
    assert watch.holds()

    model(input_ids=ids)  # other positions
    assert not watch.holds()


class Steering:
    """A hook with a variable strength."""

    strength = 0.0

    def __call__(self, module, args, output):
        return output + self.strength


def dropping(model):
    model.train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize("when", ["before the first batch", "between batches"])
def test_a_changed_hook_takes_effect(when):
    model, hook = prompted(base_model(), "CAUSAL_LM").eval(), Steering()
    ids = make_batch("CAUSAL_LM")["input_ids"]
    layer = model.get_base_model().model.layers[0].mlp
    with torch.no_grad():
        if when == "between batches":
            model(input_ids=ids)
        handle = layer.register_forward_hook(hook)
        for strength in (0.0, 0.5, 0.9):
            hook.strength = strength
            got = model(input_ids=ids).logits
            alone = [model(input_ids=row[None], use_cache=True).logits[0] for row in ids]  # PEFT's path
            torch.testing.assert_close(got, torch.stack(alone), rtol=0, atol=1e-4)
        handle.remove()
        torch.testing.assert_close(model(input_ids=ids).logits, model(input_ids=ids, use_cache=True).logits)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_a_base_model_in_training_mode_drops_out_anew_in_every_batch():
    model = prompted(base_model(), "CAUSAL_LM").eval()
    ids = make_batch("CAUSAL_LM")["input_ids"]
    with torch.no_grad():
        model(input_ids=ids)
        dropping(model.get_base_model())
        assert not model.training
        model(input_ids=ids)
    assert not model._engine.prefixes
