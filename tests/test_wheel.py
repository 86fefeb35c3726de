"""The built wheel alone, in an empty environment outside the clone: the command trains, answers, and counts memory."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
OWN = ROOT / "tests" / "data" / "own"
MODULES = {".".join(path.relative_to(ROOT).parts) for path in ROOT.glob("peft_prompt_ext/**/*.py")}


def run(*command, folder, **environment):
    """Run a command without the clone on its path; fails with what it said."""
    inherited = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the sources, so that no build folder is left in the clone."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "peft_prompt_ext_cli.py"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "peft_prompt_ext", source / "peft_prompt_ext", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source, folder=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}

    modules = {name.replace("/", ".") for name in names if name.endswith(".py")}
    assert modules == MODULES | {"peft_prompt_ext_cli.py"}
    assert {name.split("/")[0] for name in names} == {"peft_prompt_ext", "peft_prompt_ext_cli.py"}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The command of an empty environment with the wheel and its extra."""
    folder = tmp_path_factory.mktemp("outside")
    venv.create(folder / "venv", with_pip=True)
    python, constraints = folder / "venv" / "bin" / "python", ROOT / "constraints.txt"
    pip = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", constraints)
    run(*pip, "torch", folder=folder)  # first and alone: then no other package asks for a CUDA build
    run(*pip, f"{wheel}[recipes]", folder=folder)
    assert run(python, "-c", "import peft_prompt_ext as p; print(p.__file__)", folder=folder).startswith(str(folder))
    return folder / "venv" / "bin" / "peft-prompt-ext"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_command_works_outside_the_clone(installed, tmp_path):
    shutil.copy(OWN / "train.csv", tmp_path / "tickets.csv")

    (model,) = run(installed, "assets", "smollm2-135m", folder=tmp_path).splitlines()
    assert Path(model, "config.json").is_file()
    flags = "--train_file tickets.csv --text_columns message --label_column team --held_out_samples 4 --max_steps 2"
    flags += " --per_device_train_batch_size 2 --output_dir tickets --use_cpu true"
    run(installed, "train", *flags.split(), folder=tmp_path, HF_HUB_OFFLINE="1")
    scores = json.loads((tmp_path / "tickets" / "all_results.json").read_text())
    assert scores["train_steps"] == 2 and scores["eval_samples"] == 4
    text = run(
        *(installed, "predict", "tickets", "--text", "my parcel never came", "--device", "cpu"),
        folder=tmp_path,
        HF_HUB_OFFLINE="1",
        PIP_NO_INDEX="1",
    )
    assert json.loads(text)["label"] in {"billing", "returns", "shipping"}
    table = run(installed, "memory", "smollm2-135m", "--tokens", "16", "--batch", "2", folder=tmp_path, COLUMNS="120")
    assert "prompt tuning, nf4" in table and "GB" in table
