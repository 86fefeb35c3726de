"""One mixed-task batch beside one batch for each task, and many tasks over one text: the same results, other times.

Forward passes without gradients, as in serving; what is compared is interleaved in one process.
"""

from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from peft_prompt_ext import PromptTuningExtConfig
from peft_prompt_ext.peft_models.padding import real_last

from .machine import clock


def compare(base: Any, batch: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """Time one batch of all tasks, and a batch for each, interleaved, and compare their logits of the next token.

    The batch, right-padded, has as many rows for each task. The batch of one task takes the path `single_path`.
    """
    how = spec["single_path"] == "packed", spec["logits"] == "last"
    make = partial(_prompt, spec["num_virtual_tokens"], "prefix")
    mixed, single = _batches(base, batch, spec["tasks"], make, *how)
    with torch.inference_mode():
        difference = float((mixed() - single()).abs().max())
        return {**_time({"mixed": mixed, "single": single}, spec["steps"]), "largest_difference": difference}


def compare_on_one_text(load: Any, ids: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """Time a batch that has one text [1, T] for each task, with suffixes, prefixes and LoRA adapters, interleaved.

    `load` makes the base model. The largest differences are those of a row's logits from its adapter alone.
    """
    tasks = spec["tasks"]
    configs = {way: partial(_prompt, spec["num_virtual_tokens"], way) for way in ("suffix", "prefix")}
    configs["lora"] = lambda _: LoraConfig(task_type="CAUSAL_LM", r=8, init_lora_weights=False)  # else all are equal
    batch = {"input_ids": ids.expand(tasks, -1), "attention_mask": torch.ones_like(ids).expand(tasks, -1)}
    ways = {way: _batches(load(), batch, tasks, config) for way, config in configs.items()}
    with torch.inference_mode():
        differences = {way: float((mixed() - single()).abs().max()) for way, (mixed, single) in ways.items()}
        times = _time({way: mixed for way, (mixed, _) in ways.items()}, spec["steps"])
    return {**times, "largest_differences": differences}


def _prompt(virtual: int, position: str, seed: int) -> Any:
    init = {"prompt_tuning_init": "RANDOM_UNIFORM", "prompt_tuning_init_seed": seed, "text_cache": "none"}
    return PromptTuningExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual, prompt_position=position, **init)


def _batches(base: Any, batch: Any, tasks: int, make: Any, packed: bool = True, last: bool = True) -> tuple[Any, ...]:
    """Functions that run one batch of all tasks, and a batch for each; `make(number)` is the config of an adapter."""
    order = real_last(batch["attention_mask"])
    inputs = {name: batch[name].gather(1, order) for name in ("input_ids", "attention_mask")}
    keep = {"logits_to_keep": 1} if last else {}
    model = get_peft_model(base, make(0), adapter_name="task0")
    for number in range(1, tasks):
        model.add_adapter(f"task{number}", make(number))
    model.eval()
    each = len(order) // tasks

    def mixed() -> Any:
        names = [name for name in model.peft_config for _ in range(each)]
        return model(**inputs, adapter_names=names, **keep).logits[:, -1]

    def single() -> Any:
        outputs = []
        for number, (name, config) in enumerate(model.peft_config.items()):
            model.set_adapter(name)
            config.shared_prefix = packed
            part = slice(number * each, (number + 1) * each)
            width = int(inputs["attention_mask"][part].sum(1).max())
            outputs.append(model(**{key: value[part, -width:] for key, value in inputs.items()}, **keep).logits[:, -1])
            config.shared_prefix = True
        return torch.cat(outputs)

    return mixed, single


def _time(functions: dict[str, Any], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {f"{name}_time_s": [] for name in functions}
    for key, function in list(zip(times, functions.values(), strict=True)) * repeats:
        start = clock()
        function()
        times[key].append(clock() - start)
    return times
