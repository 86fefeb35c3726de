import tomllib
from pathlib import Path

import pytest

from peft_prompt_ext._versions import SUPPORTED, check_versions


def test_the_ranges_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]

    assert SUPPORTED
    for name, (first, end) in SUPPORTED.items():
        assert f"{name}>={first},<{end}" in project["dependencies"]


def test_the_installed_versions_are_supported():
    check_versions()


@pytest.mark.parametrize(("first", "end"), [("0.1", "0.2"), ("99", "100")])
def test_a_version_outside_the_range_is_one_clear_error(first, end):
    with pytest.raises(ImportError, match=rf"supports peft>={first},<{end}, but peft 0\.\S+ is installed. Run: pip"):
        check_versions({"peft": (first, end)})


def test_a_development_version_counts_as_its_release(monkeypatch):
    monkeypatch.setattr("peft_prompt_ext._versions.version", lambda name: "0.21.3.dev0+local")

    check_versions({"peft": ("0.21", "0.22")})


@pytest.mark.parametrize(
    ("found", "works"), [("0.20.9", 0), ("0.21", 1), ("0.21.99", 1), ("0.22", 0), ("0.22.dev0", 0)]
)
def test_the_first_version_is_inside_and_the_last_is_not(monkeypatch, found, works):
    monkeypatch.setattr("peft_prompt_ext._versions.version", lambda name: found)

    if works:
        check_versions({"peft": ("0.21", "0.22")})
    else:
        with pytest.raises(ImportError, match=f"but peft {found} is installed"):
            check_versions({"peft": ("0.21", "0.22")})
