"""Texts that are kept on disk: whole files, of the right model, for the user alone."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch

from peft_prompt_ext import clear_text_cache, cli, engine_status
from peft_prompt_ext.shared_prefix import text_folder
from tests.helpers import one_thread, prompted  # noqa: F401
from tests.peft_models.suffix import make_suffix_batch


BATCH = make_suffix_batch("left")


def keeping(base_model, folder, **changes):
    values = {"prompt_position": "suffix", "train_logits": "supervised", "text_cache": "disk", **changes}
    return prompted(base_model, "CAUSAL_LM", text_cache_dir=str(folder), **values).train()


def run(model, times=1):
    for _ in range(times):
        loss = model(**BATCH).loss
    return loss.detach(), engine_status(model).texts


def files(folder):
    return sorted(folder.glob("*/*"))


def test_a_later_model_finds_the_texts(build_model, tmp_path):
    loss, kept = run(keeping(build_model("llama"), tmp_path))
    assert (kept.hits, kept.misses, len(files(tmp_path))) == (0, 3, 3)
    other, kept = run(keeping(build_model("llama"), tmp_path), times=2)
    assert (kept.hits, len(files(tmp_path))) == (3, 3)
    torch.testing.assert_close(other, loss)
    assert kept.num_bytes == sum(path.stat().st_size for path in files(tmp_path))
    assert kept.place == str(files(tmp_path)[0].parent)
    assert kept.num_bytes > 0


def write_a_weight(model):
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3


def scale_an_attention(model):
    model.get_base_model().model.layers[0].self_attn.scaling *= 1.5


def change_the_config(model):
    model.get_base_model().config.rms_norm_eps = 1e-3


@pytest.mark.parametrize("change", [write_a_weight, scale_an_attention, change_the_config])
def test_another_model_finds_nothing(build_model, tmp_path, change):
    run(keeping(build_model("llama"), tmp_path))
    model = keeping(build_model("llama"), tmp_path)
    change(model)
    run(model)
    assert len({path.parent for path in files(tmp_path)}) == 2
    assert len(files(tmp_path)) == 6


def test_other_precision_and_other_versions_find_nothing(build_model, tmp_path, monkeypatch):
    run(keeping(build_model("llama"), tmp_path))
    with torch.autocast("cpu", torch.bfloat16):
        run(keeping(build_model("llama"), tmp_path))
    monkeypatch.setattr("peft_prompt_ext.shared_prefix.text_state.version", lambda _: "0")
    run(keeping(build_model("llama"), tmp_path))
    assert len({path.parent for path in files(tmp_path)}) == 3


def test_only_the_user_can_read_them(build_model, tmp_path):
    run(keeping(build_model("llama"), tmp_path))
    assert stat.S_IMODE(files(tmp_path)[0].parent.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in files(tmp_path)} == {0o600}


def test_a_broken_file_is_written_again(build_model, tmp_path, caplog):
    loss, _ = run(keeping(build_model("llama"), tmp_path))
    for path, content in zip(files(tmp_path), (b"", b"\0" * 100, files(tmp_path)[2].read_bytes()[:-8]), strict=True):
        path.write_bytes(content)
    again, _ = run(keeping(build_model("llama"), tmp_path), times=2)
    torch.testing.assert_close(again, loss)
    assert "is broken and is written again" in caplog.text
    assert run(keeping(build_model("llama"), tmp_path), times=2)[1].hits == 3


def test_a_full_disk_stops_the_writing_and_not_the_training(build_model, tmp_path, monkeypatch, caplog):
    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(text_folder, "save", fail)
    loss, _ = run(keeping(build_model("llama"), tmp_path), times=2)
    assert files(tmp_path) == []
    assert caplog.text.count("No more texts are kept") == 1
    monkeypatch.undo()
    torch.testing.assert_close(run(keeping(build_model("llama"), tmp_path))[0], loss)


def test_the_part_of_a_dead_process_is_removed(build_model, tmp_path):
    run(keeping(build_model("llama"), tmp_path))
    old, new = (files(tmp_path)[0].parent / f"x.{number}.partial" for number in (1, 2))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    run(keeping(build_model("llama"), tmp_path))
    assert (old.exists(), new.exists()) == (False, True)


def test_a_budget_holds_on_disk(build_model, tmp_path):
    _, kept = run(keeping(build_model("llama"), tmp_path, text_cache_bytes=2500), times=2)
    assert 0 < len(files(tmp_path)) < 3
    assert kept.hits == len(files(tmp_path))


def test_a_budget_is_of_all_models_and_states(build_model, tmp_path):
    one = run(keeping(build_model("llama"), tmp_path, text_cache_bytes=10**6))[1].num_bytes
    for seed in (1, 2, 3):
        run(keeping(build_model("llama", seed=seed), tmp_path, text_cache_bytes=3 * one))
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 4 * one  # with the heads of the files
    assert run(keeping(build_model("llama", seed=3), tmp_path, text_cache_bytes=3 * one), times=2)[1].hits == 3


@pytest.mark.parametrize("place", ["a file", "no permission"])
def test_a_folder_that_cannot_be_used_is_an_error(build_model, tmp_path, place, monkeypatch):
    folder = tmp_path / "kept"
    if place == "a file":
        folder.write_text("")
    else:
        monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="text_cache_dir"):
        run(keeping(build_model("llama"), folder))


def test_they_are_shown_and_deleted(build_model, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.safetensors").write_text("mine")
    run(keeping(build_model("llama"), tmp_path))
    cli.main(["texts", "--folder", str(tmp_path)])
    assert f"{tmp_path}: 3 texts" in capsys.readouterr().out
    cli.main(["texts", "--folder", str(tmp_path), "--clear"])
    assert "deleted" in capsys.readouterr().out
    assert [path.name for path in files(tmp_path)] == ["notes.safetensors"]
    assert clear_text_cache(tmp_path) == 0


def test_texts_that_are_deleted_during_training_are_kept_again(build_model, tmp_path, caplog):
    model = keeping(build_model("llama"), tmp_path)
    loss, _ = run(model)
    assert clear_text_cache(tmp_path) > 0
    assert files(tmp_path) == list(tmp_path.iterdir()) == []
    torch.testing.assert_close(run(model)[0], loss)
    assert len(files(tmp_path)) == 3
    assert "No more texts" not in caplog.text
    test_only_the_user_can_read_them(build_model, tmp_path)


def test_a_text_that_comes_while_others_are_deleted_stays(build_model, tmp_path, monkeypatch):
    run(keeping(build_model("llama"), tmp_path))
    folder, rmdir = files(tmp_path)[0].parent, Path.rmdir

    def write_and_remove(path):
        (path / "new.safetensors").write_bytes(b"new")
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", write_and_remove)
    clear_text_cache(tmp_path)
    assert files(tmp_path) == [folder / "new.safetensors"]
