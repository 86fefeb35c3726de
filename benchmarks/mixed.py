"""One mixed-task batch beside one batch for each task: the same rows, the same results, other times.

Forward passes without gradients, as in serving; the two take turns in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any


def main(arguments: list[str]) -> None:
    """Measure, print a line, and append it to the results file as JSON."""
    options = _options(arguments)
    row = measure(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    together, apart = (statistics.median(row[key]) for key in ("mixed_time_s", "single_time_s"))
    print(
        f"{options.tasks} tasks of {options.rows_per_task} rows, P={options.num_virtual_tokens}, {options.logits} "
        f"logits: mixed "
        f"{together:.2f} s, one batch a task {apart:.2f} s, {apart / together:.2f} times as long; largest "
        f"difference of the logits {row['largest_difference']:.1e}"
    )


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks mixed", description=__doc__)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rows_per_task", type=int, default=1)
    parser.add_argument("--num_virtual_tokens", type=int, default=20)
    parser.add_argument("--logits", choices=["last", "all"], default="last", help="of the next token, or of all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--single_path", choices=["packed", "stock"], default="stock", help="path of single batches")
    parser.add_argument("--model_name_or_path", default="smollm2-135m", help="an asset, a folder or a Hub name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/mixed.jsonl"))
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time both ways on real, left-padded rows, and compare their logits of the next token."""
    import torch
    from transformers import AutoModelForCausalLM

    from peft_prompt_ext.assets import resolve

    from .machine import machine
    from .speed import review_batch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = resolve(options.model_name_or_path)
    batch = review_batch(folder, "short", options.tasks * options.rows_per_task, options.seed).to(device)
    base = AutoModelForCausalLM.from_pretrained(folder).to(device)
    row = compare(
        *(base, batch, options.tasks, options.num_virtual_tokens, options.repeats),
        packed=options.single_path == "packed",
        last=options.logits == "last",
    )
    spec = {key: value for key, value in vars(options).items() if key != "output"}
    return {**spec, **row, **machine(device)}


def compare(
    base: Any, batch: Any, tasks: int, num_virtual_tokens: int, repeats: int, packed: bool = False, last: bool = True
) -> dict[str, Any]:
    """Time one batch of all tasks, and a batch for each.

    Args:
        base: The base model.
        batch: As many rows for each task, right-padded.
        tasks: How many tasks; each has a prompt of its own.
        num_virtual_tokens: Of each prompt.
        repeats: How often both are timed, interleaved.
        packed: The batch of one task is packed as well; else it takes PEFT's path.
        last: Logits of the next token alone.

    Returns:
        `mixed_time_s`, `single_time_s` and the `largest_difference` of the logits of the next token.
    """
    import torch
    from peft import get_peft_model

    from peft_prompt_ext import PromptTuningExtConfig, engine_status
    from peft_prompt_ext.peft_models.padding import real_last

    order = real_last(batch["attention_mask"])
    inputs = {name: batch[name].gather(1, order) for name in ("input_ids", "attention_mask")}
    keep = {"logits_to_keep": 1} if last else {}
    names = [f"task{number}" for number in range(tasks)]
    configs = [
        PromptTuningExtConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=num_virtual_tokens,
            prompt_tuning_init="RANDOM_UNIFORM",
            prompt_tuning_init_seed=number,
        )
        for number in range(tasks)
    ]
    model = get_peft_model(base, configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    model.eval()
    if not engine_status(model).packed:
        raise SystemExit(f"the engine does not take this model: {engine_status(model).reason}")
    each = len(order) // tasks
    row_names = [name for name in names for _ in range(each)]

    def mixed() -> Any:
        return model(**inputs, adapter_names=row_names, **keep).logits[:, -1]

    def single() -> Any:
        outputs = []
        for number, (name, config) in enumerate(zip(names, configs, strict=True)):
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
        for _ in range(repeats):
            for key, function in (("mixed_time_s", mixed), ("single_time_s", single)):
                start = time.perf_counter()
                function()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times[key].append(time.perf_counter() - start)
    return {**times, "largest_difference": difference}
