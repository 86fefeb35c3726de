"""One mixed-task batch beside one batch for each task: the same rows and results, other times.

Forward passes without gradients, as in serving; the two are interleaved in one process.
"""

from typing import Any

from .machine import clock


def compare(
    base: Any, batch: Any, tasks: int, num_virtual_tokens: int, repeats: int, packed: bool = False, last: bool = True
) -> dict[str, Any]:
    """Time one batch of all tasks, and a batch for each, interleaved, and compare their logits of the next token.

    The batch, right-padded, has as many rows for each task. `packed`: the batch of one task is packed as well, else it
    takes PEFT's path. `last`: logits of the next token alone.
    """
    import torch
    from peft import get_peft_model

    from peft_prompt_ext import PromptTuningExtConfig, engine_status
    from peft_prompt_ext.peft_models.padding import real_last

    order = real_last(batch["attention_mask"])
    inputs = {name: batch[name].gather(1, order) for name in ("input_ids", "attention_mask")}
    keep = {"logits_to_keep": 1} if last else {}
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": num_virtual_tokens}
    common["prompt_tuning_init"] = "RANDOM_UNIFORM"
    configs = {f"task{n}": PromptTuningExtConfig(**common, prompt_tuning_init_seed=n) for n in range(tasks)}
    model = get_peft_model(base, configs["task0"], adapter_name="task0")
    for name in list(configs)[1:]:
        model.add_adapter(name, configs[name])
    model.eval()
    if not engine_status(model).packed:
        raise SystemExit(f"the engine does not take this model: {engine_status(model).reason}")
    each = len(order) // tasks

    def mixed() -> Any:
        names = [name for name in configs for _ in range(each)]
        return model(**inputs, adapter_names=names, **keep).logits[:, -1]

    def single() -> Any:
        outputs = []
        for number, (name, config) in enumerate(configs.items()):
            model.set_adapter(name)
            config.shared_prefix = packed
            part = slice(number * each, (number + 1) * each)
            width = int(inputs["attention_mask"][part].sum(1).max())
            outputs.append(model(**{key: value[part, -width:] for key, value in inputs.items()}, **keep).logits[:, -1])
            config.shared_prefix = True
        return torch.cat(outputs)

    times: dict[str, list[float]] = {"mixed_time_s": [], "single_time_s": []}
    with torch.inference_mode():
        difference = float((mixed() - single()).abs().max())
        for key, function in list(zip(times, (mixed, single), strict=True)) * repeats:
            start = clock()
            function()
            times[key].append(clock() - start)
    return {**times, "largest_difference": difference}
