"""Real runs of the harness on tiny models: what is measured is what happened."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.harness import machine, scoring, source
from benchmarks.harness import measure as measuring
from benchmarks.harness.measure import Result, measure
from benchmarks.harness.store import RunStore
from benchmarks.harness.suite import run_id


pytestmark = pytest.mark.real  # the rows of movie_reviews and the unrelated text are a real asset


@pytest.fixture
def spec(saved_model, movie_reviews):
    def build(method="prompt_tuning", init="CLASS_LABELS", architecture="llama", budget=None, **changes):
        return {
            "task": "movie_reviews",
            "data": None,
            "method": method,
            "init": init if method == "prompt_tuning" else None,
            "source": None,
            "quantization": None,
            "task_type": None,
            "budget": budget or {"examples": 12},
            "seed": 3,
            "arguments": {
                "model_name_or_path": saved_model(architecture),
                "per_device_train_batch_size": 3,
                "max_seq_length": 64,
                "max_eval_samples": 17,
                "num_virtual_tokens": 5,
                "learning_rate": 0.1,
            },
        } | changes

    return build


def test_a_run_is_measured_as_it_was(spec, tmp_path):
    result, env = measure(spec(), tmp_path, None)
    assert set(result) == set(Result.__annotations__)
    assert (result["steps"], result["examples_seen"], result["eval_samples"]) == (4, 12, 17)
    assert result["source_rows"] is result["source_rows_left_out"] is None
    assert [point["examples"] for point in result["curve"]] == [0, 3, 6, 9, 12]
    seconds = [point["seconds"] for point in result["curve"]]
    assert seconds == sorted(seconds) and seconds[-1] == result["train_time_s"] > 0
    assert result["curve"][0]["score"] == result["score_before"]
    assert result["curve"][-1]["score"] == result["score"] == result["metrics_all"]["accuracy"]
    assert len(result["correct"]) == 17
    assert result["correct"].count("1") / 17 == pytest.approx(result["score"])
    assert 12 * 5 < result["tokens_seen"] <= 12 * 64
    assert result["trainable_parameters"] == 5 * 24
    adapter = tmp_path / "run" / "adapter_model.safetensors"
    assert result["adapter_bytes"] == adapter.stat().st_size
    assert min(result["inference_time_s"], result["bare_inference_time_s"]) > 0
    assert (env["device"], env["dtype"]) == ("cpu", "float32")
    assert env["versions"]["peft"] and len(env["weights_sha256"]) == 64
    assert env["train_rows_sha256"] != env["scored_rows_sha256"]
    json.dumps([result, env], allow_nan=False)


def test_the_same_run_has_the_same_scores_again(spec, tmp_path):
    first, env = measure(spec(), tmp_path / "a", None)
    second, again = measure(spec(), tmp_path / "b", None)
    for name in ("score", "loss", "correct", "tokens_seen"):
        assert first[name] == second[name], name
    for name in ("scored_rows_sha256", "train_rows_sha256", "weights_sha256"):
        assert env[name] == again[name]
    _, bare = measure(spec("zero_shot", budget={"examples": 0}), tmp_path / "c", None)
    assert bare["scored_rows_sha256"] == env["scored_rows_sha256"] and bare["train_rows_sha256"] is None


def test_a_curve_is_scored_on_some_of_the_rows(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "CURVE_SAMPLES", 5)
    result, _ = measure(spec(), tmp_path, None)
    assert result["curve_samples"] == 5 and len(result["correct"]) == 17
    assert {point["score"] * 5 % 1 for point in result["curve"]} == {0.0}
    assert 9 / 17 <= result["majority"] < 1 and result["majority"] * 17 % 1 == pytest.approx(0.0, abs=1e-9)
    assert result["score"] * 17 % 1 == pytest.approx(0.0, abs=1e-9)


def test_the_harness_trains_what_its_command_trains(spec, tmp_path):
    from benchmarks.harness.suite import train_arguments
    from peft_prompt_ext.cli import train as main

    result, _ = measure(spec(), tmp_path / "a", None)
    scores = main([*train_arguments(spec(), None), "--output_dir", str(tmp_path / "b"), "--save_strategy", "no"])
    assert scores["eval_loss"] == pytest.approx(result["loss"], rel=1e-6)


@pytest.mark.parametrize("method", ["lora", "full", "zero_shot", "linear_probe"])
def test_what_other_methods_store(spec, tmp_path, method):
    changes = {
        "zero_shot": {"budget": {"examples": 0}},
        "linear_probe": {"architecture": "bert", "task_type": "SEQ_CLS"},
    }
    result, _ = measure(spec(method, **changes.get(method, {})), tmp_path, None)
    if method == "zero_shot":
        assert (result["trainable_parameters"], result["adapter_bytes"], result["steps"]) == (0, 0, 0)
        assert result["score"] == result["score_before"] and len(result["curve"]) == 1
    elif method == "linear_probe":
        assert result["adapter_bytes"] == 4 * result["trainable_parameters"]
    else:
        assert result["adapter_bytes"] > 4 * result["trainable_parameters"]


def test_a_transfer_trains_its_source_first(spec, tmp_path):
    measure(spec(init="TRANSFER", source={"task": "plot_or_review", "data": None}), tmp_path, None)
    record = json.loads((tmp_path / "source" / "recipe.json").read_text())
    assert record["task"]["name"] == "plot_or_review"
    assert (tmp_path / "source" / "adapter_model.safetensors").is_file()


def test_a_source_has_the_steps_alone_for_its_time(spec, tmp_path, monkeypatch):
    from peft_prompt_ext.training import run as recipe

    train = recipe.train

    def slow(trainer, *rest):
        train(trainer, *rest)
        time.sleep(2.0)  # saving, say

    monkeypatch.setattr(recipe, "train", slow)
    result, _ = measure(spec(init="TRANSFER", source={"task": "plot_or_review", "data": None}), tmp_path, None)
    assert (result["steps"], result["source_rows"]) == (4, 12)
    assert 0 < result["source_time_s"] < 2.0


@pytest.mark.parametrize("method", ["prompt_tuning", "lora"])
def test_an_adapter_is_scored_over_another_precision_too(spec, tmp_path, method):
    result, _ = measure(spec(method, scored_over="bfloat16"), tmp_path, None)
    assert 0 < result["score_over_other"] <= 1 and result["score_over_other"] * 17 % 1 == pytest.approx(0, abs=1e-6)


def test_what_a_run_ran_on_is_known_before_it_trains(spec, tmp_path, monkeypatch):
    """The commit as it was at the start; and the rest lies in the folder if the run comes to no result."""
    order = []
    monkeypatch.setattr(machine, "code", lambda: order.append("code") or {"commit": "c", "dirty": False})
    monkeypatch.setattr(measuring, "train_source", lambda *_: order.append("source"))

    def crash(job):
        raise RuntimeError("made up")

    monkeypatch.setattr(scoring, "score", crash)
    with pytest.raises(RuntimeError, match="made up"):
        measure(spec(), tmp_path, None)
    assert order == ["code", "source"]
    told = json.loads((tmp_path / machine.FILE).read_text())
    assert told["commit"] == "c" and told["device"] == "cpu" and len(told["weights_sha256"]) == 64


def test_the_weights_of_a_hub_model_are_known_by_their_commit(movie_reviews):
    rows = [{"text": "a", "label": 0}]
    assert machine.environment("nobody/nothing", "abc", "cpu", "float32", rows, None)["weights_sha256"] == "abc"


def test_a_transfer_has_not_seen_what_it_is_scored_on(spec, tmp_path, monkeypatch):
    """Two rows of the source are made of scored reviews, four are not."""
    from peft_prompt_ext.training import run as recipe

    transfer = spec(init="TRANSFER", source={"task": "sst2", "data": "glue/sst2"})
    _, scored = source.rows_to_score(transfer, tmp_path, None)
    assert len(scored) == 17
    whole, part = [row["text"] for row in scored if len(row["text"].split()) > 9][:2]
    new = [f"sentence {name} of the source" for name in "abcd"]
    sentences = [f"- {whole.upper()}", " ".join(part.split()[1:9]), *new]
    folder = tmp_path / "data" / "glue" / "sst2"
    folder.mkdir(parents=True)
    lines = [json.dumps({"sentence": text, "label": n % 2, "idx": n}) + "\n" for n, text in enumerate(sentences)]
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "validation.jsonl").write_text(lines[2])
    counts, train = [], recipe.train
    monkeypatch.setattr(
        recipe, "train", lambda trainer, *rest: (counts.append(len(trainer.train_dataset)), train(trainer, *rest))
    )
    result, _ = measure(transfer, tmp_path, str(tmp_path / "data"))
    # batches of 3, 1, 3 and 1 of the four rows
    assert (result["source_rows"], result["source_rows_left_out"]) == (8, 2)
    assert counts[0] == 4 and len(counts) == 2


def test_a_transfer_whose_source_has_only_scored_rows_is_said(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "without_overlap", lambda *_: [])
    with pytest.raises(ValueError, match=r"every row of plot_or_review shares text .* movie_reviews is scored on"):
        measure(spec(init="TRANSFER", source={"task": "plot_or_review", "data": None}), tmp_path, None)


def test_a_number_that_is_not_finite_is_a_failure_with_a_hint(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "majority", lambda job: math.nan)
    with pytest.raises(ValueError, match=r"majority: not finite.*lower learning_rate"):
        measure(spec("full"), tmp_path, None)


def test_a_run_from_the_command_line_is_an_event_and_its_failure_too(spec, tmp_path):
    import yaml

    suite = {
        "examples": 6,
        "arguments": spec()["arguments"] | {"max_eval_samples": 5},
        "tasks": {"movie_reviews": None},
        "runs": [{"method": "zero_shot"}, {"method": "lora", "dataloader_num_workers": -1}],
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(suite))
    command = [sys.executable, "-m", "benchmarks", "run", str(tmp_path / "grid.yaml")]
    command += ["--results", str(tmp_path / "runs.jsonl")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ran.returncode == 0, ran.stderr
    ok, failed = RunStore(tmp_path / "runs.jsonl").latest().values()
    assert ok["status"] == "ok" and ok["result"]["eval_samples"] == 5
    assert failed["status"] == "failed" and "num_workers" in failed["error"]
    assert (tmp_path / "runs.runs" / run_id(failed["spec"]) / "log.txt").read_text()


def test_the_last_batch_of_an_epoch_counts_its_own_rows(spec, tmp_path):
    changed = spec(budget={"examples": 15})
    changed["arguments"] |= {"max_train_samples": 7, "max_eval_samples": 3}
    result, _ = measure(changed, tmp_path, None)
    assert result["steps"] == 5
    assert result["examples_seen"] == 7 + 3 + 3
