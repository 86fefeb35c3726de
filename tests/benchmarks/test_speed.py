import json
import subprocess
import sys

import pandas as pd
import pytest
import yaml

from benchmarks.harness import step_times
from benchmarks.harness.suite import load_suite
from benchmarks.report.tables import step_table


def row(method, virtual, times, peak):
    return {"method": method, "num_virtual_tokens": virtual, "step_time_s": times, "peak_memory_bytes": peak}


def test_the_table_holds_medians_over_turns_and_ratios_at_the_same_prompt_length():
    rows = [row("stock", 20, [4.0, 9.0], 2**30), row("stock", 20, [5.0], 2**31), row("packed", 20, [2.0], 2**30)]
    rows += [row("packed", 50, [3.0], 2**30), row("lora", 0, [8.0], 2**32), row("suffix_kept", 50, [1.0], 2**30)]
    lines = [line.strip("| ").split(" | ")[1:] for line in step_table(pd.DataFrame(rows)).splitlines()[2:]]
    assert lines == [
        ["20", "5.00 s", "1.00", "0.62", "-", "2.00 GiB", "1.00"],
        ["20", "2.00 s", "0.40", "0.25", "-", "1.00 GiB", "0.50"],
        ["50", "3.00 s", "-", "0.38", "-", "1.00 GiB", "-"],
        ["50", "1.00 s", "-", "0.12", "-", "1.00 GiB", "-"],
        ["", "8.00 s", "-", "1.00", "-", "4.00 GiB", "-"],
    ]


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


@pytest.mark.real
def test_mixed_tasks_are_an_option(saved_model, movie_reviews, tmp_path, pytestconfig):
    command = [sys.executable, "-m", "benchmarks", "speed", "--model_name_or_path", saved_model("llama")]
    command += ["--mixed_tasks", "3", "--num_virtual_tokens", "2", "--steps", "2", "--turns", "1"]
    command += ["--output", str(tmp_path / "mixed.jsonl")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=pytestconfig.rootpath)
    assert ran.returncode == 0 and "| 3 | 1 | short | 2 | last | PEFT's path | float32 |" in ran.stdout, ran.stderr
    (line,) = map(json.loads, (tmp_path / "mixed.jsonl").read_text().splitlines())
    assert len(line["mixed_time_s"]) == len(line["single_time_s"]) == 2 and line["largest_difference"] < 1e-4


@pytest.mark.real
def test_tasks_over_one_text_are_an_option(saved_model, movie_reviews, tmp_path, pytestconfig):
    command = [sys.executable, "-m", "benchmarks", "speed", "--model_name_or_path", saved_model("llama")]
    command += ["--one_text_tasks", "1", "3", "--text", "16", "--steps", "2", "--turns", "1"]
    command += ["--output", str(tmp_path / "one_text.jsonl")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=pytestconfig.rootpath)
    assert ran.returncode == 0 and "| 3 | 16 | 12 | float32 |" in ran.stdout, ran.stdout + ran.stderr
    lines = [json.loads(line) for line in (tmp_path / "one_text.jsonl").read_text().splitlines()]
    assert [line["tasks"] for line in lines] == [1, 3]
    for line in lines:
        for way in ("suffix", "prefix", "lora"):
            assert len(line[f"{way}_time_s"]) == 2 and line["largest_differences"][way] < 1e-4


@pytest.mark.real
def test_a_step_of_every_kind_of_run_is_timed_interleaved_and_a_failure_is_a_row(saved_model, movie_reviews, tmp_path):
    source = {"task": "plot_or_review", "num_virtual_tokens": 9}
    lora = {"method": "lora", "learning_rate": [0.1, 0.2], "lr_scheduler_type": ["linear", "none"]}
    suite = {
        "seeds": [0, 1],
        "examples": 8,
        "arguments": {"per_device_train_batch_size": 4, "model_name_or_path": saved_model("llama")},
        "tasks": {"movie_reviews": {"source": source, "max_seq_length": 32, "max_eval_samples": 3}},
        "runs": [{"method": "prompt_tuning", "init": ["RANDOM", "TRANSFER"]}, {"method": "zero_shot"}, lora],
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(suite))
    rows = list(step_times.time_suite(load_suite(tmp_path / "grid.yaml"), None))
    kinds = [(row["kind"]["task"], row["kind"]["method"], row["error"] is None) for row in rows]
    reviews = [("prompt_tuning", True), ("lora", True), ("lora", False)]  # no init, seed or learning rate makes a kind
    assert kinds == [*(("movie_reviews", *kind) for kind in reviews), ("plot_or_review", "prompt_tuning", True)]
    for row in rows:
        assert len(row["steps_s"]) == (0 if row["error"] else step_times.TIMED_STEPS)
        assert row["error"] or row["step_s"] == pytest.approx(sum(row["steps_s"]) / step_times.TIMED_STEPS)
    transfer = next(spec for spec in load_suite(tmp_path / "grid.yaml") if spec["source"])
    assert json.loads(step_times.key_of(transfer)) == rows[0]["kind"]
