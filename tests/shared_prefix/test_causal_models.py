"""Every causal language model of transformers, built tiny, is right or refused with a reason."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model

from peft_prompt_ext import PromptTuningExtConfig
from tests.helpers import one_thread, prompt_of  # noqa: F401
from tests.peft_models.suffix import make_suffix_batch, run_alone
from tests.shared_prefix.causal_models import BATCHES, MODEL_TYPES, TABLE, outcome, tiny_model


# windows, chunks, counted places, sparse attention, sinks, other layers, no attention interface
FEW = [
    "llama", "gemma3_text", "mixtral", "cohere2", "llama4_text", "qwen2_moe", "deepseek_v32", "minimax_m3_vl_text",
    "gpt_oss", "diffllama", "roberta", "bamba", "codegen", "bloom",
]  # fmt: skip


def suffix_config():
    values = {"num_virtual_tokens": 5, "prompt_tuning_init": "RANDOM_UNIFORM", "prompt_position": "suffix"}
    return PromptTuningExtConfig(task_type="CAUSAL_LM", **values)


def table_rows():
    rows = [re.split(r" ?(?<!\\)\| ?", line)[1:-1] for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in rows[1:]}


# other versions of transformers have other models, and build some differently
of_this_transformers = pytest.mark.skipif(
    f"transformers {transformers.__version__};" not in TABLE.read_text(),
    reason="the table has another transformers",
)


@of_this_transformers
@pytest.mark.filterwarnings("ignore")  # some model types warn of their own configs
@pytest.mark.parametrize(
    "model_type", [pytest.param(t, marks=() if t in FEW else pytest.mark.slow) for t in MODEL_TYPES]
)
def test_a_model_type_is_right_at_every_length_or_refused_with_a_reason(model_type):
    alone, packed, _, reason = table_rows()[model_type]
    if packed == "not run":
        pytest.skip(reason)

    found = outcome(model_type)

    assert found.error < 1e-4
    assert found.neutral or model_type == "reformer"
    assert found.packed == (list(BATCHES) if packed == "yes" else [] if packed == "no" else packed.split(", "))
    assert (len(found.packed) == len(BATCHES)) or found.reason
    assert bool(found.reason) == bool(reason)
    assert (alone == "yes") == found.attention_alone


def test_the_table_is_of_the_transformers_that_is_pinned():
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text()
    assert f"transformers {re.search(r'^transformers==(.+)$', pins, re.MULTILINE)[1]};" in TABLE.read_text()


@of_this_transformers
def test_the_table_has_every_model_type():
    assert list(table_rows()) == MODEL_TYPES


def test_four_in_five_of_those_with_attention_alone_run_packed():
    alone = [packed for alone, packed, *_ in table_rows().values() if alone == "yes"]

    assert len(alone) > 120
    assert sum(packed != "no" for packed in alone) >= 0.8 * len(alone)


def test_the_errors_in_the_table_are_those_of_rounding():
    errors = [float(error) for _, packed, error, _ in table_rows().values() if packed != "not run"]

    assert len(errors) > 150
    assert max(errors) < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "model_type", [pytest.param(t, marks=() if t in FEW else pytest.mark.slow) for t in MODEL_TYPES]
)
def test_a_model_type_is_right_with_the_prompt_behind_or_refuses(model_type):
    try:
        model = get_peft_model(tiny_model(model_type), suffix_config())
    except Exception as error:  # it cannot be built tiny, or it is an encoder
        pytest.skip(f"{type(error).__name__}: {error}")
    batch = make_suffix_batch("holes")
    try:
        with torch.no_grad():
            got = model.eval()(**batch).logits
    except ValueError as refusal:
        pytest.skip(str(refusal))
    with torch.no_grad():
        _, logits, columns = run_alone(model.get_base_model(), [prompt_of(model)] * 3, batch)
    for row, want, where in zip(got, logits, columns, strict=True):
        assert (row[where] - want).norm() <= 1e-4 * want.norm()
