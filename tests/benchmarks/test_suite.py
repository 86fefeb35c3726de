import json
from pathlib import Path

import pytest
import yaml

from benchmarks.harness.suite import SuiteError, load_suite, load_suites, run_id, source_spec, train_arguments


SUITES = sorted(Path(__file__).parents[2].glob("benchmarks/suites/*.yaml"))
SMALL = {
    "seeds": [0, 1],
    "examples": [16, 32],
    "arguments": {"per_device_train_batch_size": 4, "model_name_or_path": "some-model"},
    "tasks": {"movie_reviews": None, "sst2": {"data": "glue/sst2", "source": {"task": "movie_reviews"}}},
    "runs": [
        {"method": "zero_shot"},
        {"method": "prompt_tuning", "init": ["RANDOM", "CLASS_LABELS"], "quantization": [None, "nf4"]},
        {"method": "full", "examples": 8, "learning_rate": 0.001},
    ],
}


@pytest.fixture
def write(tmp_path):
    def write(suite, name="small"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(suite if isinstance(suite, str) else yaml.safe_dump(suite))
        return path

    return write


def changed(**changes):
    return {**SMALL, **changes}


def transfer(**flags):
    source = {"task": "movie_reviews", **flags}
    return changed(runs=[{"method": "prompt_tuning", "init": "TRANSFER"}], tasks={"sst2": {"source": source}})


def test_a_flag_that_is_null_is_not_given(write):
    null, given = load_suite(write(changed(runs=[{"method": "lora", "learning_rate": [None, 0.1]}])))[:2]
    assert [("--learning_rate" in train_arguments(spec, None)) for spec in (null, given)] == [False, True]
    assert "None" not in train_arguments(null, None)


def test_the_grid_is_the_product_with_seeds_changing_slowest(write):
    specs = load_suite(write(SMALL))
    # each task: zero-shot once in all; 4 prompts at 2 numbers of examples and full at one for each seed
    assert len(specs) == 2 * (1 + 2 * (4 * 2 + 1))
    assert [spec["seed"] for spec in specs] == [0] * 20 + [1] * 18
    assert len({run_id(spec) for spec in specs}) == len(specs)
    assert {json.dumps(spec["budget"]) for spec in specs if spec["method"] == "full"} == {'{"examples": 8}'}


def test_a_runs_id_depends_on_everything_that_decides_its_result(write):
    spec = load_suite(write(SMALL))[1]
    again = json.loads(json.dumps(dict(reversed(spec.items()))))
    assert run_id(spec) == run_id(again)
    for name in spec:
        assert run_id({**spec, name: "another"}) != run_id(spec)


def test_the_command_of_a_run_trains_on_its_examples(write):
    path = write(changed(arguments={**SMALL["arguments"], "gradient_accumulation_steps": 2}))
    spec = next(s for s in load_suite(path) if s["task"] == "sst2" and s["quantization"] and s["init"] == "RANDOM")
    line = train_arguments(spec, "rows")
    expected = {"task_name": "sst2", "method": "prompt_tuning", "seed": "0", "data_dir": "rows/glue/sst2"}
    expected |= {"prompt_tuning_init": "RANDOM", "quantization": "nf4", "max_steps": "2"}
    expected |= {"per_device_train_batch_size": "4", "model_name_or_path": "some-model"}
    expected |= {"gradient_accumulation_steps": "2"}
    assert dict(zip(line[::2], line[1::2], strict=True)) == {f"--{name}": value for name, value in expected.items()}


def test_a_score_over_another_precision_is_another_run_and_no_flag(write):
    runs = [{"method": "lora"}, {"method": "lora", "scored_over": "nf4"}]
    alone, moved = load_suite(write(changed(runs=runs, examples=16, seeds=[0])))[:2]
    assert run_id(alone) != run_id(moved) and "scored_over" not in alone
    assert train_arguments(alone, "rows") == train_arguments(moved, "rows")


def test_a_transfer_names_the_run_of_its_source(write):
    suite = changed(runs=[{"method": "prompt_tuning", "init": "TRANSFER"}], tasks={"sst2": SMALL["tasks"]["sst2"]})
    spec = load_suite(write(suite))[0]
    source = source_spec(spec)
    assert (source["task"], source["data"], source["init"], source["source"]) == ("movie_reviews", None, None, None)
    assert (source["budget"], source["seed"]) == (spec["budget"], spec["seed"])
    assert source_spec(source) is None


@pytest.mark.parametrize(
    ("suite", "said"),
    [
        (changed(run=[]), "key of a suite.*'run'.*did you mean 'runs'"),
        (changed(tasks={"sst3": None}), "task.*'sst3'.*did you mean 'sst2'"),
        (changed(runs=[{"method": "lorra"}]), "method.*'lorra'.*did you mean 'lora'"),
        (changed(runs=[{"method": "lora", "learning_rates": 1}]), "'learning_rates'.*did you mean 'learning_rate'"),
        (changed(runs=[{"method": "lora", "max_steps": 3}]), "max_steps"),
        (changed(runs=[{"method": "prompt_tuning", "init": "CLASSLABELS"}]), "did you mean 'CLASS_LABELS'"),
        (changed(runs=[{"method": "lora", "quantization": "nf5"}]), "did you mean 'nf4'"),
        (changed(runs=[{"method": "prompt_tuning", "init": "TRANSFER"}]), "movie_reviews needs `source"),
        (changed(examples=18), "no whole number of steps of 4"),
        (changed(examples=[16, -4]), "examples: -4 is no whole number"),
        (changed(budgets=[{"seconds": 90}]), "key of a suite.*'budgets'"),
        (changed(runs=[{"method": "full", "scored_over": "nf4"}]), "full has no adapter"),
        (changed(runs=[{"method": "lora", "scored_over": "nf5"}]), "did you mean 'nf4'"),
        (changed(arguments={}), "per_device_train_batch_size"),
        (changed(seeds=["a"]), "seed.*'a'"),
        (changed(seeds=3), "seeds: wanted a list, got 3"),
        (changed(tasks=["movie_reviews"]), "tasks: wanted a mapping, got .'movie_reviews'."),
        (changed(tasks={"sst2": "glue/sst2"}), "the task sst2: wanted a mapping, got 'glue/sst2'"),
        (changed(arguments={"per_device_train_batch_size": 0}), "a step has one row or more, got 0"),
        (transfer(num_virtual_token=4), "flag of a source.*did you mean 'num_virtual_tokens'"),
        (transfer(max_steps=1), "flag of a source.*'max_steps'"),
        (transfer(per_device_train_batch_size=3), "no whole number of steps of 3"),
        (changed(tasks={"sst2": {"source": "rte"}}), "the source of the task sst2: wanted a mapping, got 'rte'"),
        (changed(runs=["lora"]), "a run: wanted a mapping, got 'lora'"),
        (changed(time_limit_s="1h"), "time_limit_s: wanted a number of seconds, got '1h'"),
        (changed(time_limit_s=float("nan")), "time_limit_s: wanted a number of seconds, got nan"),
        (changed(runs=[]), "wanted a mapping with tasks, examples and runs"),
        ("runs: [", "not YAML"),
        ("- 1", "wanted a mapping"),
    ],
)
def test_a_wrong_suite_is_one_clear_error(write, suite, said):
    path = write(suite)
    with pytest.raises(SuiteError, match=said) as error:
        load_suite(path)
    assert str(path) in str(error.value)


def test_two_suites_share_runs(write, tmp_path):
    one, two = write(SMALL, "one"), write(changed(time_limit_s=7200), "two")
    (tmp_path / "glue" / "sst2").mkdir(parents=True)
    specs, time_limit_s = load_suites([one, two], str(tmp_path))
    assert len(specs) == len(load_suite(one))
    assert time_limit_s == 7200
    with pytest.raises(SuiteError, match="There is no suite"):
        load_suites([tmp_path / "none.yaml"], None)


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_the_projects_suites_open_with_their_command_and_the_recipe_takes_each_of_their_runs(path, tmp_path):
    from peft_prompt_ext.training.command_line import parse

    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# python -m benchmarks run benchmarks/suites/{path.name}")
    kinds = {(s["method"], s["task"], s["init"], s["quantization"]): s for s in load_suite(path)}
    assert kinds
    for spec in kinds.values():
        _, data_args, method_args, args = parse(train_arguments(spec, tmp_path))
        assert (data_args.task_name, method_args.method) == (spec["task"], spec["method"])
        assert args.seed == spec["seed"]
