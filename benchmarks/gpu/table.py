"""The GPU command's lines as a table of the READMEs."""

import pandas as pd

from ..report.load import read_lines
from ..report.summary import Summary
from ..report.tables import table


COLUMNS = {("stock", ""): "PEFT's prompt tuning", ("packed", "varlen"): "this plugin"}
COLUMNS |= {("packed", "sdpa"): "this plugin, SDPA", ("lora", ""): "LoRA, r 8"}
COLUMNS |= {("lora_last", ""): "LoRA, head at labels", ("full", ""): "full", ("floor", "varlen"): "frozen model alone"}


def engine_gpu(summary: Summary) -> str:
    """A training step on the GPU at 100 virtual tokens; the first of the runs had other code for attention."""
    lines = read_lines("gpu.jsonl").dropna(subset=["peak_memory_bytes"]).fillna({"attention": ""})
    lines = lines[lines["num_virtual_tokens"].isin([0, 100]) & lines["code"].str.startswith("attention in one call")]
    rows = []
    for (text, model, precision), same in lines.groupby(["text", "model", "precision"]):
        cells = [_gpu_cell(same[(same["method"] == method) & (same["attention"] == how)]) for method, how in COLUMNS]
        rows.append([f"{model.rsplit('-', 1)[1].upper()}, {precision.replace('bfloat16', 'bf16')}, {text}", *cells])
    caption = "One NVIDIA H200, Llamas with random weights, 16 rows (short: 8 to 54 tokens, long: 256 to 512), 100"
    caption += " virtual tokens; time of a step, and peak memory above the weights:"
    return f"{caption}\n\n{table(['model and rows', *COLUMNS.values()], rows)}"


def _gpu_cell(lines: pd.DataFrame) -> str:
    """Of the last run that has the cell."""
    lines = lines[lines["run"] == lines["run"].max()]
    step, peak = lines.explode("step_time_s")["step_time_s"].median(), lines["peak_memory_bytes"].max()
    return "" if lines.empty else f"{1e3 * step:.0f} ms, {peak / 2**30:.1f} GiB"
