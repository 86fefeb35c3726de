"""TRL's trainers with a prompt behind the text: PEFT's losses, or an error that names what does not fit."""

import pytest
import torch

from peft_prompt_ext import PromptTuningExtConfig, engine_status
from tests.helpers import one_thread, prompt_of  # noqa: F401
from tests.test_trl import COMMON, MAKES, P, begin_with_one_prompt, folder, rows, sft, trl  # noqa: F401


pytestmark = pytest.mark.filterwarnings("ignore")  # TRL warns


def train(make, tmp_path, **changes):
    """Train two steps from the same prompt; return their losses."""
    values = {"num_virtual_tokens": P, "prompt_tuning_init": "RANDOM_UNIFORM", "prompt_position": "suffix"}
    config = PromptTuningExtConfig(task_type="CAUSAL_LM", **values, **changes)
    torch.manual_seed(0)
    trainer = make(config, str(tmp_path / "-".join(map(str, changes.values()))))
    before = begin_with_one_prompt(trainer.model)
    torch.manual_seed(1)
    trainer.train()
    assert not torch.equal(prompt_of(trainer.model), before)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer


@pytest.mark.parametrize("name", [n for n in MAKES if n != "SFT"])
def test_losses_are_pefts_path_and_the_engine_is_used(folder, tmp_path, name):  # noqa: F811
    make = MAKES[name](folder)
    losses, trainer = train(make, tmp_path, shared_prefix=True)
    assert engine_status(trainer.model).packed, engine_status(trainer.model).reason
    without, _ = train(make, tmp_path, shared_prefix=False)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(without), rtol=2e-3, atol=1e-4)


def test_text_without_a_prompt_is_refused(folder, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=r"has no text in front of its answer.*Set the labels of the text to -100"):
        train(sft(folder, rows("text")), tmp_path)


@pytest.mark.parametrize("options", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_rows_of_several_texts_are_refused(folder, tmp_path, options):  # noqa: F811
    with pytest.raises(ValueError, match="packing=False, padding_free=False"):
        train(sft(folder, rows("prompt", "completion"), **options), tmp_path)


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_noise_of_neftune_is_new_in_each_step(folder, tmp_path, shared_prefix):  # noqa: F811
    make = sft(folder, rows("prompt", "completion"), neftune_noise_alpha=5.0)
    noisy, trainer = train(make, tmp_path, shared_prefix=shared_prefix)
    assert engine_status(trainer.model).packed == shared_prefix
    assert engine_status(trainer.model).texts is None
    exact, trainer = train(sft(folder, rows("prompt", "completion")), tmp_path, shared_prefix=shared_prefix)
    assert noisy[0] != exact[0]
    if shared_prefix:
        assert engine_status(trainer.model).texts is not None
