import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model

from peft_prompt_ext import prompt_record
from tests.helpers import prompt_of, prompted


@pytest.fixture
def labelled(build_model, tokenizer_folder):
    """Builds a tiny model with a CLASS_LABELS prompt."""

    def build(**kwargs):
        return prompted(
            build_model("llama"),
            "CAUSAL_LM",
            tokenizer_name_or_path=tokenizer_folder,
            prompt_tuning_init="CLASS_LABELS",
            prompt_tuning_init_seed=11,
            prompt_tuning_init_kwargs={"labels": ["great", "terrible"], **kwargs},
        )

    return build


def read_json(path):
    return json.loads(Path(path).read_text())


def test_the_record_describes_the_initialisation(labelled, tokenizer, tmp_path):
    labelled().save_pretrained(tmp_path)

    record = read_json(tmp_path / "prompt_init.json")
    assert record["prompt_tuning_init"] == "CLASS_LABELS"
    assert record["prompt_tuning_init_seed"] == 11
    assert record["prompt_tuning_init_kwargs"] == {"labels": ["great", "terrible"]}
    assert record["slots"][1] == {"label": "terrible", "token_ids": tokenizer("terrible")["input_ids"]}
    assert len(record["slots"]) == 5 and record["slots"][4]["text"] == tokenizer.decode(
        record["slots"][4]["token_ids"]
    )


def test_the_adapter_config_holds_only_what_stock_peft_knows(labelled, tmp_path):
    labelled().save_pretrained(tmp_path)

    assert set(read_json(tmp_path / "adapter_config.json")) == {f.name for f in fields(PromptTuningConfig)}


def test_a_named_adapter_has_its_record_in_its_folder(labelled, tmp_path):
    model = labelled()
    second = labelled().peft_config["default"]
    model.add_adapter("second", second)

    model.save_pretrained(tmp_path, selected_adapters=["second"])

    assert (tmp_path / "second" / "prompt_init.json").is_file() and not (tmp_path / "prompt_init.json").exists()


def test_every_adapter_has_its_own_record(labelled, tmp_path):
    model = labelled()
    model.add_adapter("second", labelled(position="last").peft_config["default"])

    model.save_pretrained(tmp_path)

    first, second = (read_json(tmp_path / name / "prompt_init.json")["slots"] for name in ("", "second"))
    assert [slot.get("label") for slot in first] == ["great", "terrible", None, None, None]
    assert [slot.get("label") for slot in second] == [None, None, None, "great", "terrible"]


def test_the_file_is_readable_text(labelled, tmp_path):
    labelled(labels=["groß", "klein"]).save_pretrained(tmp_path)

    lines = (tmp_path / "prompt_init.json").read_text(encoding="utf-8").splitlines()
    assert '      "groß",' in lines


def test_only_the_main_process_writes(labelled, tmp_path):
    labelled().save_pretrained(tmp_path, is_main_process=False)

    assert not (tmp_path / "prompt_init.json").exists()


def test_the_record_survives_loading_and_saving_again(labelled, build_model, tmp_path):
    labelled().save_pretrained(tmp_path / "first")

    loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")

    assert read_json(tmp_path / "second" / "prompt_init.json") == read_json(tmp_path / "first" / "prompt_init.json")


def test_large_and_unprintable_arguments_are_described(labelled, tmp_path):
    corpus = (text for text in ["a great film with a fine cast"] * 3)
    model = labelled(fallback_kwargs={"population": 7, "corpus": corpus})
    config = model.peft_config["default"]
    config.prompt_tuning_init_kwargs["texts"] = ["word"] * 1001

    model.save_pretrained(tmp_path)

    kwargs = read_json(tmp_path / "prompt_init.json")["prompt_tuning_init_kwargs"]
    assert kwargs["fallback_kwargs"]["corpus"] == "<generator>" and kwargs["texts"] == "<list of 1001>"


@pytest.mark.parametrize(("size", "written"), [(1000, ["word"] * 1000), (1001, "<list of 1001>")])
def test_a_list_is_written_whole_up_to_a_thousand(labelled, tmp_path, size, written):
    config = labelled().peft_config["default"]
    config.prompt_tuning_init_kwargs = {"corpus": ["word"] * size}

    prompt_record.write(tmp_path, config)

    assert read_json(tmp_path / "prompt_init.json")["prompt_tuning_init_kwargs"] == {"corpus": written}


def test_a_path_is_written_as_text(labelled, tmp_path):
    config = labelled().peft_config["default"]
    config.prompt_tuning_init_kwargs = {"source": Path("runs/one")}

    prompt_record.write(tmp_path, config)

    assert read_json(tmp_path / "prompt_init.json")["prompt_tuning_init_kwargs"] == {"source": "runs/one"}


def test_a_failed_write_keeps_the_old_record(labelled, tmp_path, monkeypatch):
    model = labelled()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "prompt_init.json").read_text()
    model.peft_config["default"].prompt_tuning_init_seed = 12

    def full(self, target):
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)

    assert (tmp_path / "prompt_init.json").read_text() == before


def test_an_adapter_of_stock_peft_has_no_record(tmp_path):
    assert prompt_record.read(str(tmp_path)) is None


def test_the_record_is_read_from_a_subfolder(labelled, tmp_path):
    labelled().save_pretrained(tmp_path / "last")

    record = prompt_record.read(str(tmp_path), subfolder="last")

    assert prompt_record.read(str(tmp_path)) is None
    assert record == read_json(tmp_path / "last" / "prompt_init.json")


@pytest.mark.parametrize("content", ['{"prompt_tuning_in', "", '["a list"]'])
def test_a_broken_record_does_not_lose_the_trained_prompt(labelled, build_model, tmp_path, content):
    model = labelled()
    model.save_pretrained(tmp_path)
    (tmp_path / "prompt_init.json").write_text(content)

    with pytest.warns(UserWarning, match=r"prompt_init\.json"):
        loaded = PeftModel.from_pretrained(build_model("llama"), tmp_path)

    assert torch.equal(prompt_of(loaded), prompt_of(model))


def test_no_record_is_made_up_for_a_prompt_of_stock_peft(labelled, build_model, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    get_peft_model(build_model("llama"), config).save_pretrained(tmp_path / "stock")
    model = labelled()
    model.load_adapter(tmp_path / "stock", "theirs")

    model.save_pretrained(tmp_path)

    assert not (tmp_path / "theirs" / "prompt_init.json").exists() and (tmp_path / "prompt_init.json").is_file()
