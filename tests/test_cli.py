"""The command: help at once and in groups, one-line errors, and a suggestion for what is misspelt."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from peft_prompt_ext import cli
from peft_prompt_ext.tasks import available_tasks
from peft_prompt_ext.training.arguments import DataArguments, MethodArguments, ModelArguments
from peft_prompt_ext.training.command_line import parse
from peft_prompt_ext.training.help import MORE, TRAINING, train_help
from peft_prompt_ext.training.methods import METHODS


ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "peft", "numpy", "datasets")
FLAGS = [field.name for kind in (ModelArguments, DataArguments, MethodArguments) for field in fields(kind)]


def run_alone(*argv):
    """Run the command in a process of its own; its last line names the heavy libraries that it imported."""
    code = (
        "import atexit, sys; from peft_prompt_ext_cli import main\n"
        f"atexit.register(lambda: print('heavy:', [name for name in {HEAVY} if name in sys.modules]))\n"
        f"main({list(argv)!r})"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "train"),
        (["--help"], "assets"),
        (["train"], "--task_name"),
        (["train", "--help"], "--train_file"),
        (["predict", "--help"], "--text"),
        (["memory", "--help"], "--card"),
        (["assets", "--help"], "smollm2-135m"),
        (["export", "--help"], "--format"),
    ],
)
def test_help_imports_nothing_heavy(argv, expected):
    done = run_alone(*argv)

    assert done.returncode == 0, done.stderr
    assert expected in done.stdout and done.stdout.endswith("heavy: []\n")


def test_help_names_every_flag_in_one_group_and_without_hyphen_twins():
    text = train_help()
    titles = re.findall(r"^(\w+):$", text, re.MULTILINE)
    named = re.findall(r"^  (--\w+)", text, re.MULTILINE)

    assert titles == ["Examples", "Start", "Tasks", "Data", "Model", "Method", "More"]
    assert sorted(set(named)) == sorted(named)
    assert {f"--{name}" for name in FLAGS} <= set(named)
    assert not re.search(r"--\w+-\w", text)


def test_help_lists_the_tasks_and_the_learning_rate_of_each_method():
    text = " ".join(train_help().split())

    assert ", ".join(available_tasks()) in text
    for name, method in METHODS.items():
        rate = (
            f"learning rate {method.learning_rate:f}".rstrip("0") if method.learning_rate else "scores the base model"
        )
        assert re.search(rf"{name} {re.escape(method.help)}", text) and rate in text


def test_the_examples_keep_their_line_breaks_and_can_be_parsed():
    examples = train_help().split("Examples:\n")[1].split("\n\n")[0]
    lines = examples.replace("\\\n", "").splitlines()

    assert len(examples.splitlines()) > len(lines) == 4
    for line in lines:
        parse(line.split(" train ")[1].split())


def test_the_flags_of_the_trainer_that_help_names_are_flags_of_the_trainer():
    from transformers import TrainingArguments

    known = {field.name for field in fields(TrainingArguments)} | {"config"}
    named = {name for key in {**TRAINING, **MORE} for name in re.findall(r"(?:^|--)(\w+)", key)}

    assert named <= known


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--num_virtual_token", "--num_virtual_tokens"),
        ("--learning-rat", "--learning_rate"),
        ("--trian_file", "--train_file"),
    ],
)
def test_a_misspelt_flag_is_an_error_that_names_the_nearest(monkeypatch, flag, meant):
    monkeypatch.delenv("PEFT_PROMPT_EXT_DEBUG", raising=False)

    with pytest.raises(
        SystemExit, match=rf"^error: There is no flag {flag.replace('-rat', '_rat')} \(did you mean '{meant}'\?\)"
    ):
        cli.main(["train", "--task_name", "rte", flag, "5"])


def test_a_misspelt_command_is_an_error_that_names_the_nearest():
    with pytest.raises(SystemExit, match=r"There is no command 'trian' \(did you mean 'train'\?\)"):
        cli.main(["trian"])


def test_an_error_is_one_line_and_a_traceback_where_it_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("PEFT_PROMPT_EXT_DEBUG", raising=False)
    with pytest.raises(SystemExit, match=r"^error: .* holds no recipe\.json"):
        cli.main(["predict", str(tmp_path), "--text", "a"])

    monkeypatch.setenv("PEFT_PROMPT_EXT_DEBUG", "1")
    with pytest.raises(ValueError, match=r"holds no recipe\.json"):
        cli.main(["predict", str(tmp_path), "--text", "a"])


def test_assets_without_a_name_are_listed(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PEFT_PROMPT_EXT_CACHE", str(tmp_path))
    (tmp_path / "minilm-l6-0.1.0").mkdir()

    cli.main(["assets"])

    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert "not fetched yet; the Hub's HuggingFaceTB/SmolLM2-135M-Instruct" in lines["smollm2-135m"]
    assert "in the cache" in lines["minilm-l6"]


def test_a_size_that_is_none_is_explained(capsys):
    with pytest.raises(SystemExit):
        cli.main(["memory", "smollm2-135m", "--card", "8 parsecs"])

    assert "A size such as '8GB' or '24GiB' was wanted; got '8 parsecs'." in capsys.readouterr().err
