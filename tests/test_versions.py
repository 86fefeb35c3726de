import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

from peft_prompt_ext._versions import SUPPORTED, check_versions


ROOT = Path(__file__).parent.parent


def pinned(name):
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_the_ranges_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert SUPPORTED
    for name, (first, end) in SUPPORTED.items():
        assert f"{name}>={first},<{end}" in project["dependencies"]


def test_the_oldest_pins_begin_the_ranges_and_the_others_lie_in_them_one_after_the_other():
    oldest, usual, newest = map(pinned, ("constraints-oldest.txt", "constraints.txt", "constraints-newest.txt"))

    assert oldest.keys() == newest.keys() == SUPPORTED.keys()
    for name, (first, end) in SUPPORTED.items():
        assert Version(oldest[name]) == Version(first)
        assert Version(first) <= Version(usual[name]) <= Version(newest[name]) < Version(end)


def test_the_readme_names_the_ranges_and_the_newest_versions():
    text = " ".join((ROOT / "README.md").read_text().split())

    assert "; ".join(f"{name} >= {first}, < {end}" for name, (first, end) in SUPPORTED.items()) in text
    for name, version in pinned("constraints-newest.txt").items():
        assert f"{name} {version}" in text


def test_all_that_is_outside_is_named_at_once(monkeypatch):
    monkeypatch.setattr(
        "peft_prompt_ext._versions.version", {"peft": "0.19.1", "torch": "2.13", "transformers": "6"}.get
    )

    with pytest.raises(ImportError) as raised:
        check_versions({"peft": ("0.20", "0.22"), "torch": ("2.11", "3"), "transformers": ("5.17", "6")})

    assert str(raised.value) == (
        "peft_prompt_ext supports peft>=0.20,<0.22 and transformers>=5.17,<6, but peft 0.19.1 and transformers 6 is "
        "installed. Run: pip install 'peft>=0.20,<0.22' 'transformers>=5.17,<6'"
    )


def test_the_installed_versions_are_supported():
    assert check_versions() is None


@pytest.mark.parametrize(("first", "end"), [("0.1", "0.2"), ("99", "100")])
def test_a_version_outside_the_range_is_one_clear_error(first, end):
    with pytest.raises(ImportError, match=rf"supports peft>={first},<{end}, but peft 0\.\S+ is installed. Run: pip"):
        check_versions({"peft": (first, end)})


def test_a_development_version_counts_as_its_release(monkeypatch):
    monkeypatch.setattr("peft_prompt_ext._versions.version", lambda name: "0.21.3.dev0+local")

    assert check_versions({"peft": ("0.21", "0.22")}) is None


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
