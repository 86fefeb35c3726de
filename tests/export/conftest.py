"""Tiny base models whose final states lie on one side, as those of real models do, and prompts trained on them."""

import json

import pytest
import torch
from peft import get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_prompt_ext import PromptTuningExtConfig
from peft_prompt_ext.tasks import Task
from tests.zoo import tiny_config


CHAT = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
POSITIONS = {"gpt2": "n_positions"}
TASK = Task(
    name="mood",
    template="Review: {text}\nMood:",
    texts=("{text}",),
    label_words=(" good", " bad"),
    label_names=("good", "bad"),
)


@pytest.fixture(scope="session")
def save_base(tmp_path_factory, tokenizer_folder):
    """Saves a base model: `save_base("llama", tied=True, bos=True)`."""

    def save(architecture, tied=True, bos=False, one_sided=True, chat=None, seed=0, dtype=None, **changes):
        torch.manual_seed(seed)
        sizes = {POSITIONS.get(architecture, "max_position_embeddings"): 499}
        config = tiny_config(architecture, tie_word_embeddings=tied, **{**sizes, **changes})
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        if one_sided:
            direction = torch.randn(config.hidden_size).sign()
            with torch.no_grad():
                model.get_input_embeddings().weight += direction
                # no token has these rows, and training would have made them unlikely
                model.get_output_embeddings().weight[len(AutoTokenizer.from_pretrained(tokenizer_folder)) :] = (
                    -5 * direction
                )
        folder = tmp_path_factory.mktemp(architecture)
        model.to(dtype or torch.float32).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        if bos:
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
            )
        tokenizer.chat_template = chat
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def save_prompt(tmp_path_factory):
    """Saves a prompt trained on a base model: `save_prompt(base, "mood", size=5, position="suffix")`."""

    def save(base, name, size=5, position="prefix", task=None, seed=3, **settings):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = PromptTuningExtConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=size, prompt_tuning_init="RANDOM", prompt_position=position
        )
        torch.manual_seed(seed)
        words = model.get_input_embeddings()(torch.randint(3, 300, (size,)))
        model = get_peft_model(model, config)
        with torch.no_grad():
            prompt = model.prompt_encoder["default"].embedding.weight
            prompt.copy_(words + 0.1 * words.std() * torch.randn_like(words))
        folder = tmp_path_factory.mktemp("run") / name
        model.save_pretrained(folder)
        if task is not None:
            recipe = {"method": "prompt_tuning", "model_name_or_path": base, "model_revision": None, "max_length": 400}
            recipe |= {"quantization": None, "task_type": None, "prompt_position": position, "dtype": "auto"}
            recipe |= {"num_virtual_tokens": size, "task": task.to_dict(), **settings}
            (folder / "recipe.json").write_text(json.dumps(recipe))
        return str(folder)

    return save
