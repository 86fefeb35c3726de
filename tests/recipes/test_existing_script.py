import ast
import json
import runpy
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast


SCRIPT = Path(__file__).parents[2] / "recipes" / "existing_script.py"
MARK = "# prompt tuning"

pytest.importorskip("datasets")


def ordinary_source():
    return "".join(line for line in SCRIPT.read_text().splitlines(keepends=True) if not line.rstrip().endswith(MARK))


@pytest.fixture
def arguments(tmp_path, build_model, tokenizer_folder):
    """A tiny model's folder, reviews, and an output folder, as the script takes them."""
    model, reviews, output = tmp_path / "model", tmp_path / "reviews.csv", tmp_path / "output"
    build_model("llama").save_pretrained(model)
    PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).save_pretrained(model)
    lines = [f"{'fresh' if i % 2 else 'rotten'},a {'great' if i % 2 else 'terrible'} film {i}" for i in range(1601)]
    reviews.write_text("\n".join(["category,text", "plot,left out", *lines]) + "\n")
    return [str(model), str(reviews), str(output)]


def run(path, arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    return runpy.run_path(str(path))


def test_without_the_marked_lines_nothing_of_peft_or_the_plugin_is_left():
    tree = ast.parse(ordinary_source())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {getattr(node, "module", None) or node.names[0].name for node in imports}

    assert imported == {"sys", "datasets", "transformers"}


def test_the_script_is_short():
    assert len(SCRIPT.read_text().splitlines()) < 50


def test_without_the_marked_lines_it_is_full_fine_tuning(tmp_path, arguments, monkeypatch):
    script = tmp_path / "ordinary.py"
    script.write_text(ordinary_source())

    ran = run(script, arguments, monkeypatch)

    output = Path(arguments[-1])
    assert all(p.requires_grad for p in ran["model"].parameters())
    assert (output / "model.safetensors").is_file() and not (output / "adapter_config.json").exists()


def test_with_the_marked_lines_only_the_prompt_is_trained_and_saved(arguments, monkeypatch):
    ran = run(SCRIPT, arguments, monkeypatch)

    output = Path(arguments[-1])
    trained = [name for name, p in ran["model"].named_parameters() if p.requires_grad]
    losses = [row["loss"] for row in ran["trainer"].state.log_history if "loss" in row]
    assert trained == ["prompt_encoder.default.embedding.weight"]
    assert losses[-1] < losses[0]
    assert (output / "adapter_model.safetensors").is_file() and not (output / "model.safetensors").exists()


def test_one_changed_word_trains_a_prompt_behind_the_text(tmp_path, arguments, monkeypatch):
    source = SCRIPT.read_text()
    script = tmp_path / "behind.py"
    script.write_text(source.replace('"prefix"', '"suffix"').replace("max_steps=100", "max_steps=2"))

    ran = run(script, arguments, monkeypatch)

    record = json.loads((Path(arguments[-1]) / "prompt_init.json").read_text())
    [last] = [row for row in ran["trainer"].state.log_history if "train_loss" in row]
    assert source.count('"prefix"') == 1 and record["prompt_position"] == "suffix"
    assert last["step"] == 2 and last["train_loss"] > 0
