"""The READMEs' code runs as written, their commands exist, and the files that they name are there."""

import re
import runpy
from pathlib import Path

import pytest
from peft import PeftModel


ROOT = Path(__file__).parent.parent
FOLDERS = ("peft_prompt_ext", "recipes", "benchmarks")


def snippets(readme):
    return re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text(), re.DOTALL)


def run_snippet(readme, part, tmp_path, **names):
    """Run the one Python snippet of a README that contains `part`."""
    (snippet,) = [s for s in snippets(readme) if part in s]
    path = tmp_path / "snippet.py"
    path.write_text(snippet.replace("max_steps=70", "max_steps=2"))
    return runpy.run_path(str(path), init_globals=names)


@pytest.mark.real
@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_the_script_runs_and_what_it_saves_is_loaded_by_the_next_snippet(
    smollm2, movie_reviews, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)

    names = run_snippet("README.md", "Trainer(", tmp_path)
    base = names["AutoModelForCausalLM"].from_pretrained(smollm2)
    run_snippet("README.md", "is_trainable=True", tmp_path, model=names["model"], base_model=base, PeftModel=PeftModel)

    files = {path.name: path.stat().st_size for path in (tmp_path / "my-prompt").iterdir() if path.is_file()}
    assert 40_000 < files["adapter_model.safetensors"] < 50_000


def test_the_own_scheme_snippet_works(build_model, tokenizer_folder, tmp_path):
    from peft import get_peft_model

    from peft_prompt_ext import PromptTuningExtConfig
    from peft_prompt_ext.inits.base import SCHEMES

    model = build_model("llama")
    model.name_or_path = tokenizer_folder  # where the tokenizer is found
    run_snippet("peft_prompt_ext/inits/README.md", "register_init", tmp_path)
    try:
        config = PromptTuningExtConfig(
            task_type="CAUSAL_LM", prompt_tuning_init="first_words", prompt_tuning_init_kwargs={"start": 5}
        )
        prompt = get_peft_model(model, config).prompt_encoder["default"].embedding.weight
    finally:
        del SCHEMES["FIRST_WORDS"]

    assert (prompt[0] == model.get_input_embeddings().weight[5]).all()


def test_every_file_named_in_the_readme_exists():
    house = (ROOT / "README.md").read_text().split("## Where the rest is")[1].split("```")[1]
    names, folder = [], ROOT
    for line in house.strip().splitlines():
        folder = folder if line.startswith("  ") else ROOT / line.split()[0]
        files = re.findall(r"[\w/]+(?:\.py|/)", line.split("   ")[0]) if line.startswith("  ") else ["."]
        names += [folder / file for file in files]

    assert len(names) > 15
    assert [str(path) for path in names if not path.exists()] == []


PAGES = [*ROOT.glob("*.md"), *(page for name in FOLDERS for page in (ROOT / name).rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text())

    assert [link for link in links if not (page.parent / link).exists()] == []
