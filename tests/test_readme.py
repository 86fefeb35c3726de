import re
import runpy
from pathlib import Path

import pytest
from peft import PeftModel


README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run_snippet(part, tmp_path, **names):
    """Run the one Python snippet of the README that contains `part`."""
    (snippet,) = [s for s in SNIPPETS if part in s]
    path = tmp_path / "snippet.py"
    path.write_text(snippet)
    return runpy.run_path(str(path), init_globals=names)


@pytest.fixture
def model(build_model, tokenizer_folder):
    model = build_model("llama")
    model.name_or_path = tokenizer_folder  # where the tokenizer is found
    return model


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_the_first_snippet_makes_a_prompt_and_the_saving_snippet_loads_it(model, build_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    prompted = run_snippet("config = PromptTuningExtConfig(", tmp_path, model=model)["model"]
    run_snippet("save_pretrained", tmp_path, model=prompted, base_model=build_model("llama"), PeftModel=PeftModel)

    assert (tmp_path / "my-prompt" / "prompt_init.json").is_file()


def test_the_own_scheme_snippet_works(model, tmp_path):
    from peft import get_peft_model

    from peft_prompt_ext import PromptTuningExtConfig
    from peft_prompt_ext.inits.base import SCHEMES

    run_snippet("register_init", tmp_path)
    try:
        config = PromptTuningExtConfig(
            task_type="CAUSAL_LM", prompt_tuning_init="first_words", prompt_tuning_init_kwargs={"start": 5}
        )
        prompt = get_peft_model(model, config).prompt_encoder["default"].embedding.weight
    finally:
        del SCHEMES["FIRST_WORDS"]

    assert (prompt[0] == model.get_input_embeddings().weight[5]).all()


def test_every_file_named_in_the_house_exists():
    house = README.split("## The house")[1].split("```")[1]
    root, folder = Path(__file__).parent.parent, Path()
    names = []
    for line in house.strip().splitlines():
        name = line.split()[0]
        path = folder / name if line.startswith("  ") else Path(name)
        folder = Path() / name if not line.startswith("  ") else folder
        names.append(path)

    assert len(names) > 5
    assert [str(p) for p in names if not (root / p).exists()] == []


@pytest.mark.real
def test_the_4_bit_snippet_gives_a_packed_model(smollm2, tmp_path, monkeypatch):
    import peft_prompt_ext

    load = peft_prompt_ext.load_frozen_backbone
    monkeypatch.setattr(peft_prompt_ext, "load_frozen_backbone", lambda name, **kwargs: load(smollm2, **kwargs))

    model = run_snippet("load_frozen_backbone(", tmp_path)["model"]

    assert peft_prompt_ext.engine_status(model).packed
    assert model.get_memory_footprint() < 200e6
