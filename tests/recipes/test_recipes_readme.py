"""The commands of the recipes' pages and configs are commands, their flags are known, and their files are there."""

import re
import shlex
from pathlib import Path

import pytest

from peft_prompt_ext.cli import COMMANDS, predict_parser
from peft_prompt_ext.tasks.own import own_task
from peft_prompt_ext.training.command_line import parse


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "recipes" / "README.md", ROOT / "peft_prompt_ext" / "training" / "DEFAULTS.md"]
PAGES += sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
FILES = ("--config", "--config_file", "--train_file", "--validation_file")


def commands_of(page):
    """Commands in code blocks, in code inside a sentence, and in the comments of a config."""
    text = page.read_text(encoding="utf-8").replace("\\\n", "")
    lines = [line.lstrip("# ") for line in text.splitlines()] if page.suffix == ".yaml" else []
    code = [*re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE), *re.findall(r"`([^`\n]+)`", text)]
    lines += [line for block in code for line in block.splitlines()]
    return [line for line in lines if re.match(r"(peft-prompt-ext|python|accelerate launch) .*--\w", line)]


COMMAND_LINES = [(page, line) for page in PAGES for line in commands_of(page)]


def test_commands_are_found_on_every_page():
    assert {page for page, _ in COMMAND_LINES} == set(PAGES)
    assert len(COMMAND_LINES) >= 10


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES, ids=[f"{p.name}-{line}" for p, line in COMMAND_LINES])
def test_a_command_can_be_run_as_written(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    for flag in set(FILES) & set(words):
        assert Path(words[words.index(flag) + 1]).is_file()
    scripts = {word for word in words if word.startswith("recipes/") and word.endswith(".py")}
    assert all(Path(script).is_file() for script in scripts)
    name = next(word for word in words if word in COMMANDS or word in {f"recipes/{name}.py" for name in COMMANDS})
    arguments = words[words.index(name) + 1 :]

    if name.removeprefix("recipes/").removesuffix(".py") == "predict":
        predict_parser().parse_args(arguments)
    elif arguments != ["--help"]:
        parse(arguments)


def test_the_rows_of_the_readme_are_those_of_its_file():
    shown = re.search(r"```\n(message,team\n.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL).group(1)
    path = ROOT / "recipes" / "data" / "tickets.csv"

    assert path.read_text(encoding="utf-8").startswith(shown)
    assert own_task(str(path), ["message"], "team").label_names == ("billing", "returns", "shipping")


def test_the_readme_is_short():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 90
