import itertools
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.harness.pace import kind_of, pace_path
from benchmarks.harness.suite import source_spec
from benchmarks.report import main
from benchmarks.reporting.advice import Needs, advise
from benchmarks.reporting.comparisons import compare
from benchmarks.reporting.contrasts import random_of
from benchmarks.reporting.evidence import read_evidence
from benchmarks.reporting.measures import ENERGY, INFERENCE, SOURCE_EXAMPLES, TIME, written
from benchmarks.reporting.runs import EvidenceError
from benchmarks.reporting.sections.choice import _batches
from benchmarks.reporting.sections.origin import command, gaps_section
from benchmarks.reporting.sections.pictures import _lines
from benchmarks.reporting.sections.scores import _warnings, leaders
from benchmarks.reporting.statistics import interval, row_test, seed_test
from tests.helpers_report import EXAMPLES, SECONDS, Oracle, label


STORE = Path(__file__).parent / "data" / "benchmark_store.jsonl"
SPEED = Path(__file__).parent / "data" / "benchmark_speed.jsonl"
HAND_MADE = ("Runs", "The command behind every run", "Environments", "Runs without a usable result")


@pytest.fixture(scope="module")
def oracle():
    return Oracle(STORE)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """HTML and Markdown of the fixed store."""
    folder = tmp_path_factory.mktemp("report")
    main(["--results", str(STORE), "--speed", str(SPEED), "--output", str(folder)])
    return tuple((folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))


@pytest.fixture
def store(tmp_path):
    """Writes a store: `store(event, event, ...)`."""

    def write(*events, name="runs.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
        return path

    return write


@pytest.fixture
def run_of(oracle):
    """Makes an event out of one of the store: `run_of("lora", 0, "10" * 30, score=...)`."""

    def make(method, seed, correct, task="colours", init=None, score=None, **changes):
        event = json.loads(json.dumps(next(e for e in oracle.good.values() if e["spec"]["method"] == method)))
        event["spec"] |= {"seed": seed, "task": task, "init": init, "source": None, "quantization": None}
        event["run_id"] = f"{method}-{init}-{task}-{seed}"
        share = correct.count("1") / len(correct) if correct else 0.0
        score = share if score is None else score
        event["result"] |= {"correct": correct or None, "score": score, "eval_samples": len(correct), **changes}
        return event

    return make


def tables(markdown):
    """Rows of every table, by the last heading of a setting and the caption; [] for the columns first."""
    found, heading, lines = {}, "", markdown.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("## "):
            heading = ""
        if line.startswith("### "):
            heading = line[4:]
        if line.startswith("Table: "):
            rows = []
            for row in lines[number + 2 :]:
                if not row.startswith("| ") and not row.startswith("|--"):
                    break
                rows.append([cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]])
            key = heading, line[7:]
            assert key not in found, "two tables have one name"
            found[key] = [rows[0], *rows[2:]]
    return found


def plain(rows):
    return [[cell.replace("**", "") for cell in row] for row in rows]


def settings_of(*paths):
    return read_evidence(paths).settings


def test_every_number_of_every_table_is_what_an_independent_computation_gives(report, oracle):
    found = tables(report[1])
    expected = oracle.tables() | oracle.speed_tables(SPEED)
    search = EXAMPLES, f"Scores while searching: {EXAMPLES} (accuracy)"
    searched = [event for event in oracle.good.values() if "held_out_samples" in event["spec"]["arguments"]]
    loras = [event["spec"] for event in oracle.good.values() if event["spec"]["method"] == "lora"]
    used = {s["arguments"].get("learning_rate") for s in loras if "held_out_samples" not in s["arguments"]}
    expected[search] = [
        [
            f"LoRA, learning_rate={event['spec']['arguments']['learning_rate']}",
            f"{100 * event['result']['score']:.1f} (one seed, no interval)",
            f"{event['result']['loss']:.3f}",
            "yes" if event["spec"]["arguments"]["learning_rate"] in used else "",
        ]
        for event in searched
    ]
    for key, rows in expected.items():
        assert plain(found[key][1:]) == rows, key
        assert len({len(row) for row in found[key]}) == 1, key
    others = {caption for _, caption in set(found) - set(expected)}
    assert others == {*HAND_MADE, "Without a usable run", "Rows and weights (the first 12 digits of their hashes)"}


def test_every_run_is_there_with_its_line_its_machine_and_its_command(report, oracle):
    found = tables(report[1])
    rows = found["", "Runs"][1:]
    assert sorted(row[0] for row in rows) == sorted(oracle.latest)
    for row in rows:
        event = oracle.latest[row[0]]
        spec, result = event["spec"], event["result"]
        unit, amount = next(iter(spec["budget"].items()))
        assert row[2:4] == [spec["task"], str(spec["seed"])]
        assert row[4] == f"{amount} {'s' if unit == 'seconds' else unit}"
        if row[0] in oracle.good:
            assert row[5] == f"{100 * result['score']:.1f}"
            disturbed = result["other_cpu_share"] > 0.1
            seconds = "no training" if spec["method"] == "zero_shot" else None
            time = result["train_time_s"]
            assert row[6] == (seconds or f"{time:.{1 if time >= 10 else 2}f} s" + ", disturbed" * disturbed)
        else:
            assert row[6] == "not measured" and not re.search(r"\d", row[5])
        assert row[7:9] == [str(event["attempt"]), f"{STORE.name}:{oracle.line[row[0]]}"]
        assert row[9] == ("E1" if event["env"] else "unknown")
    line = STORE.read_text().splitlines()
    assert all(json.loads(line[int(row[8].split(":")[1]) - 1])["run_id"] == row[0] for row in rows)
    commands = {row[0]: row[1].strip("`") for row in found["", "The command behind every run"][1:]}
    assert sorted(commands) == sorted(oracle.latest)
    for run_id, typed in commands.items():
        spec = oracle.latest[run_id]["spec"]
        last = typed.split(" && ")[-1]
        assert last.startswith(f"python recipes/train.py --task_name {spec['task']} --method {spec['method']}")
        assert f"--seed {spec['seed']} --data_dir DATA_DIR/toys/{spec['task']}" in last
        assert all(f"--{name} {value}" in last for name, value in spec["arguments"].items())
        source = spec["source"] and f"--task_name {spec['source']['task']} "
        assert len(typed.split(" && ")) == (2 if source else 1)
        assert not source or (source in typed.split(" && ")[0] and '\'{"source": "SOURCE"}\'' in last)
    commit = "0123456789abcdef" * 2 + "01234567"
    environment = ["E1", "cpu", "made up for the tests, none", "3.11.7", "peft 0.21.2, torch 2.13.0", commit]
    assert found["", "Environments"][1:] == [environment]
    hashes = found["", "Rows and weights (the first 12 digits of their hashes)"][1:]
    shapes = sum(event["spec"]["task"] == "shapes" for event in oracle.good.values())
    assert ["shapes", "made-up-model", "48", "shapes-rows0", "made-up-weig", str(shapes)] in hashes
    assert sum(int(row[-1]) for row in hashes) == len(oracle.good)


def test_failures_are_rows_with_their_reason_and_a_torn_line_is_said(report, oracle):
    rows = tables(report[1])["", "Runs without a usable result"][1:]
    bad = {run_id: event for run_id, event in oracle.latest.items() if run_id not in oracle.good}
    assert sorted(row[-1] for row in rows) == sorted(
        [*(f"{STORE.name}:{oracle.line[run_id]}" for run_id in bad), f"{SPEED.name}:9"]
    )
    reasons = {row[-1]: row[4:6] for row in rows}
    for run_id, event in bad.items():
        state, reason = reasons[f"{STORE.name}:{oracle.line[run_id]}"]
        if event["status"] == "started":
            assert (state, reason) == ("not ended", f"started at {event['started_at']}, not ended")
        elif event["status"] == "ok":
            assert (state, reason) == ("unusable result", "score is no finite number (nan)")
        else:
            assert (state, reason) == (event["status"].replace("_", " "), event["error"])
    assert reasons[f"{SPEED.name}:9"] == ["failed", "exit 1: ValueError: made up"]
    assert f"- {STORE.name}: line 77 is not whole (a kill tore it) and was left out." in report[1]


def test_what_was_not_measured_is_said_for_the_grid_of_the_runs(report, oracle):
    rows = tables(report[1])["", "Without a usable run"][1:]
    found = [
        (row[0], row[1], task, int(seed), row[4])
        for row in rows
        for task in row[2].split(", ")
        for seed in row[3].split(", ")
    ]
    bad = [event for run_id, event in oracle.latest.items() if run_id not in oracle.good]
    expected = [(EXAMPLES, label(e["spec"]), e["spec"]["task"], e["spec"]["seed"]) for e in bad]
    assert sorted(entry[:4] for entry in found if entry[0] == EXAMPLES) == sorted(expected)
    assert {entry[4] for entry in found if entry[1] == "Full fine-tuning" and entry[0] == EXAMPLES} == {
        "out of memory"
    }
    assert [row for row in rows if row[0] == SECONDS] == [
        [SECONDS, "Full fine-tuning", "shapes", "0, 1, 2", "not run"]
    ]
    # nine methods with three seeds and zero-shot on two tasks; three and zero-shot at equal seconds
    assert f"{len(found)} of its {2 * (9 * 3 + 1) + 2 * (3 * 3 + 1)} entries have no usable run." in report[1]
    for line in ("A GPU: no run used one.", "Energy: no run has it.", "Prompt tuning, SAMPLE_VOCAB: no usable run."):
        assert f"- {line}" in report[1]


def test_what_a_suite_wants_and_no_run_has_is_said(oracle):
    evidence = read_evidence([STORE])
    good = next(event["spec"] for event in oracle.good.values() if event["spec"]["method"] == "lora")
    failed = next(event["spec"] for event in oracle.latest.values() if event["status"] == "out_of_memory")
    larger = {**good, "arguments": {**good["arguments"], "model_name_or_path": "a larger one"}}
    others = [{**good, "seed": seed, "task": task} for task in ("colours", "shapes") for seed in (98, 99)]
    section = gaps_section(evidence, [good, failed, *others, larger])
    rows = [[cell.text for cell in row] for row in section.blocks[1].rows]
    budget = f"{good['arguments']['model_name_or_path']}, 80 examples"
    assert rows[:3] == [
        [budget, "Full fine-tuning", "shapes", "0", "out of memory"],
        [budget, "LoRA", "colours, shapes", "98, 99", "not run"],
        ["a larger one, 80 examples", "LoRA", good["task"], str(good["seed"]), "not run"],
    ]
    # nothing of the suite's entries is asked twice, and what no suite wants but runs span is there too
    assert sum(row[1] == "LoRA" for row in rows) == 2
    spanned = [SECONDS, "Full fine-tuning", "shapes", "0, 1, 2", "not run"]
    assert spanned in rows


def test_means_are_over_the_tasks_that_most_methods_were_run_on(store, run_of):
    """A task that was tried with one method more than the rest must not leave the rest without a mean."""
    events = [run_of(method, seed, "10") for method in ("lora", "full", "prompt_tuning") for seed in range(3)]
    [setting] = settings_of(store(*events, *(run_of("lora", seed, "11", task="shapes") for seed in range(3))))
    assert setting.tasks == ("colours", "shapes")
    assert setting.columns == {"colours": ("colours",), "shapes": ("shapes",)}
    assert advise(setting, Needs()).tasks == ("colours",)
    more = [run_of("full", seed, "11", task="shapes") for seed in range(3)]
    [setting] = settings_of(store(*events, *more, *(run_of("lora", seed, "11", task="shapes") for seed in range(3))))
    assert setting.columns["mean of 2 tasks"] == ("colours", "shapes")
    one = run_of("lora", 0, "11", task="sizes")
    [setting] = settings_of(store(*events, *more, *(run_of("lora", s, "11", task="shapes") for s in range(3)), one))
    assert setting.columns["mean of colours, shapes"] == ("colours", "shapes")


def test_a_task_joins_the_mean_once_most_methods_have_their_seeds(store, run_of, tmp_path):
    """What the grid happens to run first must not decide, else the others would look too thin for a while."""
    methods = ("prompt_tuning", "lora", "full")
    events = [run_of(method, seed, "10") for method in methods for seed in range(3)]
    events += [run_of(method, seed, "10", task="shapes") for method in methods for seed in range(2)]
    events.append(run_of("prompt_tuning", 2, "10", task="shapes"))
    [setting] = settings_of(store(*events))
    assert setting.common == ("colours",)
    main(["--results", str(store(*events)), "--speed", "--output", str(tmp_path)])
    left_out = "Not in the mean, since too few methods or seeds were run: shapes."
    assert left_out in (tmp_path / "report.md").read_text(encoding="utf-8")
    events.append(run_of("lora", 2, "10", task="shapes"))
    [setting] = settings_of(store(*events))
    assert setting.common == ("colours", "shapes")
    main(["--results", str(store(*events)), "--speed", "--output", str(tmp_path)])
    assert "Not in the mean" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_task_on_which_nothing_was_learnt_is_in_no_mean(store, run_of, tmp_path):
    """Of 20 rows 11 have one label; LoRA's mean there is above that, by less than its interval."""
    level = {"colours": 0.5, "shapes": 0.55}
    right = {"colours": (15, 15, 15), "shapes": (11, 11, 14)}
    events = [
        run_of(method, seed, "1" * count + "0" * (20 - count), task=task, majority=level[task])
        for task, counts in right.items()
        for method in ("lora", "full")
        for seed, count in enumerate(counts)
    ]
    untrained = run_of("zero_shot", 0, "1" * 18 + "00", task="shapes", majority=0.55)
    untrained["spec"]["budget"] = {"examples": 0}
    path = store(*events, untrained)
    [setting] = settings_of(path)
    assert (setting.at_chance, setting.common) == (("shapes",), ("colours",))
    main(["--results", str(path), "--speed", "--output", str(tmp_path)])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    said = "since no method's interval is above always giving the most common label there: shapes (55.0)."
    assert f"Not in the mean, {said}" in text
    scores = tables(text)[EXAMPLES, f"Scores: {EXAMPLES} (accuracy)"]
    assert scores[-1] == ["Always the most common label", "50.0", "55.0"]
    assert scores[0] == ["method", "colours", "shapes"]
    alone = store(*(event for event in events if event["spec"]["task"] == "shapes"))
    assert settings_of(alone)[0].common == ("shapes",), "a mean of nothing would be no help"
    main(["--results", str(alone), "--speed", "--output", str(tmp_path)])
    assert f"In the mean for want of others, {said}" in (tmp_path / "report.md").read_text(encoding="utf-8")
    for event in events:
        event["result"]["main_metric"] = "f1"
    assert settings_of(store(*events))[0].at_chance == (), "another metric is not compared with a share of rows"


def test_how_few_rows_were_scored_is_said(store, run_of):
    [setting] = settings_of(store(*(run_of("lora", seed, "1110" * 25) for seed in range(3))))
    assert "of the best score that adds ± colours 8.5 (100 rows)." in _warnings(setting)[0]  # 1.96 sqrt(.75 .25 / 100)


@pytest.mark.parametrize(
    ("energy", "share", "cell"), [(5.0, 0.0, "5 J"), (5.0, 0.5, "disturbed"), (None, 0.5, "not measured")]
)
def test_an_energy_is_written_unless_it_was_disturbed_or_not_measured(store, run_of, energy, share, cell):
    run = run_of("lora", 0, "10", energy_j=energy, other_cpu_share=share)
    [setting] = settings_of(store(run))
    assert written(setting, "colours", setting.variants[0], ENERGY) == cell


def test_zero_shot_brings_no_task_that_nothing_was_trained_on(store, run_of):
    untrained = [run_of("zero_shot", 0, "10", task=task) for task in ("colours", "shapes")]
    for event in untrained:
        event["spec"]["budget"] = {"examples": 0}
    [setting] = settings_of(store(run_of("lora", 0, "10"), *untrained))
    assert setting.tasks == ("colours",)
    [setting] = settings_of(store(*untrained))
    assert setting.tasks == ("colours", "shapes") and setting.has_results


def test_sentences_hold_the_numbers_of_the_tables(report, oracle):
    text = report[1]
    best, base = "Prompt tuning, CLASS_LABELS", "Prompt tuning, RANDOM"
    both = ["colours", "shapes"]

    def sentence(first, second, tasks=both, setting=EXAMPLES):
        words = oracle.points(setting, tasks, first, second)
        return words.replace(" (", " points (", 1)

    assert f"The best init is CLASS_LABELS: {sentence(best, base)} against RANDOM, larger than the noise." in text
    second = sentence(best, "Prompt tuning, TRANSFER")
    assert f"Against TRANSFER it is {second}: within the noise." in text
    for setting, tasks, name, leader, rival in (
        (EXAMPLES, ["colours"], "colours", best, "Full fine-tuning"),
        (EXAMPLES, ["shapes"], "shapes", "Prompt tuning, TRANSFER", "LoRA"),
        (EXAMPLES, both, "mean of 2 tasks", best, "LoRA"),
        (SECONDS, ["shapes"], "shapes", best, "LoRA"),
    ):
        _, _, over_seeds, over_rows, verdict, _ = oracle.compared(setting, tasks, leader, rival)
        nobody = "" if verdict == "larger than the noise" else "nobody is bold, "
        p = " ".join(f"{value:.3f}" if value >= 0.001 else "< 0.001" for value in (over_seeds,))
        q = f"{over_rows:.3f}" if over_rows >= 0.001 else "< 0.001"
        lead = f"the lead of {leader} over {rival} ({sentence(leader, rival, tasks, setting)}; p: seeds {p}, rows {q})"
        assert f"- {name}: {nobody}{lead} is {verdict}." in text
    assert "- 1 of 49 runs shared the machine with other programs: their timings are left out." in text
    searched = sum("held_out_samples" in event["spec"]["arguments"] for event in oracle.good.values())
    runs = f"{len(oracle.good) - searched} runs with a result and {searched} of a search for hyper-parameters"
    assert f"{runs}, 1 failed, 1 not ended, 3 out of memory, 1 timeout" in text


def test_bold_is_what_leads_another_kind_beyond_the_noise_and_cannot_be_told_from_the_best(report, oracle):
    for setting in (EXAMPLES, SECONDS):
        columns, *rows = tables(report[1])[setting, f"Scores: {setting} (accuracy)"]
        for column, tasks in enumerate((["colours"], ["shapes"], ["colours", "shapes"]), start=1):
            known = {
                row[0]: float(np.mean(oracle.scores(setting, tasks, row[0], seeds)))
                for row in rows
                if len(seeds := oracle.seeds(setting, tasks, row[0])) == 3
            }
            methods = {row: row.split(",")[0] for row in known}
            best = max(known, key=known.get)
            others = {methods[row] for row in known} - {methods[best]}
            rivals = [max((row for row in known if methods[row] == other), key=known.get) for other in others]

            def leads(row, rival, known=known, setting=setting, tasks=tasks):
                verdict = oracle.compared(setting, tasks, row, rival)[4]
                return known[row] > known[rival] and verdict == "larger than the noise"

            expected = {
                row
                for row in known
                if methods[row] == methods[best]
                and all(leads(row, rival) for rival in rivals)
                and (row == best or not oracle.compared(setting, tasks, row, best)[5])
            }
            bold = {row[0] for row in rows if row[column].startswith("**")}
            assert bold == expected, (setting, columns[column])
    both = tables(report[1])[EXAMPLES, f"Scores: {EXAMPLES} (accuracy)"]
    assert sum(cell.startswith("**") for row in both for cell in row) == 3  # else the loop above shows little


@pytest.mark.parametrize(
    ("right", "is_bold"),
    [((45, 46, 47), True), ((31, 32, 30), False), ((59, 31, 30), False)],
    ids=["clear", "few rows", "one lucky seed"],
)
def test_a_lead_is_bold_only_if_seeds_and_rows_both_show_it(store, run_of, right, is_bold):
    prompts = [run_of("prompt_tuning", seed, "1" * n + "0" * (60 - n), init="TEXT") for seed, n in enumerate(right)]
    loras = [run_of("lora", seed, "1" * n + "0" * (60 - n)) for seed, n in enumerate((30, 31, 29))]
    [setting] = settings_of(store(*prompts, *loras))
    bold, note = leaders(setting, "colours", ["colours"])
    assert [variant.label for variant in bold] == (["Prompt tuning, TEXT"] if is_bold else [])
    assert ("nobody is bold" not in note) == is_bold


def test_a_lead_over_one_kind_is_not_bold_if_another_kind_cannot_be_told_from_it(store, run_of):
    """Full fine-tuning has the next mean, and LoRA the next but with seeds so far apart that nobody knows."""
    right = {"prompt_tuning": (50, 51, 50), "full": (40, 42, 40), "lora": (55, 20, 40)}
    events = [
        run_of(method, seed, "1" * n + "0" * (60 - n)) for method in right for seed, n in enumerate(right[method])
    ]
    bold, note = leaders(settings_of(store(*events))[0], "colours", ["colours"])
    assert not bold and "nobody is bold, the lead of Prompt tuning over LoRA" in note
    bold, note = leaders(settings_of(store(*events[:6]))[0], "colours", ["colours"])
    assert [variant.method for variant in bold] == ["prompt_tuning"] and "over Full fine-tuning" in note


def test_what_leads_another_kind_but_is_worse_than_the_best_of_its_own_is_not_bold(store, run_of):
    right = {"TEXT": (57, 58, 58), "CLASS_LABELS": (57, 58, 57), "RANDOM": (46, 45, 46)}
    events = [run_of("lora", seed, "1" * n + "0" * (60 - n)) for seed, n in enumerate((30, 31, 29))]
    for init, counts in right.items():
        events += [run_of("prompt_tuning", seed, "1" * n + "0" * (60 - n), init=init) for seed, n in enumerate(counts)]
    bold, _ = leaders(settings_of(store(*events))[0], "colours", ["colours"])
    assert [variant.init for variant in bold] == ["CLASS_LABELS", "TEXT"]


def test_two_seeds_or_no_answers_of_single_rows_are_never_bold(store, run_of):
    few = [run_of("lora", seed, "0" * 60) for seed in (0, 1)]
    few += [run_of("prompt_tuning", seed, "1" * 60, init="TEXT") for seed in (0, 1)]
    bold, note = leaders(settings_of(store(*few))[0], "colours", ["colours"])
    assert not bold and "not decided (fewer than 3 seeds)" in note
    blind = [run_of("lora", seed, "", score=0.1) for seed in range(3)]
    blind += [run_of("prompt_tuning", seed, "", score=0.8 + seed / 100, init="TEXT") for seed in range(3)]
    bold, note = leaders(settings_of(store(*blind))[0], "colours", ["colours"])
    assert not bold and "not decided (no answers of single rows)" in note


def test_methods_that_were_scored_on_other_rows_are_not_paired(store, run_of):
    events = [run_of("lora", seed, "0" * 60) for seed in range(3)]
    events += [run_of("prompt_tuning", seed, "1" * (60 - seed) + "0" * seed, init="TEXT") for seed in range(3)]
    bold, _ = leaders(settings_of(store(*events))[0], "colours", ["colours"])
    assert bold
    events[0]["env"]["scored_rows_sha256"] = "others"
    bold, note = leaders(settings_of(store(*events))[0], "colours", ["colours"])
    assert not bold and "not decided (scored on other rows)" in note
    [setting] = settings_of(store(*events))
    assert any("colours: not all runs have the same scored_rows_sha256" in line for line in _warnings(setting))
    assert {candidate.excluded for candidate in advise(setting, Needs()).candidates} == {
        "",
        "not comparable with Prompt tuning, TEXT: scored on other rows",
    }
    events[0]["env"] |= {"scored_rows_sha256": events[1]["env"]["scored_rows_sha256"], "weights_sha256": "others"}
    assert "other weights" in leaders(settings_of(store(*events))[0], "colours", ["colours"])[1]


def test_a_higher_mean_of_too_few_seeds_lets_nobody_be_bold(store, run_of):
    events = [run_of("prompt_tuning", seed, "1" * 40 + "0" * (20 - seed), init="TEXT") for seed in range(3)]
    events += [run_of("zero_shot", 0, "0" * 60)] + [run_of("lora", seed, "1" * 60) for seed in range(2)]
    [setting] = settings_of(store(*events))
    assert leaders(setting, "colours", ["colours"]) == (
        [],
        "colours: nobody is bold; a higher mean than Prompt tuning, TEXT, but from fewer than 3 seeds: LoRA.",
    )


def test_a_better_init_of_too_few_seeds_is_named(store, run_of, tmp_path):
    events = [run_of("prompt_tuning", seed, "1" * 30 + "0" * 30, init="RANDOM") for seed in range(3)]
    events += [run_of("prompt_tuning", seed, "1" * 60, init="TEXT") for seed in range(2)]
    main(["--results", str(store(*events)), "--output", str(tmp_path)])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    named = "A higher mean, but from fewer than 3 seeds: Prompt tuning, TEXT."
    assert f"The best init is RANDOM: no other has a higher mean from as many seeds. {named}" in text
    assert "RANDOM has the highest mean. Prompt tuning, TEXT has a higher one, from fewer than 3 seeds." in text


def test_the_best_init_that_needs_no_other_task_is_named_too(store, run_of, tmp_path):
    right = {"RANDOM": 10, "TEXT": 20, "TRANSFER": 30}
    events = [
        run_of("prompt_tuning", seed, "1" * (count + seed % 2) + "0" * (40 - count - seed % 2), init=init)
        for init, count in right.items()
        for seed in range(3)
    ]

    def best_inits(*kept):
        main(["--results", str(store(*kept)), "--speed", "--output", str(tmp_path)])
        return re.findall(r"The best init.*", (tmp_path / "report.md").read_text(encoding="utf-8"))

    for event in events[6:]:
        event["spec"]["source"] = {"task": "shapes"}
    loras = [run_of("lora", seed, "1" * (15 + seed % 2) + "0" * (25 - seed % 2)) for seed in range(3)]
    [text] = best_inits(*events, *loras)
    assert re.match(
        r"The best init is TRANSFER: \+50\.0 points .*RANDOM, .*first trained on another task \(shapes for col", text
    )
    assert "The best init without another task is TEXT: +25.0 points" in text
    asked = tables((tmp_path / "report.md").read_text(encoding="utf-8"))[EXAMPLES, "What people ask first"][1:]
    pairs = [("Prompt tuning, TRANSFER", "LoRA", "+37.5"), ("Prompt tuning, TEXT", "LoRA", "+12.5")]
    assert [(row[0], row[1], row[3].split()[0]) for row in asked] == pairs
    [text] = best_inits(*events[:6])
    assert text.startswith("The best init is TEXT: +25.0") and "another task" not in text


def test_what_a_transfer_saw_besides_is_said(store, run_of, tmp_path):
    events = [run_of("prompt_tuning", seed, "10", init="TRANSFER", source_time_s=5.0) for seed in range(3)]
    for event in events:
        event["spec"]["source"] = {"task": "shapes"}
    for event, count in zip(events, (377, 380), strict=False):
        event["result"] |= {"source_rows": 560, "source_rows_left_out": count}
    [setting] = settings_of(store(*events))
    assert _warnings(setting)[1:] == [
        "TRANSFER has been trained on rows of another task too: shapes for colours. Those that share text with the "
        "scored rows were left out (shapes for colours: 377 or 380). In 1 of its 3 runs nobody looked whether any do."
    ]
    assert written(setting, "colours", setting.variants[0], SOURCE_EXAMPLES) == "560"


def test_tasks_that_few_methods_were_run_on_are_not_kept_from_who_asks(store, run_of, tmp_path):
    """TEXT is best on the tasks of the mean; CLASS_LABELS and LoRA alone were run on one more, where LoRA wins."""
    right = {
        ("prompt_tuning", "TEXT"): 30,
        ("prompt_tuning", "CLASS_LABELS"): 25,
        ("lora", None): 20,
        ("full", None): 9,
    }
    events = [
        run_of(method, seed, "1" * (count + seed % 2) + "0" * (40 - count - seed % 2), init=init)
        for (method, init), count in right.items()
        for seed in range(3)
    ]
    more = {("prompt_tuning", "CLASS_LABELS"): 11, ("lora", None): 38}
    events += [
        run_of(method, seed, "1" * (count + seed % 2) + "0" * (40 - count - seed % 2), init=init, task="shapes")
        for (method, init), count in more.items()
        for seed in range(3)
    ]
    main(["--results", str(store(*events)), "--speed", "--output", str(tmp_path)])
    asked = tables((tmp_path / "report.md").read_text(encoding="utf-8"))[EXAMPLES, "What people ask first"][1:]
    assert [(row[0], row[1], row[2], row[3].split()[0]) for row in asked] == [
        ("Prompt tuning, TEXT", "LoRA", "colours +25.0", "+25.0"),
        ("Prompt tuning, CLASS_LABELS", "LoRA", "colours +12.5, shapes -67.5", "-27.5"),
        ("Prompt tuning, TEXT", "Full fine-tuning", "colours +52.5", "+52.5"),
    ]


def test_the_ratio_of_times_is_of_seeds_that_both_were_timed_with(store, run_of, tmp_path):
    events = [run_of("prompt_tuning", seed, "10", init="TEXT", train_time_s=10.0 * (seed + 1)) for seed in range(3)]
    events += [run_of("lora", seed, "10", train_time_s=20.0 * (seed + 1)) for seed in range(3)]
    events[2]["result"]["other_cpu_share"] = 0.5
    main(["--results", str(store(*events)), "--speed", "--output", str(tmp_path)])
    columns, row = tables((tmp_path / "report.md").read_text(encoding="utf-8"))[EXAMPLES, "What people ask first"]
    assert (
        row[columns.index("training with its source, ratio")] == "0.50 x"
    )  # 15 against 30, not against the mean of all, 40


def test_a_method_that_was_run_with_another_budget_alone_is_named(store, run_of, tmp_path):
    events = [run_of(method, seed, "10") for method in ("lora", "full") for seed in range(3)]
    later = [run_of("lora", seed, "10") for seed in range(3)]
    for event in later:
        event["run_id"] += "-seconds"
        event["spec"]["budget"] = {"seconds": 30}
    main(["--results", str(store(*events, *later)), "--speed", "--output", str(tmp_path)])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.count("Not run with this budget") == 1
    assert "Not run with this budget, so not among them: Full fine-tuning." in text.split(f"### {SECONDS}")[1]


def test_time_to_a_score_is_of_all_seeds_or_of_none(store, run_of, tmp_path):
    """A mean over those that arrive would make the higher score the cheaper one."""
    ways = {"lora": (0.7, 0.7), "full": (0.7, 0.9), "linear_probe": (0.9, 0.9)}
    events = []
    for method, ends in ways.items():
        for seed, end in enumerate(ends):
            curve = [{"examples": n, "seconds": n * (seed + 1.0), "score": s} for n, s in ((0, 0.5), (10, end))]
            events.append(run_of(method, seed, "10", curve=curve))
    events[3]["result"]["other_cpu_share"] = events[4]["result"]["other_cpu_share"] = 0.5
    events[5]["result"]["other_cpu_share"] = 0.5
    main(["--results", str(store(*events)), "--speed", "--output", str(tmp_path)])
    found = tables((tmp_path / "report.md").read_text(encoding="utf-8"))
    columns, *rows = found[EXAMPLES, f"Time to a score: colours, {EXAMPLES}"]
    times = {row[0]: [row[columns.index(score)] for score in ("70.0", "90.0")] for row in rows}
    assert times == {
        "LoRA": ["15.0 s", "not reached"],
        "Full fine-tuning": ["10.0 s (1 of 2 runs)", "1 of 2 seeds"],
        "Linear probe": ["reached, not timed"] * 2,
    }


def test_what_is_no_better_than_no_training_is_not_worth_its_cost(store, run_of, tmp_path):
    right = {"lora": 50, "linear_probe": 25}
    events = [run_of(method, seed, "1" * n + "0" * (60 - n)) for method, n in right.items() for seed in range(3)]
    for event in events[3:]:
        event["result"] |= {"adapter_bytes": 1, "peak_memory_bytes": 1, "trainable_parameters": 1, "train_time_s": 1.0}
    main(["--results", str(store(*events)), "--speed", "--output", str(tmp_path / "a")])
    zero = run_of("zero_shot", 0, "1" * 30 + "0" * 30)
    main(["--results", str(store(*events, zero)), "--speed", "--output", str(tmp_path / "b")])
    best = {}
    for name in "ab":
        text = (tmp_path / name / "report.md").read_text(encoding="utf-8")
        best[name] = [row[-1] for row in tables(text)[EXAMPLES, f"Score against cost: {EXAMPLES}"][1:]]
    assert best == {"a": ["memory, parameters, time, bytes"] * 2, "b": ["memory, parameters, time, bytes", "none"]}


def test_inference_times_of_one_model_twice_say_how_much_is_noise(store, run_of):
    events = [
        run_of(method, 0, "10", inference_time_s=time, bare_inference_time_s=1.0)
        for method, time in (("full", 0.9), ("linear_probe", 1.2), ("lora", 1.1))
    ]
    [setting] = settings_of(store(*events))
    cells = [written(setting, "colours", variant, INFERENCE) for variant in setting.variants]
    assert cells == ["1.10", "no adapter", "no adapter"]
    assert any("one time was 0.90 to 1.20 of the other" in line for line in _warnings(setting))


def test_which_tried_rate_the_comparison_uses_and_what_was_not_searched_for(store, run_of, tmp_path):
    tried = [run_of("lora", 0, "10", loss=loss) for loss in (0.5, 0.4)]
    for rate, event in zip((0.001, 0.003), tried, strict=True):
        event["run_id"] = str(rate)
        event["spec"]["arguments"] |= {"learning_rate": rate, "held_out_samples": 256}
    used, other = run_of("lora", 0, "10"), run_of("full", 0, "10")
    used["spec"]["arguments"] = {**used["spec"]["arguments"], "learning_rate": 0.003}
    main(["--results", str(store(*tried, used, other)), "--speed", "--output", str(tmp_path)])
    said = "Chosen on colours with 1 seed, and used for colours. One standard error of a score is up to 35.4 points"
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    [rows] = [rows for (_, caption), rows in tables(text).items() if caption.startswith("Scores while searching")]
    assert [row[-2:] for row in rows] == [["loss", "in the comparison"], ["0.500", ""], ["0.400", "yes"]]
    assert "In the comparison, but not searched for: Full fine-tuning." in text
    assert said in text and "Of 1 learning rates taken 1 are the lowest or the highest that was tried" in text


def test_the_row_test_of_several_tasks_counts_each_task_the_same(store, run_of):
    """15 of 200 rows better, and 1 of 20 worse: 10 rows of the large task against one of the small."""
    counts = {"colours": (15, 200), "shapes": (0, 20)}
    events = []
    for seed in range(3):
        for task, (more, rows) in counts.items():
            first = "1" * more + "0" * (rows - more)
            second = "0" * (rows - (task == "shapes")) + "1" * (task == "shapes")
            events.append(run_of("prompt_tuning", seed, first, task=task))
            events.append(run_of("lora", seed, second, task=task))
    [setting] = settings_of(store(*events))
    prompt, lora = setting.variants
    signs = itertools.product((-1, 1), repeat=16)
    far = sum(abs(sum(of_large) + 10 * small) >= 5 for *of_large, small in signs)
    found = compare(setting, prompt, lora, ["colours", "shapes"])
    assert found.p_rows == pytest.approx(far / 2**16)
    assert compare(setting, prompt, lora, ["colours"]).p_rows == pytest.approx(2 / 2**15)


def test_rows_that_say_the_opposite_of_the_score_decide_nothing(store, run_of):
    worse = [run_of("lora", seed, "1" * 50 + "0" * 10, score=0.2) for seed in range(3)]
    better = [run_of("prompt_tuning", seed, "0" * 60, score=0.5 + seed / 100, init="TEXT") for seed in range(3)]
    [setting] = settings_of(store(*worse, *better))
    prompt, lora = setting.variants
    comparison = compare(setting, prompt, lora, ["colours"])
    assert not comparison.is_larger_than_noise
    assert comparison.verdict == "not decided (fewer rows right, a higher score)"
    assert comparison.p_rows is None


def test_intervals_and_tests_agree_with_scipy():
    draw = np.random.default_rng(0)
    for _ in range(20):
        first, second = draw.normal(size=(2, draw.integers(3, 9)))
        assert seed_test(first, second) == pytest.approx(stats.ttest_rel(first, second).pvalue)
        low, high = stats.t.interval(0.95, len(first) - 1, np.mean(first), stats.sem(first))
        assert (interval(first).mean - interval(first).half) == pytest.approx(low)
        assert (interval(first).mean + interval(first).half) == pytest.approx(high)
        rows = draw.integers(-3, 4, size=9)
        exact = stats.permutation_test(
            (rows,), np.sum, permutation_type="samples", n_resamples=10**6, alternative="two-sided"
        )
        assert row_test(rows.tolist()) == pytest.approx(exact.pvalue)
    assert row_test([1] * 9 + [-1] * 2) == pytest.approx(stats.binomtest(9, 11).pvalue)
    assert row_test([0, 0]) == 1
    assert seed_test([0.5, 0.6, 0.7], [0.4, 0.5, 0.6]) is None
    assert seed_test([0.5, 0.6, 0.7], [0.5, 0.6, 0.7]) == 1


def test_pictures_show_the_numbers_of_their_table(oracle):
    setting = read_evidence([STORE]).settings[0]
    for axis in ("examples", "seconds"):
        lines = {line.variant.label: line for line in _lines(setting, "colours", axis)}
        assert len(lines) == 9
        for row, line in lines.items():
            found = oracle.results(EXAMPLES, "colours", row, timed=axis == "seconds")
            curves = [r["curve"] for r in found.values()]
            for stop in range(5):
                scores = [curve[stop]["score"] for curve in curves]
                source = np.mean([r["source_time_s"] or 0.0 for r in found.values()]) if axis == "seconds" else 0.0
                assert line.x[stop] == pytest.approx(source + np.mean([curve[stop][axis] for curve in curves]))
                drawn = line.mean[stop], line.low[stop], line.high[stop]
                assert drawn == pytest.approx((np.mean(scores), min(scores), max(scores)))


class Page(HTMLParser):
    """Tables, ids and links of a page."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.ids, self.links, self.heads, self.pictures, self.text = [], [], [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if "href" in found else []
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in {"td", "th"}:
            self.text = ""
            assert tag == "td" or found["scope"] in {"row", "col"}
        if tag == "svg":
            self.pictures.append(found)
        if tag in {"h1", "h2", "h3"}:
            self.heads.append(int(tag[1]))

    def handle_endtag(self, tag):
        if tag in {"td", "th"}:
            self.tables[-1][-1].append(self.text)
            self.text = None

    def handle_data(self, data):
        if self.text is not None:
            self.text += data


def test_html_has_the_numbers_of_the_markdown(report):
    expected = [plain(rows) for rows in tables(report[1]).values()]
    found = Page(report[0]).tables
    assert [[[cell.strip("`") for cell in row] for row in rows] for rows in expected] == found
    assert sum(map(len, found)) > 250
    for line in re.findall(r"(?m)^- (.*)$", report[1]):
        assert line in re.sub(r"&#39;", "'", report[0]).replace("&lt;", "<"), line


def test_html_needs_no_network_and_no_script_and_its_links_lead_somewhere(report):
    page = Page(report[0])
    assert "http" not in report[0] and "<script" not in report[0] and "@import" not in report[0]
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", report[0])) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert page.heads[0] == 1 and all(b - a <= 1 for a, b in zip(page.heads, page.heads[1:], strict=False))
    assert len(page.pictures) == 3 * 2 + 2 + 4 + 3 + 1
    for picture in page.pictures:
        assert picture["role"] == "img"
        assert set(picture["aria-labelledby"].split()) <= set(page.ids)
    assert "currentColor" in report[0] and "prefers-color-scheme: dark" in report[0]


def test_the_same_store_gives_the_same_bytes_in_another_process(report, tmp_path, pytestconfig):
    command = [sys.executable, "-m", "benchmarks", "report", "--results", str(STORE), "--speed", str(SPEED)]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    subprocess.run([*command, "--output", str(tmp_path)], check=True, env=environment, cwd=pytestconfig.rootpath)
    assert tuple((tmp_path / name).read_text(encoding="utf-8") for name in ("report.html", "report.md")) == report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: None, "holds no run"),
        (lambda e: {**e, "status": "failed", "result": None}, r"no run of runs.jsonl ended well \(1 failed\)"),
        (lambda e: {**e, "schema_version": 99}, "schema version 99"),
        (lambda e: {**e, "result": {**e["result"], "score": float("nan")}}, "1 unusable result"),
        (lambda e: {**e, "spec": {**e["spec"], "budget": {}}}, "line 1: the spec of a run has no budget"),
        (lambda e: [e], "wanted an event"),
    ],
    ids=["empty", "all failed", "newer", "nan", "no budget", "no event"],
)
def test_a_store_that_gives_no_report_is_said_and_nothing_is_written(store, run_of, tmp_path, change, message):
    event = change(run_of("lora", 0, "10"))
    path = store(*([event] if event else []))
    with pytest.raises(SystemExit, match=message) as stopped:
        main(["--results", str(path), "--speed", "--output", str(tmp_path / "report")])
    assert str(stopped.value).startswith("error: ")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"score": float("inf")}, "score is no finite number (inf)"),
        ({"train_time_s": None}, "train_time_s is no finite number (None)"),
        ({"energy_j": "5"}, "energy_j is no finite number ('5')"),
        ({"source_rows": "2"}, "source_rows is no finite number ('2')"),
        ({"correct": "012"}, "correct is not one digit for each of 2 rows"),
        ({"curve": [{"examples": 0, "seconds": None, "score": 0.5}]}, "a point of the curve is not three finite"),
    ],
)
def test_a_result_with_a_bad_number_is_a_failure_with_its_reason(store, run_of, change, problem):
    bad, good = run_of("lora", 0, "10"), run_of("lora", 1, "10")
    bad["result"] |= change
    evidence = read_evidence([store(bad, good)])
    reasons = {run.seed: run.problem for run in evidence.runs}
    assert reasons[0].startswith(problem) and not reasons[1]
    del bad["result"]["score"]
    assert read_evidence([store(bad, good)]).runs[0].problem == "score is missing"


def test_a_missing_file_and_a_broken_speed_line_are_said(store, run_of, tmp_path):
    with pytest.raises(SystemExit, match="no results file"):
        main(["--results", str(tmp_path / "none.jsonl")])
    (tmp_path / "speed.jsonl").write_text('{"method": "stock"\n')
    with pytest.raises(SystemExit, match=r"speed\.jsonl, line 1 is not whole JSON"):
        main(["--results", str(store(run_of("lora", 0, "10"))), "--speed", str(tmp_path / "speed.jsonl")])
    (tmp_path / "speed.jsonl").write_text('{"method": "stock"}\n')
    with pytest.raises(SystemExit, match="line 1 is no row"):
        main(["--results", str(store(run_of("lora", 0, "10"))), "--speed", str(tmp_path / "speed.jsonl")])


def test_the_usable_event_counts_of_one_store_and_of_two(store, run_of):
    failed = {**run_of("lora", 0, "10"), "status": "failed", "result": None, "started_at": "2032"}
    good = run_of("lora", 0, "11")
    other = run_of("lora", 1, "10")
    assert [run.counts for run in read_evidence([store(good, failed, other)]).runs] == [True, True]
    first, second = store(good, other), store(failed, name="later.jsonl")
    for paths in ([first, second], [second, first]):
        assert [run.file for run in read_evidence(paths).runs] == ["runs.jsonl", "runs.jsonl"]


def test_runs_that_differ_in_a_flag_are_rows_of_their_own(store, run_of):
    short, long = (run_of("lora", seed, "10") for seed in (0, 1))
    long["spec"]["arguments"] = {**long["spec"]["arguments"], "num_shots": 4}
    [setting] = settings_of(store(short, long))
    assert [variant.label for variant in setting.variants] == ["LoRA, num_shots=4", "LoRA, num_shots=default"]
    rates = [run_of("lora", 0, "10") for _ in range(3)]
    for rate, event in zip((1e-4, 3e-5, 1e-5), rates, strict=True):
        event["run_id"], event["spec"]["arguments"] = str(rate), {**event["spec"]["arguments"], "learning_rate": rate}
    [setting] = settings_of(store(*rates))
    assert [variant.extras[0][1] for variant in setting.variants] == ["1e-05", "3e-05", "0.0001"]
    long["spec"]["arguments"] = {**short["spec"]["arguments"], "max_eval_samples": 2}
    [setting] = settings_of(store(short, long))
    assert setting.tasks == ("colours, max_eval_samples=2", "colours, max_eval_samples=default")


def test_runs_on_a_gpu_and_of_another_model_are_not_compared_with_the_rest(store, run_of):
    events = [run_of("lora", seed, "10") for seed in range(3)]
    events[1]["env"] = {**events[1]["env"], "device": "cuda"}
    events[2]["spec"]["arguments"] = {**events[2]["spec"]["arguments"], "model_name_or_path": "other"}
    seeds = {
        setting.title: [run.seed for runs in setting.cells.values() for run in runs]
        for setting in settings_of(store(*events))
    }
    assert seeds == {
        "made-up-model on cpu, 80 examples": [0],
        "made-up-model on cuda, 80 examples": [1],
        "other on cpu, 80 examples": [2],
    }


def test_an_init_that_was_tried_in_two_ways_is_compared_with_the_one_random(store, run_of):
    events = [run_of("prompt_tuning", 0, "10", init="RANDOM")]
    for rate in (0.01, 0.03):
        events.append(run_of("prompt_tuning", 0, "11", init="TEXT"))
        events[-1]["run_id"] = str(rate)
        events[-1]["spec"]["arguments"] = {**events[-1]["spec"]["arguments"], "learning_rate": rate}
    [setting] = settings_of(store(*events))
    assert [random_of(setting, variant).init for variant in setting.variants[1:]] == ["RANDOM", "RANDOM"]


def test_times_of_another_machine_are_left_out(store, run_of, tmp_path):
    events = [run_of("lora", seed, "10", train_time_s=10.0 * (seed + 1)) for seed in range(3)]
    events[2]["env"] = {**events[2]["env"], "machine": "a faster one"}
    main(["--results", str(store(*events)), "--speed", "--output", str(tmp_path)])
    found = tables((tmp_path / "report.md").read_text(encoding="utf-8"))
    columns, row = found[EXAMPLES, f"What it costs: colours, {EXAMPLES}"]
    assert row[columns.index("training")] == "15.0 s (2 of 3 runs)"
    assert "Runs are from several machines" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_seeds_whose_model_was_kept_in_another_precision_are_named(store, run_of, tmp_path):
    events = [run_of("lora", seed, "10") for seed in range(3)]
    for seed, held in enumerate((1000, 2000, 2000)):
        events.append(run_of("lora", seed, "10", weights_bytes=held))
        events[-1]["run_id"] += "-nf4"
        events[-1]["spec"]["quantization"] = "nf4"
    events[3]["env"] = {**events[3]["env"], "dtype": "bfloat16"}
    told, path = "not all seeds of these are of one model in memory: ", store(*events)
    main(["--results", str(path), "--speed", "--output", str(tmp_path)])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"{told}LoRA, nf4, colours: 1.0 kB in 1 run, 2.0 kB in 2 runs." in text
    machines = [row[2] for row in tables(text)["", "Environments"][1:]]
    assert machines == ["made up for the tests, none", "made up for the tests, none, bfloat16"]
    main(["--results", str(store(*events[:3], *events[4:])), "--speed", "--output", str(tmp_path)])
    assert told not in (tmp_path / "report.md").read_text(encoding="utf-8")


def pace_row(spec, step_s):
    env = {"machine": "made up for the tests", "capability": "none", "commit": "abc", "dirty": True, "threads": 2}
    env |= {"thread_variables": {"OMP_WAIT_POLICY": "passive"}, "other_cpu_share": 0.12}
    return {"kind": kind_of(spec), "step_s": step_s, "steps_s": [step_s], "factor": 1.0, "error": None, **env}


def test_seconds_of_training_are_steps_at_the_pace_that_was_taken_in_turns(store, run_of, tmp_path):
    """The machine was three times slower in one run: what it took says nothing about the method."""
    curve = [{"examples": n, "seconds": s, "score": 0.5} for n, s in ((0, 0.0), (20, 15.0), (80, 30.0))]
    events = [
        run_of("lora", 0, "10", steps=20, examples_seen=80, tokens_seen=500, train_time_s=30.0, curve=curve),
        run_of("lora", 1, "10", steps=20, examples_seen=80, tokens_seen=500, train_time_s=30.0, curve=curve),
        run_of("prompt_tuning", 0, "10", init="TRANSFER", steps=20, source_time_s=99.0, train_time_s=99.0),
        run_of("full", 0, "10", train_time_s=5.0),
        run_of("lora", 0, "10", task="shapes", train_time_s=10.0),
    ]
    events[1]["result"]["other_cpu_share"] = 0.5
    events[2]["spec"] |= {"source": {"task": "shapes"}, "budget": {"examples": 80}}
    path = store(*events)
    source = source_spec(events[2]["spec"])
    paces = [(events[0]["spec"], 0.4), (events[2]["spec"], 0.3), (source, 0.5)]
    rows = [pace_row(spec, step_s) for spec, step_s in paces]
    rows[1] |= {"steps_s": [0.1, 0.2], "factor": 2.0}
    failed = pace_row(events[3]["spec"], None) | {"steps_s": [], "error": "ValueError: made up"}
    of_seconds = pace_row({**events[0]["spec"], "budget": {"seconds": 30, "steps": 4}}, 0.7)
    rows += [failed, of_seconds]
    pace_path(path).write_text("".join(json.dumps(row) + "\n" for row in [rows[0], *rows]))
    main(["--results", str(path), "--speed", "--output", str(tmp_path)])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    found = tables(text)
    columns, *rows = found[EXAMPLES, f"What it costs: colours, {EXAMPLES}"]
    names = "training", "training of the source", "step", "tokens a second", "inference time, x bare model"
    costs = {row[0]: [row[columns.index(name)] for name in names] for row in rows}
    assert costs["LoRA"][:4] == ["8.00 s", "no source", "0.40 s", "62"]
    assert costs["LoRA"][4].endswith(" (1 of 2 runs)"), "a ratio that was measured is of runs that had the machine"
    assert costs["Prompt tuning, TRANSFER"][:3] == ["6.00 s", "10.0 s", "0.30 s"]
    assert costs["Full fine-tuning"][0] == "not timed in turns"
    seconds = [
        row[2] for row in found[EXAMPLES, f"Numbers of the curves: colours, {EXAMPLES}"][1:] if row[0] == "LoRA"
    ]
    assert seconds[0] == "0.0" and seconds[-1] == "8.0"
    columns, row = found[EXAMPLES, f"What it costs: shapes, {EXAMPLES}"]
    assert row[columns.index("training")] == "10.0 s", "nothing of this task was timed in turns"
    hours = "seconds their means (as measured: the machine may have been slower at one hour than at another)."
    assert hours not in text
    pace_path(path).unlink()
    main(["--results", str(path), "--speed", "--output", str(tmp_path / "without")])
    assert hours in (tmp_path / "without" / "report.md").read_text(encoding="utf-8")
    assert "A machine is not always as fast." in text and f"- {pace_path(path).name}: 6 lines, sha256" in text
    others, of, name = "12 % of the CPU", "80 examples", "runs.pace.jsonl"
    on = "made up for the tests, none, 2 threads, OMP_WAIT_POLICY=passive", "abc with changes"
    assert found["", "Steps timed in turns"][1:] == [
        ["LoRA", "colours", of, "0.40 s", "1", "1.000", others, *on, f"{name}:1"],
        ["Prompt tuning", "colours", of, "0.30 ± 1.27 s", "2", "2.000", others, *on, f"{name}:3"],  # t(1) = 12.7
        ["Prompt tuning", "shapes", of, "0.50 s", "1", "1.000", others, *on, f"{name}:4"],
        ["Full fine-tuning", "colours", of, "failed: ValueError: made up", "0", "1.000", others, *on, f"{name}:5"],
        ["LoRA", "colours", "36 steps", "0.70 s", "1", "1.000", others, *on, f"{name}:6"],
    ]
    assert [row[6] for row in found["", "Runs"][1:] if row[0] == events[1]["run_id"]] == ["30.0 s, disturbed"]


def test_a_line_over_seconds_has_the_pace_too(store, run_of):
    """Half of the time went into the first quarter of the examples, whose batches were the longest."""
    curve = [{"examples": n, "seconds": s, "score": 0.5} for n, s in ((0, 0.0), (20, 15.0), (80, 30.0))]
    event = run_of("lora", 0, "10", steps=20, examples_seen=80, train_time_s=30.0, curve=curve)
    path = store(event)
    pace_path(path).write_text(json.dumps(pace_row(event["spec"], 0.4)) + "\n")
    [line] = _lines(settings_of(path)[0], "colours", "seconds")
    assert line.x == pytest.approx([0.0, 4.0, 8.0])


def test_a_line_over_seconds_begins_with_the_training_of_the_source(store, run_of):
    curve = [{"examples": n, "seconds": float(n), "score": 0.5} for n in (0, 20)]
    event = run_of("prompt_tuning", 0, "10", init="TRANSFER", train_time_s=20.0, source_time_s=12.0, curve=curve)
    event["spec"]["source"] = {"task": "shapes"}
    [setting] = settings_of(store(event))
    assert _lines(setting, "colours", "seconds")[0].x == [12.0, 32.0]
    assert _lines(setting, "colours", "examples")[0].x == [0, 20]


def test_the_pace_of_one_store_says_nothing_of_anothers(store, run_of):
    of_laptop, of_server = run_of("lora", 0, "10", steps=20), run_of("lora", 1, "10", steps=20)
    paths = [store(of_laptop, name="laptop.jsonl"), store(of_server, name="server.jsonl")]
    for path, step_s in zip(paths, (2.0, 0.5), strict=True):
        pace_path(path).write_text(json.dumps(pace_row(of_laptop["spec"], step_s)) + "\n")
    [setting] = settings_of(*paths)
    [variant] = setting.variants
    assert [run.result["train_time_s"] for run in setting.timed("colours", variant)] == [40.0, 10.0]


def test_a_run_that_was_given_other_steps_for_its_seconds_does_not_count(store, run_of):
    """The pace was taken again: what ran before it bought something else."""
    events = [run_of("lora", seed, "10", steps=steps) for seed, steps in ((0, 75), (1, 70))]
    for event in events:
        event["spec"]["budget"] = {"seconds": 30, "steps": event["result"]["steps"]}
    path = store(*events)
    pace_path(path).write_text(json.dumps(pace_row(events[0]["spec"], 0.4)) + "\n")
    right, other = read_evidence([path]).runs
    assert right.counts and not other.counts and other.state == "unusable result"
    assert "'steps': 70}, and 30 seconds are {'seconds': 30, 'steps': 75} by the pace" in other.problem


def test_at_equal_seconds_it_is_said_how_long_each_kind_of_run_took(store, run_of):
    """Their shares are as fair as the pace; one that had the machine with others says nothing of that."""
    events = [run_of("lora", seed, "10", train_time_s=25.0 + 2 * seed) for seed in range(3)]
    events += [
        run_of("prompt_tuning", 0, "10", init=init, train_time_s=s) for init, s in (("TEXT", 30), ("RANDOM", 33))
    ]
    events.append(run_of("full", 0, "10", train_time_s=99.0, other_cpu_share=0.5))
    for event in events:
        event["spec"]["budget"] = {"seconds": 30, "steps": 7}
    [setting] = settings_of(store(*events))
    [warning] = [text for text in _warnings(setting) if "is the same whenever a run is done" in text]
    took = "Prompt tuning 31.5 s (30.0 s to 33.0 s, 2); LoRA 27.0 s (25.0 s to 29.0 s, 3)"
    assert f"As measured undisturbed runs took: {took}. What" in warning


@pytest.mark.parametrize(("budget", "is_said"), [({"examples": 80}, False), ({"seconds": 30, "steps": 75}, True)])
def test_steps_that_were_timed_in_a_run_of_another_length_are_said(store, run_of, budget, is_said):
    event = run_of("lora", 0, "10")
    event["spec"]["budget"] = budget
    path = store(event)
    pace_path(path).write_text(json.dumps(pace_row(event["spec"], 0.4)) + "\n")
    assert ("over the batches of a run of 36 steps" in _batches(settings_of(path)[0])) is is_said


@pytest.mark.parametrize(
    ("shares", "machines", "reason"),
    [
        ((0.5, 0.5), ("a", "a"), "disturbed"),
        ((0.0, 0.0), ("b", "b"), "on another machine"),
        ((0.5, 0.0), ("a", "b"), "disturbed or on another machine"),
    ],
)
def test_a_missing_time_has_its_reason(store, run_of, shares, machines, reason):
    events = [run_of("full", seed, "10") for seed in range(3)]
    for seed, (share, name) in enumerate(zip(shares, machines, strict=True)):
        events.append(run_of("lora", seed, "10", other_cpu_share=share))
        events[-1]["env"] = {**events[-1]["env"], **({} if name == "a" else {"machine": name})}
    [setting] = settings_of(store(*events))
    assert written(setting, "colours", setting.variants[0], TIME) == reason


def test_the_last_row_of_a_curve_has_the_seconds_of_the_end(store, run_of, tmp_path):
    points = [{"examples": n, "seconds": float(n), "score": 0.5} for n in (0, 40, 80)]
    events = [run_of("lora", 0, "10", curve=points), run_of("lora", 1, "10", curve=points[::2], other_cpu_share=0.5)]
    main(["--results", str(store(*events)), "--speed", "--output", str(tmp_path)])
    found = tables((tmp_path / "report.md").read_text(encoding="utf-8"))
    rows = found[EXAMPLES, f"Numbers of the curves: colours, {EXAMPLES}"][1:]
    assert [row[1:3] for row in rows] == [["0", "0.0"], ["80", "80.0"]]


@pytest.mark.parametrize("status", ["started", "failed", "timeout"])
def test_a_rerun_takes_nothing_from_a_result(store, run_of, status):
    again = {**run_of("lora", 0, "10"), "attempt": 2, "status": status, "result": None, "env": None}
    [run] = read_evidence([store(run_of("lora", 0, "10"), again)]).runs
    assert run.counts and run.line == 1
    [run] = read_evidence([store(again, {**run_of("lora", 0, "11"), "attempt": 3})]).runs
    assert run.counts and run.line == 2


def test_of_runs_without_a_result_the_last_that_ended_is_told(store, run_of):
    good = run_of("full", 0, "10")
    attempts = [{**run_of("lora", 0, "10"), "result": None, "env": None, "attempt": number} for number in (1, 2, 3, 4)]
    for event, status in zip(attempts, ("started", "failed", "timeout", "started"), strict=True):
        event["status"] = status
    by_method = {run.spec["method"]: run for run in read_evidence([store(good, *attempts)]).runs}
    assert (by_method["lora"].state, by_method["lora"].line) == ("timeout", 4)


def test_the_command_at_equal_seconds_names_the_steps_that_they_buy(store, run_of):
    event = run_of("prompt_tuning", 0, "10", init="TRANSFER", source_time_s=1.0)
    event["spec"] |= {"budget": {"seconds": 30, "steps": 27, "source_steps": 31}, "source": {"task": "shapes"}}
    [run] = read_evidence([store(event)]).runs
    source, own = command(run).split(" && ")
    assert "--max_steps 31 " in source and "--max_steps 27 " in own


def test_a_store_without_a_usable_run_raises_for_programs_too(store):
    with pytest.raises(EvidenceError, match="holds no run"):
        read_evidence([store()])
    with pytest.raises(EvidenceError, match="no results file was given"):
        read_evidence([])
