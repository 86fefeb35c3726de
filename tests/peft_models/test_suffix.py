"""A prompt behind the text: each row gives what it gives alone as `[text | prompt | answer]`."""

import pytest

from peft_prompt_ext import engine_status
from tests.helpers import one_thread, prompted  # noqa: F401
from tests.peft_models.suffix import MASKS, assert_equals_rows_alone, make_suffix_batch
from tests.zoo import DECODERS


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("architecture", DECODERS)
def test_each_row_equals_it_alone(build_model, architecture, kind, shared_prefix):
    model = prompted(build_model(architecture), "CAUSAL_LM", prompt_position="suffix", shared_prefix=shared_prefix)
    assert_equals_rows_alone(model, make_suffix_batch(kind))
    assert engine_status(model).packed == (shared_prefix and architecture != "bloom")


@pytest.mark.parametrize("size", [1, 40])
def test_short_and_long_prompts(build_model, size):
    model = prompted(build_model("llama"), "CAUSAL_LM", prompt_position="suffix", num_virtual_tokens=size)
    assert_equals_rows_alone(model, make_suffix_batch("holes", answers=(1, 2, 1)))


@pytest.mark.parametrize(
    ("architecture", "task_type"), [("bert", "SEQ_CLS"), ("bert", "CAUSAL_LM"), ("roberta", "CAUSAL_LM")]
)
def test_encoders_are_refused_when_the_model_is_made(build_model, architecture, task_type):
    with pytest.raises(ValueError, match="needs a decoder"):
        prompted(build_model(architecture, task_type), task_type, prompt_position="suffix")
