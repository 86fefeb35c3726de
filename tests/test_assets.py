"""The embedded defaults: pip really runs, on a tiny wheel in a folder, with no registry to be reached."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from peft_prompt_ext import assets


# Loads the module alone, so that a process starts in no time and shows what the module itself imports.
PRELUDE = f"""
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("assets", {assets.__file__!r})
assets = sys.modules["assets"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(assets)
"""


def run_alone(code, asset=None):
    if asset is not None:
        code = f"Asset = assets.Asset\nassets.ASSETS['tiny'] = {asset!r}\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def links(tmp_path, monkeypatch):
    """The folder pip takes wheels from, and nowhere else."""
    folder = tmp_path / "links"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PEFT_PROMPT_EXT_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def tiny(links, monkeypatch):
    """A known asset `tiny`, whose wheel needs another package that does not exist."""
    info = "tiny_asset-1.2.dist-info"
    members = {
        "tiny_asset/code.py": "raise SystemExit",
        "tiny_asset/model/config.json": "{}",
        "tiny_asset/model/deep/vocab.txt": "a",
        "tiny_asset/model/deep/vocab.txt.py": "raise SystemExit",
        "tiny_asset/model_notes.txt": "not below model/",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.2\nRequires-Dist: not-there>=3\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    wheel = links / "tiny_asset-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    asset = assets.Asset(
        requirement="tiny-asset==1.2",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_asset/model",
        kind="folder",
        hub_id="someone/tiny",
    )
    monkeypatch.setitem(assets.ASSETS, "tiny", asset)
    return asset


MODEL_FILES = ["config.json", "deep/vocab.txt", "deep/vocab.txt.py"]


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def assert_nothing_made():
    left = [path.name for path in assets.cache_dir().iterdir() if path.suffix != ".lock"]
    assert left == []


def test_only_the_wanted_files_are_unpacked(tiny):
    folder = assets.asset_path("tiny")
    assert folder == assets.cache_dir() / "tiny-1.2"
    assert files(folder) == MODEL_FILES
    assert [path.name for path in assets.cache_dir().iterdir() if path.is_dir()] == ["tiny-1.2"]


def test_a_single_file(tiny, monkeypatch):
    monkeypatch.setitem(assets.ASSETS, "tiny", replace(tiny, member="tiny_asset/model/deep/vocab.txt", kind="file"))
    assert assets.asset_path("tiny").read_text() == "a"
    assert files(assets.cache_dir() / "tiny-1.2") == ["vocab.txt"]


def test_the_second_call_runs_no_pip_and_writes_nothing(tiny, monkeypatch):
    first = assets.asset_path("tiny")
    lock = assets.cache_dir() / "tiny-1.2.lock"
    lock.unlink(missing_ok=True)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("pip was run again"))
    assert assets.asset_path("tiny") == first
    assert not lock.exists()


def test_a_changed_pin_builds_anew(tiny, monkeypatch):
    assets.asset_path("tiny")
    monkeypatch.setitem(assets.ASSETS, "tiny", replace(tiny, requirement="tiny-asset==1.3"))
    with pytest.raises(assets.AssetError, match=r"tiny-asset==1\.3"):
        assets.asset_path("tiny")


def test_a_wrong_hash_is_refused(tiny, monkeypatch):
    pin = "0" * 64
    monkeypatch.setitem(assets.ASSETS, "tiny", replace(tiny, sha256=pin))
    with pytest.raises(assets.AssetError, match="not the pinned one") as caught:
        assets.asset_path("tiny")
    assert f"tiny-asset==1.2 (sha256 {pin})" in str(caught.value)
    assert tiny.sha256 in str(caught.value)  # what came, in pip's own words
    assert_nothing_made()


def test_without_a_registry_one_clear_error(tiny, links, capfd):
    next(links.glob("*.whl")).unlink()
    with pytest.raises(assets.AssetError) as caught:
        assets.asset_path("tiny")
    message = str(caught.value)
    assert "tiny-asset==1.2" in message
    assert "could not be reached" in message
    assert "No matching distribution found" in message  # pip's own words
    assert "PIP_FIND_LINKS" in message and "someone/tiny" in message
    assert_nothing_made()
    out, err = capfd.readouterr()
    assert out == ""
    assert "Looking in links" in err and "ERROR" in err  # a person sees what pip does


def test_without_pip(tiny, tmp_path, monkeypatch):
    # a Python whose pip cannot be found: the folder of the script comes first on its path
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E -I "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(assets.AssetError, match="has no pip") as caught:
        assets.asset_path("tiny")
    assert f"{bare} -m ensurepip" in str(caught.value)


def test_a_cache_that_cannot_be_written(tiny, tmp_path, monkeypatch):
    (tmp_path / "plain file").touch()
    monkeypatch.setenv("PEFT_PROMPT_EXT_CACHE", str(tmp_path / "plain file"))
    with pytest.raises(assets.AssetError, match="set PEFT_PROMPT_EXT_CACHE to a folder that can be written"):
        assets.asset_path("tiny")


@pytest.mark.parametrize(
    ("raised", "seen"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space"), assets.AssetError)]
)
def test_an_interrupted_build_leaves_nothing(tiny, monkeypatch, raised, seen):
    def half_way(archive, path, members):
        for name in members[:1]:
            archive.extract(name, path)
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", half_way)
        with pytest.raises(seen):
            assets.asset_path("tiny")
    assert_nothing_made()
    assert files(assets.asset_path("tiny")) == MODEL_FILES


def test_a_killed_build_is_cleaned_up_by_the_next(tiny):
    kill = """
def extract_one_and_die(archive, path, members):
    archive.extract(members[0], path)
    os.kill(os.getpid(), signal.SIGKILL)
assets.zipfile.ZipFile.extractall = extract_one_and_die
assets.asset_path("tiny")
"""
    process = run_alone(kill, tiny)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    partial = assets.cache_dir() / "tiny-1.2.partial"
    (partial / "unpacked/tiny_asset/model/stale.json").write_text("{}")  # fails if the kill left nothing
    assert not (assets.cache_dir() / "tiny-1.2").exists()

    assert files(assets.asset_path("tiny")) == MODEL_FILES
    assert not partial.exists()


def test_two_processes_build_once(tiny):
    both = [run_alone("print(assets.asset_path('tiny'))", tiny) for _ in range(2)]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert {out.strip() for out, _ in said} == {str(assets.cache_dir() / "tiny-1.2")}
    assert sum(err.count("Successfully downloaded") for _, err in said) == 1


def test_gguf_without_its_package(tiny, links, monkeypatch):
    next(links.glob("*.whl")).unlink()  # the error must come before the download
    monkeypatch.setitem(assets.ASSETS, "tiny", replace(tiny, kind="gguf"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'peft-prompt-ext\[assets\]'"):
        assets.asset_path("tiny")


def test_resolve_knows_assets_and_leaves_the_rest_alone(tiny, tmp_path):
    assert assets.resolve("tiny") == str(assets.cache_dir() / "tiny-1.2")
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "gpt2", str(tmp_path), "./tiny"):
        assert assets.resolve(name) == name


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"'smolm2'.*did you mean 'smollm2-135m'\?.*minilm-l6, movie-reviews"):
        assets.asset_path("smolm2")


def test_the_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_PROMPT_EXT_CACHE", str(tmp_path))
    assert assets.cache_dir() == tmp_path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFT_PROMPT_EXT_CACHE", "near")
    assert assets.cache_dir() == tmp_path / "near"
    monkeypatch.delenv("PEFT_PROMPT_EXT_CACHE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    assert assets.cache_dir() == tmp_path / "hf/peft_prompt_ext"


def test_the_command_prints_paths_alone_on_stdout(tiny, capfd):
    assets.main(["tiny", "tiny"])
    out, err = capfd.readouterr()
    assert out.splitlines() == [str(assets.cache_dir() / "tiny-1.2")] * 2
    assert "Successfully downloaded tiny-asset" in err


def test_the_command_reports_an_error_in_one_line(capfd):
    with pytest.raises(SystemExit) as caught:
        assets.main(["tinny"])
    out, err = capfd.readouterr()
    assert caught.value.code == 1 and out == ""
    assert err.startswith("error: There is no embedded asset 'tinny'") and len(err.splitlines()) == 1


def test_help_imports_nothing_heavy():
    heavy = ("torch", "transformers", "peft", "huggingface_hub", "gguf", "filelock")
    process = run_alone(f"""
import atexit
atexit.register(lambda: print("heavy:", [m for m in {heavy} if m in sys.modules]))
assets.main(["--help"])
""")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "smollm2-135m" in out and out.endswith("heavy: []\n")


@pytest.mark.parametrize("name", ["smollm2-135m", "minilm-l6", "movie-reviews"])
def test_the_pins_are_whole(name):
    asset = assets.ASSETS[name]
    package, _, version = asset.requirement.partition("==")
    assert package and version and len(bytes.fromhex(asset.sha256)) == 32


@pytest.mark.real
def test_the_converted_model_is_a_plain_folder(smollm2):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert "quantization_config" not in json.loads(Path(smollm2, "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert getattr(model, "hf_quantizer", None) is None
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**prompt).logits[0, -1].argmax()) == " Paris"


def test_a_model_is_named_as_the_hub_does(tmp_path):
    assert assets.hub_id("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert assets.hub_id("someone/tiny") == "someone/tiny"
    assert assets.hub_id(str(tmp_path)) is assets.hub_id("tiny.gguf") is None
    assert assets.ASSETS["minilm-l6"].instead.startswith("the Hub's sentence-transformers/")
    assert assets.ASSETS["movie-reviews"].instead == "data of your own"
