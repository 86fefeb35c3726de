"""The report's numbers once more, by hand, from a made-up store; and the project's own page and tables."""

import itertools
import json
import math
import re
import statistics

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.report import command, page, tables
from benchmarks.report.load import load_runs
from benchmarks.report.statistics import compare, interval, row_test
from benchmarks.report.summary import summarise
from tests.benchmarks.events import ROWS, WEIGHTS, event, grid, spec, step_times, write


T_95 = {2: 12.706204736, 3: 4.302652730, 4: 3.182446305}  # Student's t by the number of seeds
PROMPT = "prompt tuning, TEXT"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return write(folder / "runs.jsonl", grid()), write(folder / "step_times.jsonl", step_times())


@pytest.fixture(scope="module")
def summary(files):
    return summarise(load_runs([files[0]], [files[1]]))


@pytest.fixture(scope="module")
def own():
    return command.read()


def summary_of(tmp_path, events):
    return summarise(load_runs([write(tmp_path / "runs.jsonl", events)]))


def scores(files, method, task):
    """By seed, as they are in the file."""
    runs = [(e["spec"], e["result"]) for e in map(json.loads, files[0].read_text().splitlines())]
    of = {spec["seed"]: result["score"] for spec, result in runs if (spec["method"], spec["task"]) == (method, task)}
    return [of[seed] for seed in sorted(of)]


def by_hand(values):
    return statistics.mean(values), T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def test_scores_are_means_over_seeds_of_means_over_tasks_and_tasks_that_share_text_are_one(files, summary):
    assert summary.common == ["movie_reviews", "sst2"]
    for method, variant in (("prompt_tuning", PROMPT), ("lora", "LoRA"), ("full", "full fine-tuning")):
        reviews, sst2, cb = (scores(files, method, task) for task in ("movie_reviews", "sst2", "cb"))
        both = [(a + b) / 2 for a, b in zip(reviews, sst2, strict=True)]
        found = summary.score(variant, summary.common)
        assert (found.mean, found.half) == pytest.approx(by_hand(both), rel=1e-6)
        if method != "full":
            with_cb = [(a + b) / 2 for a, b in zip(both, cb, strict=True)]  # cb is half, not a third
            assert summary.score(variant, [*summary.common, "cb"]).mean == pytest.approx(statistics.mean(with_cb))


def test_differences_are_paired_by_seed(files, summary):
    pairs = zip(scores(files, "prompt_tuning", "sst2"), scores(files, "lora", "sst2"), strict=True)
    found = summary.difference(PROMPT, "LoRA", ["sst2"])
    assert (found.mean.mean, found.mean.half) == pytest.approx(by_hand([a - b for a, b in pairs]), rel=1e-6)
    assert summary.difference(PROMPT, "full fine-tuning", ["cb"]) is None


def test_costs_are_the_most_bytes_and_the_mean_of_interleaved_seconds(summary):
    assert summary.cost(PROMPT, summary.common, "memory_bytes") == (700 + WEIGHTS) * 1000 + 2
    assert summary.cost("LoRA", summary.common, "adapter_bytes") == 1_900_000
    assert summary.cost(PROMPT, summary.common, "seconds") == pytest.approx(10 * (1.5 + 3.0) / 2)
    assert summary.cost("zero-shot", summary.common, "seconds") == 0
    assert summary.cost(PROMPT, ["cb"], "latency") == pytest.approx(1.2)
    assert summary.cost("full fine-tuning", ["sst2"], "latency") == 1.0, "it has no adapter"


def test_what_was_not_measured_interleaved_is_not_measured(files):
    alone = summarise(load_runs([files[0]]))
    assert math.isnan(alone.cost(PROMPT, alone.common, "seconds"))
    assert "not measured" in tables.overview(alone)


def test_a_transfers_seconds_hold_its_sources(tmp_path):
    of = {**spec("sst2", "prompt_tuning", 0, "TRANSFER"), "source": {"task": "movie_reviews"}}
    paths = write(tmp_path / "runs.jsonl", [event(of)]), write(tmp_path / "times.jsonl", step_times())
    assert load_runs(paths[:1], paths[1:])["seconds"].tolist() == [10 * 3.0 + 10 * 1.5]


def exact_p(differences):
    """P of a sum as far from 0, over every choice of signs."""
    sums = [abs(sum(signs)) for signs in itertools.product(*((d, -d) for d in differences))]
    return sum(found >= abs(sum(differences)) - 1e-9 for found in sums) / len(sums)


@pytest.mark.parametrize("size", [9, 17])
def test_the_row_test_is_the_exact_one_or_close_to_it(size):
    draw = np.random.default_rng(size)
    first, second = draw.integers(0, 4, size).astype(float), draw.integers(0, 3, size).astype(float)
    assert row_test(first, second) == pytest.approx(exact_p(first - second), abs=0.015)
    assert row_test(first, second) == row_test(first, second) and row_test(first, first) == 1.0


def frame(tmp_path, name, rights, rows="same", tasks=("sst2",)):
    """Runs of LoRA in which each seed has the given rows right."""
    events = []
    for (seed, right), task in itertools.product(enumerate(rights), tasks):
        correct = "1" * right + "0" * (ROWS[task] - right)
        made = event(spec(task, "lora", seed), result={"score": right / ROWS[task], "correct": correct})
        made["env"]["scored_rows_sha256"] = rows
        events.append(made)
    return load_runs([write(tmp_path / f"{name}.jsonl", events)])


@pytest.mark.parametrize(
    ("first", "second", "rows", "verdict"),
    [
        ((70, 71, 72), (50, 52, 51), "same", "clearly"),  # both tests
        ((70, 50, 60), (52, 46, 60), "same", "probably"),  # the rows alone: seeds differ too much
        ((60, 61, 60), (59, 60, 59), "same", "tied"),  # the same step at every seed is no interval
        ((60, 58, 61), (59, 60, 59), "same", "tied"),
        ((70, 71), (50, 52), "same", "fewer than 3 seeds"),
        ((70, 71, 72), (50, 52, 51), "other", "scored on other rows or weights"),
    ],
)
def test_a_verdict_needs_both_tests_to_be_clear(tmp_path, first, second, rows, verdict):
    one, other = frame(tmp_path, "one", first), frame(tmp_path, "other", second, rows)
    assert compare(one, other).verdict == verdict
    assert compare(other, one).mean.mean == pytest.approx(-compare(one, other).mean.mean)


def test_an_interval_of_one_seed_is_none():
    assert interval([0.5]).half is None and tables.percent(interval([0.5])) == "50.0 % (one seed)"


def test_tasks_at_the_majority_are_in_no_mean_and_are_named(summary):
    assert summary.at_majority == ["rte"] and "On rte no method clearly beats the majority class." in page.headline(
        summary
    )


def test_a_rerun_that_fails_loses_no_result_and_a_result_that_is_not_finite_is_not_used(tmp_path):
    of = spec("sst2", "lora", 0)
    later = event(of, status="failed", attempt=2, started_at="2026-02-02T00:00:00+00:00")
    unusable = event(spec("sst2", "lora", 1), result={"score": None})
    runs = load_runs([write(tmp_path / "runs.jsonl", [event(of), later, unusable])])
    assert runs["status"].tolist() == ["ok", "unusable"]


def test_budgets_of_seconds_and_searches_are_not_compared(tmp_path):
    seconds = event(spec("sst2", "full", 0))
    seconds["spec"]["budget"] = {"seconds": 90, "steps": 3}
    search = event(spec("sst2", "full", 0, held_out_samples=8))
    found = summary_of(tmp_path, [*grid(), seconds, search])
    assert found.elsewhere == 1 and len(found.of("full fine-tuning", ["sst2"])) == 3


def test_variants_that_differ_in_a_flag_are_apart(tmp_path):
    events = [event(spec("sst2", "lora", seed, learning_rate=rate)) for seed in range(3) for rate in (0.1, 0.2)]
    assert summary_of(tmp_path, events).variants() == ["LoRA, learning_rate 0.1", "LoRA, learning_rate 0.2"]


def test_a_diverged_seed_is_named(tmp_path):
    bad = event(spec("sst2", "prompt_tuning", 1, "TEXT"), result={"score": 0.4, "correct": "1" * 32 + "0" * 48})
    events = [bad if made["run_id"] == bad["run_id"] else made for made in grid()]
    text = page.markdown(summary_of(tmp_path, events), is_own=False)
    assert f"Seed 1 of {PROMPT} diverged on sst2: 60.0 % untrained, 40.0 % trained" in text


def test_a_tie_is_called_a_tie_and_costs_decide_it_in_the_same_sentence(summary):
    first = page.headline(summary).split("**")[1]
    assert first.startswith("On sentiment prompt tuning and LoRA are tied, so costs decide: ")
    assert "less storage for a task (46 kB against 1.9 MB)" in first and "training time (21 s against 22 s)" in first
    assert "On cb LoRA is" in page.headline(summary) and "tiny, 40 examples (10 steps of 4)" in page.headline(summary)


def test_what_was_not_run_is_said(summary):
    text = page.markdown(summary, is_own=False)
    assert "- On cb: full fine-tuning; zero-shot." in text
    assert "the task is like cb: LoRA is clearly ahead" in text.split("**Do not take it when**")[1]


@pytest.mark.parametrize("method", ["prompt_tuning", "lora"])
def test_a_page_of_one_method_and_one_seed_is_whole(tmp_path, method):
    path = write(tmp_path / "runs.jsonl", [event(spec("sst2", method, 0))])
    command.main(["--results", str(path), "--output", str(tmp_path / "out")])
    assert "(one seed)" in (tmp_path / "out" / "RESULTS.md").read_text()


def test_the_html_is_one_file_with_its_pictures_and_without_a_network(files, tmp_path, capsys):
    for name in ("a", "b"):
        arguments = ["--results", str(files[0]), "--step_times", str(files[1]), "--output", str(tmp_path / name)]
        command.main(arguments)
    html = (tmp_path / "a" / "RESULTS.html").read_text()
    assert html.count("<svg ") == 2 and "<img" not in html and "@media(prefers-color-scheme:dark)" in html
    assert not re.search(r"(src|href)=\"(?!#)|url\((?!#)|@import|<script", html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert (tmp_path / "b" / "RESULTS.html").read_text() == html, "the same results give the same bytes"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (None, "There is no results file"),
        ([], "There is no run to report"),
        ([event(spec("sst2", "lora", 0), status="failed")], "none has ended well"),
        ([{"kind": {}}], "wanted an event with a schema_version"),
    ],
)
def test_a_store_that_gives_no_page_is_one_clear_error(tmp_path, lines, said):
    path = tmp_path / "runs.jsonl"
    if lines is not None:
        write(path, lines)
    with pytest.raises(SystemExit, match=f"error: .*{said}"):
        main(["report", "--results", str(path), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_tables_stand_between_markers_and_the_rest_of_a_readme_stays(summary):
    text = "before\n<!-- results: headline -->\nold\n<!-- /results -->\nafter\n"
    new = page.filled(text, summary)
    assert new.startswith("before\n<!-- results: headline -->\n| method |")
    assert new.endswith("<!-- /results -->\nafter\n")
    assert page.filled(new, summary) == new
    with pytest.raises(ValueError, match="no table of results 'other'"):
        page.filled(text.replace("headline", "other"), summary)


def test_the_projects_page_and_readmes_are_what_its_results_give(own):
    assert page.old_readmes(own) == {}, "python -m benchmarks report writes them"
    for path, text in command.pages(own, command.RESULTS.parent, is_own=True).items():
        if path.suffix == ".md":
            assert path.read_text(encoding="utf-8") == text, "python -m benchmarks report writes it"
            assert text.count("\n") <= 150 and len(page.html(text, path.parent).encode()) <= 150_000
    assert all(table(own).count("\n") > 3 for table in page.FOR_READMES.values())
