"""What cannot be exported is one clear error, before weights are read if the files can tell, and leaves no folder."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import Metaspace
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_prompt_ext import PromptTuningExtConfig, cli
from peft_prompt_ext.export import checkpoint, export
from peft_prompt_ext.export.proof import ask, find_margin
from peft_prompt_ext.tasks import get_task
from tests.export.conftest import TASK
from tests.helpers import one_thread  # noqa: F401


@pytest.fixture
def no_weights(monkeypatch):
    """Loading a model's weights is a failure."""

    def load(*args, **kwargs):
        raise AssertionError("weights were read before the error")

    monkeypatch.setattr("peft_prompt_ext.quantization.load_frozen_backbone", load)


@pytest.fixture(scope="module")
def base(save_base):
    return save_base("llama")


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_prompt(folder, change):
    path = Path(folder, "adapter_model.safetensors")
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def assert_refused(adapters, out, match, **options):
    with pytest.raises(ValueError, match=match):
        export(adapters, out, **options)
    assert not list(out.parent.glob(f"{out.name}*"))


def test_an_adapter_that_is_no_prompt(no_weights, base, tmp_path):
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", r=2))
    lora.save_pretrained(tmp_path / "lora")

    assert_refused([str(tmp_path / "lora")], tmp_path / "out", "is a LORA adapter, and only prompt tuning")
    assert_refused([str(tmp_path)], tmp_path / "out", r"holds no adapter_config\.json: give the folder")
    assert_refused([str(tmp_path / "none")], tmp_path / "out", "none is no folder, and the Hub has no such adapter")
    assert_refused([], tmp_path / "out", "at least one adapter")


def test_a_prompt_that_answers_by_a_head_of_classes(no_weights, build_model, tmp_path):
    config = PromptTuningExtConfig(task_type="SEQ_CLS", num_virtual_tokens=3, prompt_tuning_init="RANDOM")
    get_peft_model(build_model("llama", "SEQ_CLS"), config).save_pretrained(tmp_path / "classes")

    assert_refused([str(tmp_path / "classes")], tmp_path / "out", "was trained for SEQ_CLS")


def test_two_base_models(no_weights, base, save_base, save_prompt, tmp_path):
    adapters = [save_prompt(base, "mood"), save_prompt(save_base("gpt2"), "topic")]

    assert_refused(adapters, tmp_path / "out", "One checkpoint has one base model")


def test_two_prompts_of_one_name(no_weights, base, save_prompt, tmp_path):
    adapters = [save_prompt(base, "one", task=TASK), save_prompt(base, "two", task=TASK)]

    assert_refused(adapters, tmp_path / "out", r"are both called 'mood'.*mood-2=")


def test_a_name_that_cannot_name_tokens(no_weights, base, save_prompt, tmp_path):
    assert_refused([f"a b={save_prompt(base, 'mood')}"], tmp_path / "out", "letters, digits")


def test_a_marker_that_is_a_token_already(no_weights, save_base, save_prompt, tmp_path):
    base = save_base("llama")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken("<|prompt:mood:4|>", special=True)])
    tokenizer.save_pretrained(base)

    assert_refused(
        [save_prompt(base, "mood")], tmp_path / "out", r"'<\|prompt:mood:4\|>' of the prompt 'mood' is a token"
    )


def test_a_folder_that_exists(no_weights, base, save_prompt, tmp_path):
    adapter = save_prompt(base, "mood")

    with pytest.raises(ValueError, match="exists already: choose another --output_dir"):
        export([adapter], tmp_path)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_prompt_with_values_that_are_no_numbers(no_weights, base, save_prompt, tmp_path, wrong):
    adapter = save_prompt(base, "mood")

    def spoil(tensors):
        tensors["prompt_embeddings"][3, 7] = wrong
        return tensors

    change_prompt(adapter, spoil)

    assert_refused([adapter], tmp_path / "out", r"NaN or infinite values in the virtual tokens \[3\]")


def test_a_prompt_of_another_size_or_with_other_tensors(no_weights, base, save_prompt, tmp_path):
    short, wide, more = (save_prompt(base, name) for name in ("short", "wide", "more"))
    change_prompt(short, lambda tensors: {name: tensor[1:].clone() for name, tensor in tensors.items()})
    change_prompt(wide, lambda tensors: {name: torch.cat([tensor, tensor], 1) for name, tensor in tensors.items()})
    change_prompt(more, lambda tensors: {**tensors, "lm_head.weight": torch.zeros(3)})

    assert_refused([short], tmp_path / "out", r"shape \[4, 24\]; wanted 5 of them")
    assert_refused([wide], tmp_path / "out", "vectors of 48 values, and .* has embeddings of 24")
    assert_refused(
        [more], tmp_path / "out", r"holds lm_head\.weight, prompt_embeddings; wanted prompt_embeddings alone"
    )


def test_a_base_model_without_its_full_weights(no_weights, save_base, save_prompt, tmp_path):
    base = save_base("llama")
    adapters = save_prompt(base, "mood"), save_prompt(base, "topic", task=TASK, quantization="nf4")
    change_json(Path(base, "config.json"), quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})

    assert_refused([adapters[0]], tmp_path / "out", "is a quantised checkpoint")
    assert_refused([adapters[1]], tmp_path / "out", "was trained over nf4 weights.*--base_model")


def test_a_head_that_cannot_be_untied(no_weights, base, save_prompt, tmp_path, monkeypatch):
    adapter = save_prompt(base, "mood")
    monkeypatch.setattr(
        "transformers.LlamaForCausalLM.get_output_embeddings", lambda self: self.get_input_embeddings()
    )

    assert_refused([adapter], tmp_path / "out", "llama has no head that can be untied")


def test_an_unknown_format(no_weights, base, save_prompt, tmp_path, monkeypatch):
    monkeypatch.delenv("PEFT_PROMPT_EXT_DEBUG", raising=False)
    argv = ["export", save_prompt(base, "mood"), "--format", "gguf", "--output_dir", str(tmp_path / "out")]

    with pytest.raises(SystemExit, match=r"error: format \('gguf'\) must be one of 'checkpoint'"):
        cli.main(argv)


def test_texts_that_cannot_be_tried(no_weights, base, save_prompt, tmp_path):
    adapter, texts = save_prompt(base, "mood", task=TASK), tmp_path / "texts.txt"

    for text, match in (
        ("\n", "has no texts"),
        ('{"words": "a"}', "has the columns text; .* lacks 'text'"),
        ("a film " * 500, "the model has 499 positions"),
    ):
        texts.write_text(text)
        assert_refused([adapter], tmp_path / "out", match, texts=texts)


def test_a_model_whose_final_states_lie_on_both_sides(save_base, save_prompt, tmp_path):
    base = save_base("llama", one_sided=False)

    assert_refused([save_prompt(base, "mood")], tmp_path / "out", r"could be answered: .*smallest projection -?\d")


def test_a_model_that_caps_its_logits(save_base, save_prompt, tmp_path):
    base = save_base("gemma2")

    assert_refused([save_prompt(base, "mood")], tmp_path / "out", "below the lowest other one at some position")


def test_reserved_rows_that_the_base_model_would_answer(save_base, save_prompt, tmp_path):
    base = save_base("llama", tied=False)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight[-20:] = 0
    model.save_pretrained(base)

    assert_refused(
        [save_prompt(base, "mood", task=TASK)], tmp_path / "out", r"differs from PEFT by 0\.\d+ in a log-prob"
    )


def test_a_tokenizer_that_treats_a_text_behind_a_marker_differently(save_base, save_prompt, tmp_path):
    base = save_base("llama")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.backend_tokenizer.pre_tokenizer = Metaspace(replacement="Ġ", prepend_scheme="first", split=False)
    tokenizer.save_pretrained(base)

    assert_refused([save_prompt(base, "mood")], tmp_path / "out", "With the marker of 'mood' the tokenizer makes")


@pytest.mark.parametrize(
    ("factor", "match"), [(1.01, r"differs from PEFT by \d"), (-9, "answers otherwise than PEFT")]
)
def test_rows_that_are_not_the_prompt(base, save_prompt, tmp_path, monkeypatch, factor, match):
    write = checkpoint.write_vectors
    monkeypatch.setattr(checkpoint, "write_vectors", lambda model, ids, x: write(model, ids, factor * x))

    assert_refused([save_prompt(base, "mood", task=TASK)], tmp_path / "out", match)


def test_choices_that_differ_by_row(no_weights, base, save_prompt, tmp_path):
    assert_refused(
        [save_prompt(base, "copa", task=get_task("copa"))], tmp_path / "out", "answers to choose from differ by row"
    )


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows(no_weights, save_base, save_prompt, tmp_path):
    base = save_base("llama")
    adapter = save_prompt(base, "mood")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<new{number}>" for number in range(100)])
    tokenizer.save_pretrained(base)

    assert_refused([adapter], tmp_path / "out", r"has \d+ tokens, and its embedding \d+ rows")


def test_prompts_of_runs_in_several_dtypes(no_weights, base, save_prompt, tmp_path):
    adapters = [save_prompt(base, "mood", task=TASK, dtype=dtype) for dtype in ("float32", "bfloat16")]
    adapters[1] = f"other={adapters[1]}"

    assert_refused(adapters, tmp_path / "out", "trained in bfloat16 and float32: choose one, --dtype")


def test_an_adapter_file_that_is_torn_and_a_line_that_is_no_object(no_weights, base, save_prompt, tmp_path):
    adapter = save_prompt(base, "mood", task=TASK)
    (tmp_path / "texts.txt").write_text('{"text": "a film\n')
    assert_refused([adapter], tmp_path / "out", "begins as a JSON object", texts=tmp_path / "texts.txt")

    path = Path(adapter, "adapter_model.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    assert_refused([adapter], tmp_path / "out", "is no whole safetensors file")


def test_scores_that_are_not_numbers(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")

    with pytest.raises(ValueError, match="NaN or infinite scores"):
        ask(model, [[5, 6, 7]], None)
    with pytest.raises(ValueError, match="its logit is nan below"):
        find_margin(model, [torch.tensor([[5, 6, 7]])], [300])
