"""Which method to take, from a made-up store."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from tests.benchmarks.events import event, grid, spec, step_times, write


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    """Prints the advice; returns its lines."""
    from benchmarks.report import command

    times = write(tmp_path / "step_times.jsonl", step_times())
    read = command.read
    monkeypatch.setattr(command, "read", lambda results: read(results, [times]))

    def run(*arguments, events=None):
        path = write(tmp_path / "runs.jsonl", list(grid()) if events is None else events)
        main(["recommend", "--results", str(path), *arguments])
        return capsys.readouterr().out.splitlines()

    return run


def test_the_answer_is_first_what_it_speaks_of_second_and_ties_say_why(ask):
    lines = ask("--tasks", "2")
    assert lines[0].startswith("Take prompt tuning, TEXT: ") and "46 kB stored for a task" in lines[0]
    assert lines[1].startswith("Speaks of tiny on a CPU (2 cores AVX2), 40 examples (10 steps of 4), seeds 0, 1, 2;")
    said = {line.split(":")[0]: line for line in lines[2:]}
    assert "tied; not picked because it takes more time" in said["full fine-tuning"]
    assert "tied; not picked because it takes more storage" in said["LoRA"]
    assert "clearly behind" in said["zero-shot"] or "probably behind" in said["zero-shot"]
    assert len(lines) <= 10 and not any("rte" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "pick"),
    [
        ([], "LoRA"),  # of one task
        (["--prefer", "storage"], "prompt tuning, TEXT"),
        (["--memory", "538.5MB"], "zero-shot"),
        (["--storage", "0.6GB", "--tasks", "50"], "prompt tuning, TEXT"),
        (["--task", "cb"], "LoRA"),
    ],
)
def test_needs_decide(ask, arguments, pick):
    assert ask(*arguments)[0].startswith(f"Take {pick}: ")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--memory", "1MB"], "LoRA: needs 539 MB of memory."),
        (["--storage", "1MB"], "LoRA: needs 540 MB of storage."),
        (["--least_score", "1"], "LoRA: scores "),
        (["--task", "rte"], "beats the majority class on rte with this model; take a larger model."),
    ],
)
def test_where_nothing_fits_each_method_says_why_and_the_status_is_1(ask, capsys, arguments, reason):
    with pytest.raises(SystemExit) as end:
        ask(*arguments)
    out = capsys.readouterr().out
    assert end.value.code == 1 and out.startswith(("Nothing fits.\nSpeaks of tiny", "No method")) and reason in out


def test_a_task_at_the_majority_is_said_and_an_unknown_one_suggests_another(ask):
    assert "No method clearly beats the majority class on rte with this model." in ask("--task", "rte", "sst2")
    with pytest.raises(SystemExit, match=r"'sst3'.*did you mean 'sst2'"):
        ask("--task", "sst3")


def test_a_method_with_too_few_seeds_is_not_picked(ask):
    events = [*grid(), event(spec("sst2", "prompt_tuning", 0, "RANDOM"), right=1.0)]
    lines = ask("--task", "sst2", "--prefer", "score", events=events)
    assert "prompt tuning, RANDOM: only 1 seeds." in lines and "RANDOM" not in lines[0]


@pytest.mark.parametrize("arguments", [["--memory", "big"], ["--tasks", "0"], ["--least_score", "nan"]])
def test_a_value_that_makes_no_sense_is_an_error(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["recommend", *arguments])
    assert "wanted" in capsys.readouterr().err


def test_a_reader_that_stops_early_sees_no_traceback(tmp_path):
    path = write(tmp_path / "runs.jsonl", grid())
    code = f"import sys, benchmarks.recommend as r; sys.stdin.readline(); r.main(['--results', {str(path)!r}])"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2], **pipes)
    process.stdout.close()  # as head does when it has enough
    _, said = process.communicate(b"\n")
    assert (process.returncode, said) == (0, b"")
