"""What a budget of seconds buys: steps of every kind of run, timed in turns."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml

from benchmarks import run
from benchmarks.harness import execute as execution
from benchmarks.harness import pace
from benchmarks.harness.job import prepare
from benchmarks.harness.pace import (
    kind_id,
    kind_of,
    kinds_of,
    measure_pace,
    missing_kinds,
    read_pace,
    step_seconds,
    with_steps,
)
from benchmarks.harness.store import RunStore, StoreError
from benchmarks.harness.suite import load_suite, source_spec, train_arguments


GRID = {
    "seeds": [0, 1],
    "budgets": [{"examples": 8}, {"seconds": 30}],
    "arguments": {"per_device_train_batch_size": 4},
    "tasks": {"movie_reviews": {"source": {"task": "plot_or_review", "num_virtual_tokens": 9}}},
    "runs": [
        {"method": "zero_shot"},
        {"method": "prompt_tuning", "init": ["RANDOM", "CLASS_LABELS", "TRANSFER"], "learning_rate": [0.1, 0.2]},
        {"method": "lora", "quantization": [None, "nf4"]},
    ],
}


ROW = {"error": None, "other_cpu_share": 0.0}


@pytest.fixture
def suite(tmp_path):
    def write(**changes):
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump(GRID | changes))
        return path

    return write


@pytest.fixture
def timed(monkeypatch):
    """Puts given seconds in place of a timing: `timed({"lora": 2.0, ...})`; returns the methods of each that was."""
    asked = []

    def give(seconds):
        def rows(kinds, log, data_dir, time_limit_s):
            asked.append([(kind["task"], kind["method"], kind["quantization"]) for kind in kinds])
            return [{**ROW, "kind": kind, "step_s": seconds[kind["method"]]} for kind in kinds]

        monkeypatch.setattr(pace, "_timed", rows)
        return asked

    return give


def measure(specs, path):
    measure_pace(missing_kinds(specs, path), path, None, 60.0)


def test_init_seed_and_learning_rate_are_timed_once_and_sources_and_budgets_too(suite):
    kinds = kinds_of(load_suite(suite())).values()
    found = [(kind["task"], kind["method"], kind["quantization"] or "", kind["budget"]) for kind in kinds]
    of = [
        ("movie_reviews", "lora", ""),
        ("movie_reviews", "lora", "nf4"),
        ("movie_reviews", "prompt_tuning", ""),
        ("plot_or_review", "prompt_tuning", ""),
    ]
    assert sorted(kind for *kind, budget in found if budget == {"examples": 8}) == list(map(list, of))
    assert sorted(kind for *kind, budget in found if budget == {"seconds": 1, "steps": 36}) == list(map(list, of))
    assert len(found) == 2 * len(of)
    assert kinds_of(load_suite(suite(budgets=[{"examples": 8}]))) == {}


def test_the_steps_that_seconds_buy_are_part_of_the_spec_and_of_its_command(suite):
    specs = load_suite(suite())
    kinds = {name: kind for name, kind in kinds_of(specs).items() if "seconds" in kind["budget"]}
    step_s = {name: {"lora": 7.0, "prompt_tuning": 4.0}[kind["method"]] for name, kind in kinds.items()}
    step_s[kind_id(kind_of(source_spec(next(s for s in specs if s["source"] and "seconds" in s["budget"]))))] = 3.0
    found = with_steps(specs, step_s)
    assert [spec for spec in found if "examples" in spec["budget"]] == [s for s in specs if "examples" in s["budget"]]
    budgets = {(spec["method"], spec["init"]): spec["budget"] for spec in found if "seconds" in spec["budget"]}
    assert budgets == {
        ("lora", None): {"seconds": 30, "steps": 4},
        ("prompt_tuning", "RANDOM"): {"seconds": 30, "steps": 7},
        ("prompt_tuning", "CLASS_LABELS"): {"seconds": 30, "steps": 7},
        ("prompt_tuning", "TRANSFER"): {"seconds": 30, "steps": 7, "source_steps": 10},
    }
    transfer = next(spec for spec in found if "source_steps" in spec["budget"])
    for spec, steps in ((transfer, "7"), (source_spec(transfer), "10")):
        line = train_arguments(spec, None)
        assert line[line.index("--max_steps") + 1] == steps
        assert line[line.index("--max_train_samples") + 1] == str(4 * int(steps))  # whole groups of all lengths
        assert line[line.index("--sample_seed") + 1] == str(spec["seed"])
    assert with_steps(specs, {}) == specs


def test_runs_of_a_kind_that_fails_do_not_train_and_a_rerun_times_it_again(suite, timed, tmp_path):
    specs, path = load_suite(suite(runs=[{"method": "full"}])), tmp_path / "pace.jsonl"
    timed({"full": None})
    measure(specs, path)
    found = with_steps(specs, step_seconds(read_pace(path)))
    assert found == specs
    with pytest.raises(ValueError, match="how many steps the seconds buy is not known"):
        prepare(next(spec for spec in found if "seconds" in spec["budget"]), tmp_path, None)
    assert missing_kinds(specs, path) == []
    timed({"full": 10.0})
    measure_pace(missing_kinds(specs, path, again=True), path, None, 60.0)
    found = with_steps(specs, step_seconds(read_pace(path)))
    assert {spec["budget"].get("steps") for spec in found if "seconds" in spec["budget"]} == {3}
    assert missing_kinds(specs, path, again=True) == []


def test_what_is_timed_later_is_brought_to_the_speed_of_before(suite, timed, tmp_path):
    """The machine is half as fast the second time: LoRA took 2 seconds, and takes 4."""
    path = tmp_path / "pace.jsonl"
    changes = {"tasks": {"movie_reviews": None}, "budgets": [{"seconds": 30}]}
    asked = timed({"lora": 2.0})
    measure(load_suite(suite(runs=[{"method": "lora"}], **changes)), path)
    timed({"lora": 4.0, "full": 10.0})
    grown = load_suite(suite(runs=[{"method": "lora"}, {"method": "full"}], **changes))
    measure(grown, path)
    assert asked[1:] == [[("movie_reviews", "full", None), ("movie_reviews", "lora", None)]]
    found = {row["kind"]["method"]: row["step_s"] for row in read_pace(path).values()}
    assert found == {"lora": 2.0, "full": 5.0}
    measure(grown, path)
    assert len(asked) == 2, "nothing is timed twice"


def test_later_timings_need_the_kind_that_they_are_brought_to(suite, timed, tmp_path):
    path = tmp_path / "pace.jsonl"
    timed({"lora": 2.0})
    measure(load_suite(suite(runs=[{"method": "lora"}])), path)
    before = path.read_text()
    timed({"lora": None, "full": 10.0})
    wanted = "of movie_reviews could not be timed: lora on movie_reviews, beside which they are, failed with None; "
    with pytest.raises(pace.PaceError, match=wanted):
        measure(load_suite(suite(runs=[{"method": "full"}])), path)
    assert path.read_text() == before


def test_a_torn_row_is_timed_again_and_the_first_of_two_counts(suite, timed, tmp_path):
    path = tmp_path / "pace.jsonl"
    timed({"lora": 2.0})
    specs = load_suite(suite(runs=[{"method": "lora"}], budgets=[{"seconds": 30}]))
    measure(specs, path)
    whole = path.read_text()
    path.write_text(whole + whole.replace("2.0", "3.0") + whole[:30])
    assert list(step_seconds(read_pace(path)).values()) == [2.0]
    path.write_text(whole[:30])
    measure(specs, path)
    assert list(step_seconds(read_pace(path)).values()) == [2.0]


@pytest.mark.parametrize("line", ["[1]", '{"kind": {}}'])
def test_a_row_that_is_none_is_said(tmp_path, line):
    path = tmp_path / "pace.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(StoreError, match=r"pace.jsonl, line 1 is not what a step was timed at: .*Delete that line."):
        read_pace(path)


def test_a_grid_times_its_steps_before_its_first_run_and_once(suite, timed, tmp_path, monkeypatch, capsys):
    results, ran = tmp_path / "runs.jsonl", []
    asked = timed({"lora": 7.0})

    def execute(spec, *_, **__):
        ran.append(spec["budget"])
        return {"status": "failed", "error": "made up", "result": None, "env": None}

    monkeypatch.setattr("benchmarks.harness.local.execute", execute)
    path = suite(seeds=[0], runs=[{"method": "lora"}])
    run.main([str(path), "--results", str(results), "--dry_run"])
    assert asked == []
    for _ in range(2):
        run.main([str(path), "--results", str(results)])
    assert ran == [{"examples": 8}, {"seconds": 30, "steps": 4}]
    assert len(asked) == 1 and len(RunStore(results).latest()) == 2
    told = capsys.readouterr().out
    assert "timing 2 kinds of run in turns" in told
    for of in ("8 examples", "36 steps"):
        assert f"movie_reviews lora of {of}: 7.00 s a step" in told


def test_a_cluster_is_not_timed_by_the_machine_that_starts_its_grid(suite, tmp_path):
    arguments = [str(suite()), "--results", str(tmp_path / "runs.jsonl"), "--executor", "ray"]
    with pytest.raises(SystemExit, match=r"a budget of seconds is timed on this machine, .* give budgets of examples"):
        run.main(arguments)


def test_a_timing_that_dies_stops_the_grid_with_its_log(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "WORKER", ["python3", "-c", "raise SystemExit('made up')"])
    monkeypatch.setattr(execution, "WORKER", ["false"])
    with pytest.raises(SystemExit, match=r"steps of movie_reviews could not be timed \(exit status 1\): see .*\.log"):
        run.main([str(suite()), "--results", str(tmp_path / "runs.jsonl")])
    assert (tmp_path / "runs.pace.log").read_text() == "made up\n"
    assert not (tmp_path / "runs.jsonl").exists()


def test_a_timing_that_hangs_is_ended(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "WORKER", ["python3", "-c", "import time; time.sleep(60)"])
    path = suite(seeds=[0], runs=[{"method": "lora"}], budgets=[{"seconds": 30}], time_limit_s=0.5)
    with pytest.raises(SystemExit, match=r"steps of movie_reviews could not be timed \(not done after 0.5 s\): see"):
        run.main([str(path), "--results", str(tmp_path / "runs.jsonl")])


@pytest.mark.parametrize(
    ("of_epoch", "count", "accumulated", "mean_s"),
    [
        (36, 36, 1, 100 - 17.5),
        (36, 18, 2, 2 * (100 - 17.5)),  # each pair twice
        (200, 72, 1, 100 - 35.0),  # every second of those that the run sees, the first of a pair
        (36, 72, 1, 100 - 17.0),  # two epochs: 0, 2, ... 34, twice
    ],
)
def test_what_is_timed_is_spread_over_the_batches_of_the_run(monkeypatch, of_epoch, count, accumulated, mean_s):
    """Grouped by length, the first batches are the longest: here batch i takes 100 - i seconds."""
    clock, model = [0.0], torch.nn.Linear(1, 1)
    monkeypatch.setattr(pace.time, "perf_counter", lambda: clock[0])

    def compute_loss(model, batch):
        clock[0] += 100 - batch
        return model(torch.ones(1)).sum()

    trainer = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(prepare_model=lambda model: model),
        args=SimpleNamespace(
            max_steps=count,
            gradient_accumulation_steps=accumulated,
            gradient_checkpointing=False,
            max_grad_norm=1.0,
        ),
        create_optimizer=lambda: torch.optim.SGD(model.parameters(), lr=0.0),
        get_train_dataloader=lambda: range(of_epoch),
        compute_loss=compute_loss,
        _prepare_inputs=lambda batch: batch,
    )
    steps = pace._steps(SimpleNamespace(trainer=trainer))
    next(steps)  # as `time_steps` does
    times = [next(steps) for _ in range(pace.TIMED_STEPS)]
    assert sum(times) / len(times) == mean_s


@pytest.mark.real
def test_real_steps_are_timed_in_turns_and_change_nothing(saved_model, movie_reviews, tmp_path, monkeypatch):
    order, weights, steps = [], [], pace._steps

    def watched(job):
        weights.append({name: value.clone() for name, value in job.trainer.model.state_dict().items()})
        for seconds in steps(job):
            order.append(job.trainer.model)
            yield seconds

    monkeypatch.setattr(pace, "_steps", watched)
    monkeypatch.setattr(pace, "TIMED_STEPS", 3)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    arguments = {"model_name_or_path": saved_model("llama"), "per_device_train_batch_size": 3, "max_seq_length": 64}
    specs = [
        {
            **{"task": "movie_reviews", "data": None, "method": method, "init": None, "source": None},
            **{"quantization": None, "task_type": None, "budget": {"seconds": 1}, "seed": 0},
            "arguments": {**arguments, "max_train_samples": 40, **extra},
        }
        for method, extra in (("prompt_tuning", {}), ("lora", {"dataloader_num_workers": -1}), ("full", {}))
    ]
    rows = pace.time_steps([kind_of(spec) for spec in specs], None)
    prompt, failed, full = rows
    assert len(prompt["steps_s"]) == len(full["steps_s"]) == 3
    assert prompt["step_s"] == pytest.approx(sum(prompt["steps_s"]) / 3) and prompt["step_s"] > 0
    assert failed["step_s"] is None and "num_workers" in failed["error"]
    assert [model is order[0] for model in order[2:]] == [True, False] * 3
    for model, was in zip(order[:2], (weights[0], weights[2]), strict=True):
        assert all(torch.equal(model.state_dict()[name], before) for name, before in was.items())
    assert prompt["machine"] and prompt["commit"] and prompt["device"] == "cpu"
    assert prompt["threads"] == torch.get_num_threads() and prompt["thread_variables"]["OMP_WAIT_POLICY"] == "passive"
    json.dumps(rows)
