"""TRL's trainers train a prompt in packed batches, with the losses of rows alone or of PEFT's path."""

from itertools import chain

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from peft_prompt_ext import PromptTuningExtConfig, engine_status
from tests.helpers import one_thread, prompt_of  # noqa: F401


trl = pytest.importorskip("trl", reason="trl is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL warns
P = 4
WORDS = "a great film with a fine cast terrible acting and a worse script the plot is positive".split()


def text(start, length):
    return " ".join((WORDS * 3)[start : start + length])


def rows(*kinds):
    """Rows of different lengths."""
    sizes = ((0, 5), (3, 2), (7, 6), (1, 3))
    columns = {
        "text": [text(start, 2 * length) for start, length in sizes],
        "prompt": [text(start, length) for start, length in sizes],
        "completion": [" " + text(start + 2, 3 + start % 3) for start, _ in sizes],
        "chosen": [" " + text(start + 4, 3) for start, _ in sizes],
        "rejected": [" " + text(start + 6, 4) for start, _ in sizes],
        "label": [True, False, True, False],
    }
    return Dataset.from_dict({kind: columns[kind] for kind in kinds})


@pytest.fixture
def folder(saved_model):
    path = saved_model("llama")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(path)
    return path


COMMON = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "seed": 3,
    "gradient_checkpointing": False,
}


def config_of(kind):
    return PromptTuningExtConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=P,
        prompt_tuning_init="RANDOM_UNIFORM",
        shared_prefix=kind == "engine",
    )


def train(make, kind, tmp_path):
    """Train two steps from the same prompt; return their losses."""
    torch.manual_seed(0)
    trainer = make(config_of(kind), str(tmp_path / kind))
    before = begin_with_one_prompt(trainer.model)
    torch.manual_seed(1)
    trainer.train()
    assert not torch.equal(prompt_of(trainer.model), before)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer


def begin_with_one_prompt(model):
    prompt = prompt_of(model)
    drawn = torch.randn(prompt.shape, generator=torch.Generator().manual_seed(5)) * 0.2
    prompt.data = drawn.clone()
    return drawn


def sft(folder, dataset, **options):
    options = {"max_length": 40, **options}
    return lambda config, output: trl.SFTTrainer(
        folder, trl.SFTConfig(output, **COMMON, **options), train_dataset=dataset, peft_config=config
    )


def reward(completions, **_):
    return [float(len(set(completion))) for completion in completions]


def online(trainer, config_class, folder, **options):
    return lambda config, output: trainer(
        folder,
        reward,
        config_class(output, max_completion_length=5, num_generations=2, beta=0.1, **COMMON, **options),
        train_dataset=rows("prompt"),
        peft_config=config,
    )


def preference(trainer, config_class, folder, *kinds):
    return lambda config, output: trainer(
        folder, args=config_class(output, max_length=40, **COMMON), train_dataset=rows(*kinds), peft_config=config
    )


MAKES = {
    "SFT": lambda folder: sft(folder, rows("text")),
    "SFT, completion only": lambda folder: sft(folder, rows("prompt", "completion")),
    "DPO": lambda folder: preference(trl.DPOTrainer, trl.DPOConfig, folder, "prompt", "chosen", "rejected"),
    "KTO": lambda folder: preference(trl.KTOTrainer, trl.KTOConfig, folder, "prompt", "completion", "label"),
    "GRPO": lambda folder: online(trl.GRPOTrainer, trl.GRPOConfig, folder),
    "RLOO": lambda folder: online(trl.RLOOTrainer, trl.RLOOConfig, folder),
}


@pytest.mark.parametrize("name", MAKES)
def test_losses_are_pefts_path_and_the_engine_is_used(folder, tmp_path, name):
    make = MAKES[name](folder)

    losses, trainer = train(make, "engine", tmp_path)

    assert engine_status(trainer.model).packed, engine_status(trainer.model).reason
    without, trainer = train(make, "path", tmp_path)
    assert not engine_status(trainer.model).packed
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(without), rtol=2e-3, atol=1e-4)


PACKED = {
    "packing": {"packing": True, "max_length": 40},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 400},
    "padding_free": {"padding_free": True, "max_length": None},
}


@pytest.mark.parametrize("name", PACKED)
def test_rows_that_trl_packs_have_the_loss_of_each_text_alone(folder, tmp_path, name):
    losses, trainer = train(sft(folder, rows("text"), **PACKED[name]), "engine", tmp_path)
    assert engine_status(trainer.model).packed, engine_status(trainer.model).reason

    model = trainer.model.eval()
    with torch.no_grad():
        begin_with_one_prompt(model)
        texts = [AutoTokenizer.from_pretrained(folder)(x + "</s>")["input_ids"] for x in rows("text")["text"]]
        first = 1  # no label in a packed text
        if name == "wrapped":  # TRL joins them to one text
            texts, first = [list(chain(*texts))], 0
        total = count = 0
        for ids in texts:
            ids = torch.tensor([ids])
            logits = model(input_ids=ids).logits[0, P + first - 1 : -1]
            total += torch.nn.functional.cross_entropy(logits, ids[0, first:], reduction="sum")
            count += ids.shape[1] - 1  # the Trainer does not count first tokens
    assert losses[0] == pytest.approx(float(total / count), rel=1e-3)


def test_completions_have_the_loss_of_each_row_alone(folder, tmp_path):
    losses, trainer = train(sft(folder, rows("prompt", "completion")), "engine", tmp_path)
    model, total, count = trainer.model.eval(), 0, 0
    with torch.no_grad():
        begin_with_one_prompt(model)
        for row in trainer.train_dataset:
            ids = torch.tensor([row["input_ids"]])
            wanted = torch.tensor(row["labels"]) != -100
            logits = model(input_ids=ids).logits[0, P - 1 : -1]
            total += torch.nn.functional.cross_entropy(logits[wanted], ids[0, wanted], reduction="sum")
            count += int(wanted.sum())
    assert losses[0] == pytest.approx(float(total / count), rel=1e-3)


def test_a_reward_model_trains(saved_model, tmp_path):
    path = saved_model("llama", "SEQ_CLS")
    config = PromptTuningExtConfig(task_type="SEQ_CLS", num_virtual_tokens=P, prompt_tuning_init="RANDOM_UNIFORM")
    losses = []
    for shared_prefix in (True, False):
        config.shared_prefix = shared_prefix
        args = trl.RewardConfig(str(tmp_path / str(shared_prefix)), max_length=40, **COMMON)
        torch.manual_seed(0)
        trainer = trl.RewardTrainer(
            path, args=args, train_dataset=rows("prompt", "chosen", "rejected"), peft_config=config
        )
        begin_with_one_prompt(trainer.model)
        with torch.no_grad():
            trainer.model.get_base_model().score.modules_to_save["default"].weight.fill_(0.1)
        trainer.train()
        assert engine_status(trainer.model).packed == shared_prefix
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
