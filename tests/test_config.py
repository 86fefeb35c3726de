import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model

from peft_prompt_ext import PromptTuningExtConfig, available_inits


def config(init="SAMPLE_VOCAB", size=7, task_type="CAUSAL_LM", text=None, **kwargs):
    return PromptTuningExtConfig(
        task_type=task_type,
        num_virtual_tokens=size,
        prompt_tuning_init=init,
        prompt_tuning_init_text=text,
        prompt_tuning_init_kwargs=kwargs or None,
    )


@pytest.mark.parametrize("name", ["sample_vocab", "Sample_Vocab", "SAMPLE_VOCAB", PromptTuningInit.SAMPLE_VOCAB])
def test_the_init_is_accepted_in_any_case_and_stored_upper(name):
    stored = config(name).prompt_tuning_init

    assert stored == "SAMPLE_VOCAB" and type(stored) is str


def test_every_init_of_stock_peft_is_a_name_here():
    assert {stock.value for stock in PromptTuningInit} <= set(available_inits())


def test_the_default_init_is_not_random():
    assert PromptTuningExtConfig(task_type="CAUSAL_LM").prompt_tuning_init == "SAMPLE_VOCAB"


@pytest.mark.parametrize("task_type", list(TaskType))
def test_there_is_one_prompt_for_every_task(task_type):
    assert config(task_type=task_type).num_transformer_submodules == 1


def test_a_class_label_feature_becomes_plain_texts():
    datasets = pytest.importorskip("datasets")

    built = config("CLASS_LABELS", labels=datasets.ClassLabel(names=["bad", "good"]))

    assert built.prompt_tuning_init_kwargs == {"labels": ["bad", "good"]}


def test_labels_that_can_be_read_only_once_are_not_lost():
    built = config("CLASS_LABELS", labels=(label for label in ["bad", "good"]))

    assert built.prompt_tuning_init_kwargs == {"labels": ["bad", "good"]}


@pytest.mark.parametrize(
    "built",
    [
        config(),
        config("CLASS_LABELS", labels=["bad", "good"]),
        PromptTuningExtConfig(task_type="SEQ_CLS", tokenizer_name_or_path="some", tokenizer_kwargs={"use_fast": True}),
        PromptTuningExtConfig(
            task_type="CAUSAL_LM",
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="words",
            tokenizer_name_or_path="x",
        ),
    ],
    ids=lambda built: built.prompt_tuning_init,
)
def test_stock_peft_accepts_the_dict(built):
    stock = PromptTuningConfig(**built.to_dict())

    assert set(built.to_dict()) == {f.name for f in fields(PromptTuningConfig)}
    assert stock.num_virtual_tokens == built.num_virtual_tokens and stock.task_type == built.task_type


def test_text_without_a_tokenizer_name_is_saved_with_the_base_models():
    built = config("TEXT", text="words")
    built.base_model_name_or_path = "org/model"

    assert built.to_dict()["tokenizer_name_or_path"] == "org/model"


@pytest.mark.parametrize("size", [0, -1, 2.5, 8.0, "8", True, False, None])
def test_a_wrong_number_of_virtual_tokens_is_refused(size):
    with pytest.raises(ValueError, match=rf"num_virtual_tokens \({size!r}\) must be a whole number, 1 or more"):
        config(size=size)


@pytest.mark.parametrize("seed", [-1, 0.5, None])
def test_a_wrong_seed_is_refused(seed):
    with pytest.raises(ValueError, match=rf"prompt_tuning_init_seed \({seed!r}\) must be a whole number"):
        PromptTuningExtConfig(task_type="CAUSAL_LM", prompt_tuning_init_seed=seed)


def test_a_seed_that_no_generator_takes_is_refused_before_any_model():
    with pytest.raises(ValueError, match="prompt_tuning_init_seed"):
        PromptTuningExtConfig(task_type="CAUSAL_LM", prompt_tuning_init_seed=2**64)


def test_a_missing_task_type_is_refused():
    with pytest.raises(ValueError, match=r"task_type is required, got None. Set one of: .*CAUSAL_LM"):
        PromptTuningExtConfig()


@pytest.mark.parametrize(("wrong", "near"), [("CLAS_LABELS", "CLASS_LABELS"), ("SAMPLE_VOCABULARY", "SAMPLE_VOCAB")])
def test_an_unknown_init_suggests_the_nearest_and_lists_all(wrong, near):
    with pytest.raises(ValueError, match=rf"'{wrong}'.*did you mean '{near}'.*{', '.join(available_inits())}"):
        config(wrong)


def test_an_init_kwarg_that_is_unknown_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"RANDOM_UNIFORM has no argument 'scal' \(did you mean 'scale'\?\)"):
        config("RANDOM_UNIFORM", scal=1.0)


def test_an_init_kwarg_for_a_scheme_without_any_is_refused():
    with pytest.raises(ValueError, match=r"RANDOM has no argument 'scale'\. Its arguments: none"):
        config("RANDOM", scale=1.0)


def test_a_name_of_an_init_kwarg_must_be_a_text():
    with pytest.raises(ValueError, match=r"SAMPLE_VOCAB has no argument 3\b"):
        PromptTuningExtConfig(task_type="CAUSAL_LM", prompt_tuning_init_kwargs={3: 1})


@pytest.mark.parametrize(("init", "name"), [("CLASS_LABELS", "labels"), ("TRANSFER", "source")])
def test_a_missing_init_kwarg_is_named(init, name):
    with pytest.raises(ValueError, match=rf"{init} needs '{name}', got \[\]"):
        config(init)


def test_init_kwargs_must_be_a_dict():
    with pytest.raises(ValueError, match=r"must be a dict, got list \(\['a'\]\)"):
        PromptTuningExtConfig(task_type="CAUSAL_LM", prompt_tuning_init_kwargs=["a"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "labels is empty"),
        ("good", r"must be a list of texts, got one text \('good'\)"),
        (["good", "bad", "good"], "has 'good' more than once"),
        (["good", " "], "must be a text with words, got ' '"),
        (["good", 3], "must be a text with words, got 3"),
        (list("abcdefgh"), "8 labels need 8 slots; num_virtual_tokens is 7"),
    ],
)
def test_labels_that_cannot_work_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        config("CLASS_LABELS", labels=labels)


@pytest.mark.parametrize(
    ("init", "kwargs", "message"),
    [
        ("CLASS_LABELS", {"labels": ["a"], "position": "firts"}, r"'firts'\) must be .*did you mean 'first'"),
        ("CLASS_LABELS", {"labels": ["a"], "fallback": "SAMPLE_VOCA"}, "did you mean 'SAMPLE_VOCAB'"),
        ("CLASS_LABELS", {"labels": ["a"], "fallback": "class_labels"}, "must be another scheme"),
        ("CLASS_LABELS", {"labels": ["a"], "fallback_kwargs": {"population": 3}}, r"population \(3\) must be"),
        ("CLASS_LABELS", {"labels": ["a"], "fallback_kwargs": {"size": 3}}, "SAMPLE_VOCAB has no argument 'size'"),
        ("CLASS_LABELS", {"labels": ["a"], "fallback": "TRANSFER"}, "TRANSFER needs 'source'"),
        ("CLASS_LABELS", {"labels": ["a"], "fallback": "TEXT"}, r"prompt_tuning_init_text \(None\) must be a text"),
        ("SAMPLE_VOCAB", {"population": 6}, r"population \(6\) must be a whole number, at least .* \(7\)"),
        ("SAMPLE_VOCAB", {"population": 7.5}, r"population \(7.5\) must be a whole number"),
        ("SAMPLE_VOCAB", {"population": "9"}, r"population \('9'\) must be a whole number"),
        ("SAMPLE_VOCAB", {"population": True}, r"population \(True\) must be a whole number"),
        ("SAMPLE_VOCAB", {"population": 9, "corpus": Path("tests")}, r"corpus \('tests'\) is not a text file"),
        ("SAMPLE_VOCAB", {"corpus": ["a text"]}, "Set population as well"),
        ("SAMPLE_VOCAB", {"population": 9, "corpus": "no/such.txt"}, r"corpus \('no/such.txt'\) is not a text file"),
        ("RANDOM_UNIFORM", {"scale": 0}, r"scale \(0\) must be a number above 0"),
        ("RANDOM_UNIFORM", {"scale": float("nan")}, r"scale \(nan\) must be a number above 0"),
        ("TRANSFER", {"source": []}, r"source \(\[\]\) must be a folder or Hub id"),
        ("TRANSFER", {"source": "a", "length_policy": "cut"}, r"length_policy \('cut'\) must be one of"),
        ("TRANSFER", {"source": ["a", "b"], "weights": [1.0]}, r"weights \(\[1.0\]\) must be one number"),
        ("TRANSFER", {"source": ["a", "b"], "weights": [0, 0]}, "with a sum above 0"),
        ("TRANSFER", {"source": ["a", "b"], "weights": [2, -1]}, r"weights \(\[2, -1\]\) must be one number >= 0"),
        ("TRANSFER", {"source": ["a", None]}, r"source \(\['a', None\]\) must be a folder or Hub id"),
    ],
)
def test_values_that_cannot_work_are_refused_when_the_config_is_built(init, kwargs, message):
    with pytest.raises(ValueError, match=message):
        config(init, **kwargs)


@pytest.mark.parametrize(
    ("init", "kwargs", "message"),
    [
        ("CLASS_LABELS", {"labels": 3}, "CLASS_LABELS: labels"),
        ("CLASS_LABELS", {"labels": None}, "CLASS_LABELS: labels"),
        ("CLASS_LABELS", {"labels": ["a"], "fallback": 3}, "CLASS_LABELS: fallback"),
        ("CLASS_LABELS", {"labels": ["a"], "fallback_kwargs": 3}, "CLASS_LABELS: fallback_kwargs"),
        ("SAMPLE_VOCAB", {"population": 9, "corpus": 3}, "SAMPLE_VOCAB: corpus"),
        ("TRANSFER", {"source": 3}, "TRANSFER: source"),
        ("TRANSFER", {"source": ["a", "b"], "weights": 0.5}, "TRANSFER: weights"),
        ("TRANSFER", {"source": ["a", "b"], "weights": ["x", "y"]}, "TRANSFER: weights"),
        ("TRANSFER", {"source": ["a", "b"], "weights": [float("inf"), 1.0]}, "TRANSFER: weights"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(init, kwargs, message):
    with pytest.raises(ValueError, match=message):
        config(init, **kwargs)


@pytest.mark.parametrize(
    ("name", "value"), [("prompt_tuning_init_text", ["a", "text"]), ("tokenizer_kwargs", "trust_remote_code")]
)
def test_a_field_of_another_kind_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        PromptTuningExtConfig(
            task_type="CAUSAL_LM", prompt_tuning_init="TEXT", **{"prompt_tuning_init_text": "a", name: value}
        )


@pytest.mark.parametrize("text", [None, "", "  \n"])
def test_an_empty_text_is_refused(text):
    with pytest.raises(ValueError, match=r"prompt_tuning_init_text .* must be a text with words"):
        config("TEXT", text=text)


def test_an_unknown_fill_is_refused():
    with pytest.raises(ValueError, match=r"TEXT: fill \('loop'\) must be one of 'repeat', 'sample_vocab'"):
        config("TEXT", text="words", fill="loop")


def test_a_source_without_a_config_is_refused_before_any_model(tmp_path):
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        config("TRANSFER", source=tmp_path)


@pytest.mark.parametrize("content", ['{"peft_type": "PROMPT_TU', "[]"])
def test_a_source_with_a_broken_config_is_refused_by_name(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)

    with pytest.raises(ValueError, match=rf"TRANSFER: .*{tmp_path}"):
        config("TRANSFER", source=str(tmp_path))


def test_a_source_of_another_method_is_refused_before_any_model(tmp_path, build_model):
    get_peft_model(build_model("llama"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="is a LORA adapter; only PROMPT_TUNING has a prompt"):
        config("TRANSFER", source=str(tmp_path))


@pytest.mark.parametrize("init", ["SAMPLE_VOCAB", "RANDOM"])
@pytest.mark.parametrize("value", [True, "yes"])
def test_remote_code_is_refused(init, value):
    kwargs = {"trust_remote_code": value}

    with pytest.raises(ValueError, match=r"has trust_remote_code=True.*Save the tokenizer to a folder"):
        PromptTuningExtConfig(task_type="CAUSAL_LM", prompt_tuning_init=init, tokenizer_kwargs=kwargs)


def test_trust_remote_code_false_is_accepted():
    kwargs = {"trust_remote_code": False}

    assert PromptTuningExtConfig(task_type="CAUSAL_LM", tokenizer_kwargs=kwargs).tokenizer_kwargs == kwargs


def test_a_config_is_read_back_from_stock_peft_s_file(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config("CLASS_LABELS", labels=["a"]).to_dict()))

    read = PromptTuningExtConfig.from_pretrained(tmp_path)

    assert (read.prompt_tuning_init, read.num_virtual_tokens, read.task_type) == ("CLASS_LABELS", 7, "CAUSAL_LM")


def test_the_plugins_own_fields_come_back_from_the_record(tmp_path):
    built = config("CLASS_LABELS", labels=["bad", "good"], position="last")
    built.prompt_tuning_init_seed = 11
    built.save_pretrained(tmp_path)

    read = PromptTuningExtConfig.from_pretrained(tmp_path)

    stock = {"inference_mode", "peft_version"}  # set by PEFT when it saves
    assert {f.name for f in fields(read) if getattr(read, f.name) != getattr(built, f.name)} <= stock
    assert read.prompt_tuning_init_kwargs == {"labels": ["bad", "good"], "position": "last"}
    assert read.prompt_tuning_init_seed == 11


EVERY_FIELD = {
    "num_virtual_tokens": 11,
    "prompt_tuning_init_seed": 3,
    "shared_prefix": False,
    "shared_prefix_probe": False,
    "train_logits": "supervised",
    "tokenizer_kwargs": {"padding_side": "left"},
    "modules_to_save": ["norm"],
}
INITS = [
    {"prompt_tuning_init": "SAMPLE_VOCAB", "prompt_tuning_init_kwargs": {"population": 20}},
    {"prompt_tuning_init": "CLASS_LABELS", "prompt_tuning_init_kwargs": {"labels": ["a", "b"], "position": "last"}},
    {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "great film"},
    {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "great", "tokenizer_name_or_path": "org/words"},
    {"prompt_tuning_init": "RANDOM_UNIFORM", "prompt_tuning_init_kwargs": {"scale": 0.1}},
]


@pytest.mark.parametrize("init", INITS)
def test_a_config_that_is_saved_alone_comes_back_whole(tmp_path, init):
    built = PromptTuningExtConfig(task_type="SEQ_CLS", **EVERY_FIELD, **init)

    built.save_pretrained(tmp_path)
    read = PromptTuningExtConfig.from_pretrained(tmp_path)

    assert {f.name for f in fields(read) if getattr(read, f.name) != getattr(built, f.name)} <= {"peft_version"}


@pytest.mark.parametrize("init", INITS)
def test_a_config_that_is_saved_alone_is_read_by_stock_peft_without_a_warning(tmp_path, init):
    built = PromptTuningExtConfig(task_type="SEQ_CLS", **EVERY_FIELD, **init)

    built.save_pretrained(tmp_path)
    read = PromptTuningConfig.from_pretrained(tmp_path)  # warnings are errors

    assert set(json.loads((tmp_path / "adapter_config.json").read_text())) == {f.name for f in fields(read)}
    assert (read.num_virtual_tokens, read.task_type) == (11, "SEQ_CLS")


def test_a_config_that_is_read_makes_the_prompt_of_the_one_that_was_saved(build_model, tmp_path):
    built = config("RANDOM_UNIFORM", scale=0.1)
    built.prompt_tuning_init_seed = 5
    built.save_pretrained(tmp_path)

    prompts = [
        get_peft_model(build_model("llama"), each).get_prompt_embedding_to_save("default")
        for each in (PromptTuningExtConfig.from_pretrained(tmp_path), built)
    ]

    assert torch.equal(*prompts)


def test_arguments_that_were_too_large_to_be_saved_are_refused_where_they_are_needed(build_model, tmp_path):
    config("SAMPLE_VOCAB", population=20, corpus=["a great film"] * 1001).save_pretrained(tmp_path)
    read = PromptTuningExtConfig.from_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"corpus \('<list of 1001>'\) is not a text file"):
        get_peft_model(build_model("llama"), read)


def test_the_config_of_a_prompt_of_stock_peft_gets_no_record(tmp_path):
    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5).save_pretrained(tmp_path / "stock")

    PromptTuningExtConfig.from_pretrained(tmp_path / "stock").save_pretrained(tmp_path / "again")

    assert not (tmp_path / "again" / "prompt_init.json").exists()


def test_an_adapter_of_another_method_is_not_read_as_a_prompt(tmp_path):
    LoraConfig(task_type="CAUSAL_LM").save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=rf"'{tmp_path}' is a LORA adapter, not PROMPT_TUNING"):
        PromptTuningExtConfig.from_pretrained(tmp_path)
