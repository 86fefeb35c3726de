"""Several prompts in one model: training, deletion, and methods that prompts do not support."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_prompt_ext import PromptTuningExtConfig
from tests.helpers import make_batch, one_thread, prompt_of, prompted  # noqa: F401


def config(task_type="CAUSAL_LM", **changes):
    return PromptTuningExtConfig(
        task_type=task_type, num_virtual_tokens=3, prompt_tuning_init="RANDOM_UNIFORM", **changes
    )


def in_training(model):
    """List the adapters that get a gradient, for prompts and heads."""
    heads = [m for m in model.base_model.modules() if hasattr(m, "modules_to_save")]
    places = [model.prompt_encoder, *(head.modules_to_save for head in heads)]
    return [
        [name for name, part in place.items() if any(p.requires_grad for p in part.parameters())] for place in places
    ]


@pytest.fixture(params=["CAUSAL_LM", "SEQ_CLS"])
def model(request, build_model):
    built = prompted(build_model("llama", request.param), request.param)
    for name in ("b", "c"):
        built.add_adapter(name, config(request.param))
    built.task_type = request.param
    return built


def test_an_added_adapter_is_not_in_training_before_it_is_active(model):
    assert all(place == ["default"] for place in in_training(model))


def test_only_the_active_adapter_is_in_training(model):
    for name in ("c", "default", "b"):
        model.set_adapter(name)

        assert all(place == [name] for place in in_training(model))


def test_every_parameter_in_training_gets_a_gradient(model):
    """DistributedDataParallel waits for each gradient."""
    model.set_adapter("b")

    model(**make_batch(model.task_type)).loss.backward()

    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_an_adapter_set_for_inference_is_not_in_training(model):
    model.set_adapter("b", inference_mode=True)

    assert all(place == [] for place in in_training(model))


def test_an_adapter_loaded_to_be_trained_is_in_training_once_it_is_active(model, tmp_path):
    model.save_pretrained(tmp_path, selected_adapters=["b"])

    model.load_adapter(tmp_path / "b", "further", is_trainable=True)

    assert all(place == ["default"] for place in in_training(model))
    model.set_adapter("further")
    assert all(place == ["further"] for place in in_training(model))
    assert model.peft_config["further"].inference_mode is False


def test_several_adapters_can_be_in_training(model):
    model.set_requires_grad(["b", "c"])
    assert all(place == ["default", "b", "c"] for place in in_training(model))

    model.set_requires_grad("c", requires_grad=False)
    assert all(place == ["default", "b"] for place in in_training(model))


def test_one_name_in_a_list_is_that_adapter(model):
    model.set_adapter(["b"])

    assert model.active_adapter == "b"


@pytest.mark.parametrize("names", [["b", "c"], [], "d", ["d"]])
def test_anything_but_one_known_adapter_is_refused(model, names):
    with pytest.raises(ValueError, match=r"wanted one of \['default', 'b', 'c'\]"):
        model.set_adapter(names)

    assert model.active_adapter == "default"


def test_deleting_the_active_adapter_makes_another_one_active(model):
    model.set_adapter("c")

    with pytest.warns(UserWarning, match="'c' was active and is deleted; 'default' is active now"):
        model.delete_adapter("c")

    assert model.active_adapter == "default" and list(model.peft_config) == ["default", "b"]
    assert all(place == ["default"] for place in in_training(model))
    assert torch.isfinite(model(**make_batch(model.task_type)).loss)


def test_deleting_another_adapter_changes_no_result(model):
    model.set_adapter("c")
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)  # so that the heads differ
    wanted = model(**make_batch(model.task_type)).logits

    model.delete_adapter("b")

    assert torch.equal(model(**make_batch(model.task_type)).logits, wanted)


def test_a_model_without_adapters_raises_and_takes_a_new_one(build_model):
    model, batch = prompted(build_model("llama"), "CAUSAL_LM"), make_batch("CAUSAL_LM")
    bare = build_model("llama")(**batch).logits

    model.delete_adapter("default")

    for call in (lambda: model(**batch), lambda: model.generate(input_ids=batch["input_ids"])):
        with pytest.raises(ValueError, match="no adapter: the last one was deleted"):
            call()
    assert torch.equal(model.get_base_model()(**batch).logits, bare)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, bare)
    model.add_adapter("new", config())
    assert model.active_adapter == "new" and in_training(model) == [["new"]]
    assert torch.isfinite(model(**batch).loss)


def test_deleting_an_unknown_adapter_is_refused(model):
    with pytest.raises(ValueError, match=r"'d'.*\['default', 'b', 'c'\]"):
        model.delete_adapter("d")


@pytest.mark.parametrize(
    "name", ["merge_and_unload", "merge_adapter", "unmerge_adapter", "unload", "add_weighted_adapter"]
)
def test_unsupported_methods_raise_and_are_no_attributes_as_in_peft(model, name):
    assert not hasattr(model, name)

    for error in (AttributeError, NotImplementedError):
        with pytest.raises(error, match=rf"{name}: a (weighted sum of )?prompt"):
            getattr(model, name)()


def test_an_unknown_attribute_is_an_error_as_in_peft(model):
    with pytest.raises(AttributeError, match="no attribute 'made_up'"):
        model.made_up  # noqa: B018


def test_other_adapters_of_peft_can_still_be_merged(build_model):
    lora = get_peft_model(build_model("llama"), LoraConfig(task_type="CAUSAL_LM"))

    assert not isinstance(lora.merge_and_unload(), PeftModel)


@pytest.mark.parametrize("task_type", ["TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_adapter_names_where_they_would_be_ignored_are_refused(build_model, task_type):
    model = prompted(build_model("bert", task_type), task_type)

    with pytest.raises(ValueError, match="takes no adapter_names"):
        model(**make_batch(task_type), adapter_names=["default"] * 3)


def test_a_training_batch_of_an_adapter_that_is_not_in_training_is_refused(build_model):
    model = prompted(build_model("llama"), "CAUSAL_LM").train()
    model.add_adapter("b", config())
    names, batch = ["default", "b", "b"], make_batch("CAUSAL_LM")

    with pytest.raises(ValueError, match=r"'b', which is not in training.*set_requires_grad\(\['b', 'default'\]\)"):
        model(**batch, adapter_names=names)

    with torch.no_grad():
        assert torch.isfinite(model(**batch, adapter_names=names).loss)
    model.set_requires_grad(names)
    model(**batch, adapter_names=names).loss.backward()
    assert prompt_of(model, "b").grad.abs().sum() > 0
