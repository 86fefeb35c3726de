"""An exported folder answers as PEFT does, in a process in which neither PEFT nor this package can be imported."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_prompt_ext.export import export
from tests.export.conftest import CHAT, TASK
from tests.helpers import one_thread  # noqa: F401


TEXTS = ["a great film", "terrible acting and a worse script", "x", "the plot is not great"]
CASES = {  # architecture, tied head, tokenizer with BOS
    "llama-tied": ("llama", True, False),
    "llama-bos": ("llama", False, True),
    "gpt2-tied": ("gpt2", True, False),
    "gpt2-bos": ("gpt2", True, True),
    "gemma3-tied": ("gemma3_text", True, True),
    "gemma3-untied": ("gemma3_text", False, False),
    "phi": ("phi", False, False),
}
SIZES = {"mood": 5, "topic": 17, "after": 3}

ALONE = textwrap.dedent("""
    import importlib.util, json, sys
    HIDDEN = ("peft", "peft_prompt_ext", "peft_prompt_ext_cli")

    class Hiding:
        def __init__(self, finder):
            self.finder = finder

        def __getattr__(self, name):
            return getattr(self.finder, name)

        def find_spec(self, name, path=None, target=None):
            return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

    sys.meta_path = [Hiding(finder) for finder in sys.meta_path]
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    found = {}
    for folder in sys.argv[3:]:
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        for name, prompt in json.load(open(folder + "/prompts.json"))["prompts"].items():
            for text in json.loads(sys.argv[2]):
                inputs = tokenizer(prompt["in_front"] + text + prompt["behind"], return_tensors="pt")
                with torch.no_grad():
                    logits = model(**inputs).logits[0, -1]
                tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=2)
                found[folder, name, text] = logits, tokens[0, inputs["input_ids"].shape[1]:]
    assert all(importlib.util.find_spec(name) is None for name in HIDDEN) and not set(HIDDEN) & set(sys.modules)
    torch.save(found, sys.argv[1])
""")


@pytest.fixture(scope="module")
def exported(save_base, save_prompt, tmp_path_factory):
    """For each case the base model, its adapters by name, the exported folder and its report."""
    cases = {}
    for case, (architecture, tied, bos) in CASES.items():
        base = save_base(architecture, tied=tied, bos=bos)
        adapters = {
            "mood": save_prompt(base, "mood", SIZES["mood"], task=TASK),
            "topic": save_prompt(base, "topic", SIZES["topic"]),
            "after": save_prompt(base, "after", SIZES["after"], position="suffix"),
        }
        folder = str(tmp_path_factory.mktemp("exported") / case)
        cases[case] = base, adapters, folder, export(list(adapters.values()), folder)
    return cases


@pytest.fixture(scope="module")
def alone(exported, tmp_path_factory):
    """Logits [V] behind a text and greedy tokens, from a process that knows plain transformers alone."""
    file = tmp_path_factory.mktemp("alone") / "found.pt"
    folders = [folder for _, _, folder, _ in exported.values()]
    command = [sys.executable, "-c", ALONE, str(file), json.dumps(TEXTS), *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=file.parent)
    assert done.returncode == 0, done.stderr
    return torch.load(file)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SIZES)
def test_the_folder_answers_as_peft_does_where_neither_is_installed(exported, alone, case, name):
    base, adapters, folder, _ = exported[case]
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[name]).eval()
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=2)

        found, found_tokens = alone[folder, name, text]

        assert len(logits) == 331
        torch.testing.assert_close(found[:310], logits[:310], rtol=0, atol=1e-4)
        assert found_tokens.tolist() == tokens[0, -len(found_tokens) :].tolist()


@pytest.mark.parametrize("case", CASES)
def test_new_tokens_are_never_near_an_answer(exported, alone, case):
    _, _, folder, report = exported[case]
    prompts = json.loads(Path(folder, "prompts.json").read_text())["prompts"].values()
    new = torch.tensor([token for prompt in prompts for token in prompt["token_ids"]])

    for (where, _, _), (logits, _) in alone.items():
        if where == folder:
            others = logits.clone()
            others[new] = float("inf")
            assert logits[new].max() <= others.min() - 10
    assert report["new_tokens_below_all_others_by"] >= 10


@pytest.mark.parametrize("case", ["llama-bos", "gpt2-bos"])
def test_none_of_10000_sampled_tokens_is_a_new_one(exported, case):
    _, _, folder, _ = exported[case]
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.suppress_tokens = None  # so that the logits alone decide
    prompt = json.loads(Path(folder, "prompts.json").read_text())["prompts"]["topic"]
    inputs = torch.tensor([prompt["token_ids"]] * 100)
    options = {"max_new_tokens": 100, "min_new_tokens": 100, "top_k": 0, "top_p": 1.0, "temperature": 1.5}

    torch.manual_seed(0)
    tokens = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=True, pad_token_id=2, **options)

    sampled = tokens[:, inputs.shape[1] :]
    new = {token for entry in _prompts(folder).values() for token in entry["token_ids"]}
    assert sampled.numel() == 10_000 and len(sampled.unique()) > 200
    assert not new & set(sampled.flatten().tolist())


def _prompts(folder):
    return json.loads(Path(folder, "prompts.json").read_text())["prompts"]


@pytest.mark.parametrize("case", CASES)
def test_reserved_rows_are_used_before_the_table_grows(exported, case):
    base, _, folder, report = exported[case]
    first = len(AutoTokenizer.from_pretrained(base))
    ids = [token for prompt in _prompts(folder).values() for token in prompt["token_ids"]]

    assert ids == list(range(first, first + sum(SIZES.values())))
    assert report["rows_before"] == 331 and report["rows"] == max(331, ids[-1] + 1)
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == report["rows"]


def test_the_prompt_stands_in_front_of_bos_and_a_suffix_behind_the_text(exported):
    _, _, folder, report = exported["llama-bos"]
    prompts, tokenizer = _prompts(folder), AutoTokenizer.from_pretrained(folder)
    text = tokenizer("a great film")["input_ids"]
    found = {n: tokenizer(p["in_front"] + "a great film" + p["behind"])["input_ids"] for n, p in prompts.items()}

    assert text[0] != 0 and report["added_by_the_tokenizer_before"] == {"in_front": "<s>", "behind": ""}
    assert found["mood"] == [*prompts["mood"]["token_ids"], 0, *text]
    assert found["after"] == [0, *text, *prompts["after"]["token_ids"]]


def test_what_a_client_sends_is_written_down(exported):
    _, _, folder, _ = exported["llama-tied"]
    mood, page = _prompts(folder)["mood"], Path(folder, "README.md").read_text()

    assert mood["template"] == "Review: {text}\nMood:" and mood["label_words"] == [" good", " bad"]
    assert mood["marker"] == mood["in_front"] == "".join(f"<|prompt:mood:{i}|>" for i in range(5))
    assert "`mood` | prefix | 5" in page and "`after` | suffix | 3" in page
    compile(page.split("```python\n")[1].split("```")[0], "README.md", "exec")


def test_the_report_has_the_figures_of_the_proof(exported):
    _, _, folder, report = exported["gemma3-tied"]

    assert json.loads(Path(folder, "export.json").read_text()) == report
    assert report["tolerance"] == 1e-4 and report["head_was_tied"] is True
    for name, proof in report["prompts"].items():
        assert proof["texts"] == 16 and proof["label_words"] == (2 if name == "mood" else 0)
        assert proof["largest_difference_of_log_probabilities"] <= 1e-4


@pytest.mark.parametrize("position", ["prefix", "suffix"])
def test_the_chat_template_puts_a_prompt_around_the_chat_by_its_name(save_base, save_prompt, tmp_path, position):
    base = save_base("gpt2", chat=CHAT)
    export([f"mine={save_prompt(base, 'a', position=position)}"], tmp_path / "out")
    messages = [{"role": "user", "content": "a great film"}]
    before = AutoTokenizer.from_pretrained(base).apply_chat_template(messages, tokenize=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    marker = _prompts(tmp_path / "out")["mine"]["marker"]

    found = tokenizer.apply_chat_template(messages, tokenize=False, soft_prompt="mine")

    assert found == (marker + before if position == "prefix" else before + marker)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == before
    with pytest.raises(Exception, match="soft_prompt is one of: mine"):
        tokenizer.apply_chat_template(messages, tokenize=False, soft_prompt="yours")


def test_a_checkpoint_in_16_bits_rounds_the_vectors_and_answers_as_peft_over_16_bits(save_base, save_prompt, tmp_path):
    base = save_base("llama", dtype=torch.bfloat16)

    report = export([save_prompt(base, "mood", task=TASK)], tmp_path / "out")

    assert report["dtype"] == "bfloat16" and 0 < report["rounding_of_vectors"]["mood"] < 2**-8
    assert report["prompts"]["mood"]["largest_difference_of_log_probabilities"] <= report["tolerance"]


def test_texts_of_a_file_are_those_that_are_tried(save_base, save_prompt, tmp_path):
    base = save_base("llama")
    (tmp_path / "texts.txt").write_text('a great film\n\n{"text": "the plot"}\n')

    report = export([save_prompt(base, "mood", task=TASK)], tmp_path / "out", texts=tmp_path / "texts.txt")

    assert report["prompts"]["mood"]["texts"] == 2


def test_a_base_model_whose_generation_config_could_not_be_saved_again(save_base, save_prompt, tmp_path):
    base = save_base("llama")
    Path(base, "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6}))

    export([save_prompt(base, "mood")], tmp_path / "out")

    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert "temperature" not in saved and len(saved["suppress_tokens"]) == 5


def test_the_dtype_of_the_run_is_that_of_the_checkpoint(save_base, save_prompt, tmp_path):
    base = save_base("llama", dtype=torch.bfloat16)

    report = export([save_prompt(base, "mood", task=TASK, dtype="float32")], tmp_path / "out")

    assert report["dtype"] == "float32" and report["tolerance"] == 1e-4
