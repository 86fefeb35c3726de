"""The command for a machine with a GPU: walked whole on a CPU, and what has to be carried to such a machine."""

import io
import json
import os
import subprocess
import sys
import zipfile

import pytest

from benchmarks.gpu import carry
from benchmarks.gpu import command as gpu


PARTS = ["machine_row", "engine_tests", "speed_rows", "attention_rows", "mixed_rows", "real_rows"]


def test_a_dry_run_walks_every_part_and_writes_each_line(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    gpu.main(["--dry-run", "--steps", "1", "--turns", "1", "--output", str(tmp_path)])

    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    parts = [row["part"] for row in rows if "part_time_s" in row]
    assert parts == PARTS
    tests = next(row for row in rows if row["part"] == "engine_tests")
    assert (tests["exit_code"], tests["failed"]) == (0, [])
    failed = {row["attention"] for row in rows if "error" in row}
    assert failed <= {"varlen", "flex"}  # those are a GPU's
    steps = [row for row in rows if row["part"] == "speed_rows" and "step_time_s" in row and "error" not in row]
    assert {row["method"] for row in steps} == {
        *("stock", "packed", "suffix", "suffix_kept", "lora", "lora_last", "full", "floor")
    }
    assert {(row["model"], row["precision"], row["text"]) for row in steps} == {
        (model, precision, text)
        for model in gpu.MODELS
        for precision in ("bfloat16", "nf4")
        for text in ("short", "long")
    }
    assert all(len(row["step_time_s"]) == 1 and row["peak_memory_bytes"] > 0 for row in steps)
    mixed = [row for row in rows if row["part"] == "mixed_rows" and "mixed_time_s" in row]
    assert mixed and all(row["largest_difference"] < 0.5 for row in mixed)
    assert "random-llama-8b, nf4, long rows" in capsys.readouterr().out


def test_what_fails_or_has_no_time_left_is_a_line_and_nothing_is_lost(tmp_path):
    report = gpu.Report(tmp_path / "gpu.jsonl", seconds=3600)
    options = gpu._options([])

    def broken(_options):
        yield {"number": 1}
        raise RuntimeError("no kernel")

    report.run(broken, options)
    report._end = 0
    report.run(broken, options)

    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert rows[0] == {"part": "broken", "number": 1}
    assert rows[1] == {"part": "broken", "error": "RuntimeError: no kernel"}
    assert rows[-1] == {"part": "broken", "error": "no time was left"}


def test_each_line_is_there_before_the_next_is_known(tmp_path, monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed))
    report = gpu.Report(tmp_path / "gpu.jsonl", seconds=3600)

    def part(_options):
        yield {"number": 1}
        line = b'{"part": "part", "number": 1}\n'
        assert (tmp_path / "gpu.jsonl").read_bytes() == printed.getvalue() == line
        report._end = 0
        yield {"number": 2}
        yield {"number": 3}

    report.run(part, gpu._options([]))

    assert [row.get("number") for row in report.rows] == [1, 2, None, None]
    assert report.rows[2] == {"part": "part", "error": "the time was over before its end"}


def test_parts_know_their_minutes_and_find_what_was_carried(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(carry, "unpack", seen.append)

    def part(options):
        seen.append(options.seconds_left)
        yield from ()

    for name in PARTS:
        monkeypatch.setattr(gpu, name, part)
    gpu.main(["--minutes", "2", "--carried", str(tmp_path), "--output", str(tmp_path)])

    assert seen[0] == tmp_path and len(seen) == 1 + len(PARTS)
    assert 120 >= seen[1] >= seen[-1] > 60


def test_what_is_prepared_is_listed_and_nothing_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "file").write_bytes(bytes(2**20))
    monkeypatch.setattr(carry, "prepare", lambda folder: folder.iterdir())

    gpu.main(["--prepare", str(tmp_path), "--output", str(tmp_path / "output")])

    assert capsys.readouterr().out == f"{tmp_path / 'part'}: 1.0 MiB\n" and not (tmp_path / "output").exists()


def test_tests_that_take_too_long_are_ended(tmp_path):
    options = gpu._options(["--dry-run", "--output", str(tmp_path)])
    options.seconds_left = 0

    (row,) = gpu.engine_tests(options)

    assert row["exit_code"] is None and "collected" not in row["summary"]


def test_what_is_carried_arrives_whole(tmp_path, monkeypatch):
    """A library and an asset, in parts of 100 bytes, as another process sees them."""
    monkeypatch.setattr(carry, "PART_BYTES", 100)
    for kind, name in (("libraries", "carried-1-py3-none-any.whl"), ("assets", "data-1-py3-none-any.whl")):
        wheel = tmp_path / "wheels" / kind / name
        wheel.parent.mkdir(parents=True)
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("carried_module.py", "ANSWER = 42\n")
    wheels = sorted((tmp_path / "wheels").glob("*/*.whl"))
    sizes = {wheel.name: wheel.read_bytes() for wheel in wheels}
    parts = carry._split(wheels, tmp_path)
    assert len(parts) > 1
    assert all(sum(file.stat().st_size for file in part.iterdir()) <= 100 for part in parts)
    together = tmp_path / "together"
    together.mkdir()
    for part in parts:
        for file in part.iterdir():
            file.rename(together / file.name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(os, "environ", dict(os.environ))

    carry.unpack(together)

    code = "import carried_module; print(carried_module.ANSWER)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert ran.stdout == "42\n", ran.stderr
    asset = "data-1-py3-none-any.whl"
    assert (together / "assets" / asset).read_bytes() == sizes[asset]
    assert os.environ["PIP_FIND_LINKS"] == str(together / "assets")


def test_of_bitsandbytes_one_compiled_library_is_carried(tmp_path):
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("__init__.py", "libbitsandbytes_cuda118.so", carry.CUDA_LIBRARY, "libbitsandbytes_cpu.so"):
            archive.writestr(f"bitsandbytes/{name}", name)

    carry._leave_out_other_devices(wheel)

    assert zipfile.ZipFile(wheel).namelist() == ["bitsandbytes/__init__.py", f"bitsandbytes/{carry.CUDA_LIBRARY}"]
    assert [file.name for file in tmp_path.iterdir()] == [wheel.name]


@pytest.mark.parametrize("length", [(2, 5), (7, 7)])
def test_random_rows_have_the_wanted_lengths_and_one_answer(length):
    batch = gpu.random_batch(length, 23, 100, seed=0)
    lengths = batch["attention_mask"].sum(1)
    assert lengths.min() >= length[0] and lengths.max() <= length[1]
    for ids, labels, end in zip(batch["input_ids"], batch["labels"], lengths, strict=True):
        assert labels[end - 1] == ids[end - 1]
        assert (labels != -100).sum() == 1
