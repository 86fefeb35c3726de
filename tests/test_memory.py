"""The memory estimate beside what training takes."""

import os
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model

from peft_prompt_ext import (
    MemoryEstimate,
    PromptTuningExtConfig,
    engine_status,
    estimate_memory,
    load_frozen_backbone,
)
from peft_prompt_ext.memory import parse_bytes
from tests.zoo import tiny_config


MEASURE = """
import sys, torch
from benchmarks.harness.machine import peak, reset_peak
from benchmarks.harness.steps import method_step
from peft_prompt_ext import load_frozen_backbone

model, method, quantization, batch, tokens, virtual, checkpointing = sys.argv[1:]
base = load_frozen_backbone(model, quantization=None if quantization == "None" else quantization, dtype=torch.float32)
ids = torch.arange(int(batch) * int(tokens)).view(int(batch), int(tokens)) % 9000 + 5
labels = torch.full_like(ids, -100)
labels[:, -1] = ids[:, -1]
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
spec = {"method": {"prompt_tuning": "packed"}.get(method, method), "num_virtual_tokens": int(virtual)}
spec |= {"gradient_checkpointing": checkpointing == "True", "precision": "float32"}
trained, step = method_step(base, spec, inputs)
for parameter in trained.parameters():
    parameter.detach().view(torch.uint8).max()
optimizer = torch.optim.AdamW([parameter for parameter in trained.parameters() if parameter.requires_grad])
before = reset_peak("cpu")
for _ in range(3):
    step()
    optimizer.step()
    optimizer.zero_grad()
print(peak("cpu") - before)
"""
CASES = [
    ("prompt_tuning", None, 8, 32, 20, False),
    ("prompt_tuning", "nf4", 8, 32, 100, False),
    pytest.param("prompt_tuning", "int8", 8, 32, 20, False, marks=pytest.mark.slow),
    pytest.param("prompt_tuning", None, 16, 64, 20, True, marks=pytest.mark.slow),
    ("suffix_kept", None, 8, 128, 20, False),
    pytest.param("suffix", None, 8, 256, 12, False, marks=pytest.mark.slow),
    pytest.param("suffix", "nf4", 8, 128, 20, False, marks=pytest.mark.slow),
    pytest.param("suffix", None, 16, 128, 20, True, marks=pytest.mark.slow),
    pytest.param("lora", None, 16, 32, 1, False, marks=pytest.mark.slow),
    pytest.param("lora", "nf4", 8, 32, 1, False, marks=pytest.mark.slow),
    pytest.param("full", None, 8, 32, 1, False, marks=pytest.mark.slow),
]


@pytest.mark.real
@pytest.mark.parametrize(("method", "quantization", "batch", "tokens", "virtual", "checkpointing"), CASES)
def test_the_estimate_is_within_a_fifth_of_the_measured_peak(
    smollm2, pytestconfig, method, quantization, batch, tokens, virtual, checkpointing
):
    command = [
        sys.executable,
        "-c",
        MEASURE,
        smollm2,
        method,
        str(quantization),
        str(batch),
        str(tokens),
        str(virtual),
    ]
    # an allocator that gives freed memory back, so that the peak is what was in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    ran = subprocess.run(
        [*command, str(checkpointing)], capture_output=True, text=True, cwd=pytestconfig.rootpath, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    measured = int(ran.stdout.split()[-1])

    behind = {"prompt_position": "suffix", "text_rows": batch if method == "suffix_kept" else 0}
    is_suffix = method.startswith("suffix")
    estimate = estimate_memory(
        smollm2,
        "prompt_tuning" if is_suffix else method,
        quantization,
        batch=batch,
        tokens=tokens,
        num_virtual_tokens=virtual,
        gradient_checkpointing=checkpointing,
        **(behind if is_suffix else {}),
    )

    estimated = estimate.above_weights_bytes + estimate.kept_texts_bytes  # on a CPU both are in one memory
    assert 0.8 * measured <= estimated <= 1.2 * measured


@pytest.mark.real
@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
def test_the_bytes_of_the_weights_are_those_of_the_loaded_model(smollm2, quantization):
    loaded = load_frozen_backbone(smollm2, quantization=quantization, dtype=torch.float32).get_memory_footprint()

    estimate = estimate_memory(smollm2, quantization=quantization, batch=1, tokens=1)

    assert estimate.weights_bytes == pytest.approx(loaded, rel=0.02)
    if quantization == "nf4":
        assert loaded <= 0.33 * estimate_memory(smollm2, batch=1, tokens=1).weights_bytes


def test_parts_add_up_and_grow_with_what_they_depend_on():
    config = tiny_config("llama", num_hidden_layers=4)
    small = estimate_memory(config, batch=3, tokens=11)
    assert isinstance(small, MemoryEstimate)
    assert small.total_bytes == sum(vars(small).values()) and small.kept_texts_bytes == 0
    assert small.trainable_bytes == 4 * 20 * 24 and small.optimizer_bytes == 8 * 20 * 24
    assert estimate_memory(config, batch=3, tokens=37).step_bytes > small.step_bytes
    assert estimate_memory(config, batch=3, tokens=11, num_virtual_tokens=47).step_bytes > small.step_bytes
    assert estimate_memory(config, batch=3, tokens=11, gradient_checkpointing=True).step_bytes < small.step_bytes
    int8, nf4 = (estimate_memory(config, "prompt_tuning", kind, batch=3, tokens=11) for kind in ("int8", "nf4"))
    assert int8.step_bytes > nf4.step_bytes  # LLM.int8 keeps the inputs of its products
    assert estimate_memory(config, batch=3, tokens=11, dtype=torch.bfloat16).weights_bytes == small.weights_bytes / 2


def test_a_suffix_keeps_activations_of_its_branches_alone():
    config, shape = tiny_config("llama", num_hidden_layers=4), {"batch": 3, "tokens": 37, "num_virtual_tokens": 5}
    prefix, suffix = (estimate_memory(config, **shape, prompt_position=name) for name in ("prefix", "suffix"))
    assert suffix.step_bytes < prefix.step_bytes and suffix.kept_texts_bytes == 0
    assert suffix.trainable_bytes == prefix.trainable_bytes

    def step(**changes):
        return estimate_memory(config, **{**shape, "prompt_position": "suffix", **changes}).step_bytes

    assert step(tokens=67) - suffix.step_bytes < (step(tokens=67, prompt_position="prefix") - prefix.step_bytes) / 2
    assert step(num_virtual_tokens=11) > suffix.step_bytes and step(labels_per_row=7) > suffix.step_bytes
    assert step(gradient_checkpointing=True) < suffix.step_bytes


def test_kept_texts_are_counted_apart_up_to_their_budget(build_model):
    base = build_model("llama", num_hidden_layers=4)
    shape = {"batch": 3, "tokens": 13, "labels_per_row": 2, "prompt_position": "suffix"}
    without, kept = (estimate_memory(base, **shape, text_rows=rows) for rows in (0, 5))
    init = {"prompt_tuning_init": "RANDOM_UNIFORM", "prompt_position": "suffix"}
    config = PromptTuningExtConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, **init)
    model = get_peft_model(base, config).eval()
    ids = torch.arange(5 * 13).view(5, 13) % 40 + 5
    with torch.no_grad():
        model(input_ids=ids, answer_start=torch.full((5,), 11))
    assert kept.kept_texts_bytes == engine_status(model).texts.num_bytes > 0
    assert kept.total_bytes == without.total_bytes

    one = kept.kept_texts_bytes // 5
    limited = estimate_memory(base, **shape, text_rows=5, text_cache_bytes=3 * one + 1)
    assert limited.kept_texts_bytes == 3 * one
    half = estimate_memory(base, **shape, text_rows=5, dtype=torch.bfloat16)
    assert half.kept_texts_bytes == kept.kept_texts_bytes / 2
    assert estimate_memory(tiny_config("bloom"), **shape, text_rows=5).kept_texts_bytes == 0  # PEFT's path keeps none


def test_a_models_config_is_left_as_it_is_and_refused_architectures_are_estimated_for_pefts_path(build_model):
    base = build_model("llama")
    estimate_memory(base, batch=3, tokens=11, gradient_checkpointing=True)
    assert base.config._attn_implementation == "sdpa"
    assert estimate_memory(tiny_config("bloom"), batch=3, tokens=11, num_virtual_tokens=29).step_bytes > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "prefix"}, "prompt_tuning, lora, full; got 'prefix'"),
        ({"quantization": "int4"}, "quantization \\('int4'\\) must be one of"),
        ({"method": "full", "quantization": "nf4"}, "cannot be trained"),
        ({"batch": 0}, "batch must be at least 1; got 0"),
        ({"prompt_position": "sufix"}, "prompt_position \\('sufix'\\) must be one of .* 'suffix'"),
        ({"prompt_position": "suffix", "method": "lora"}, "needs a prompt; method='lora' has none"),
        ({"prompt_position": "suffix", "tokens": 4, "labels_per_row": 4}, "labels_per_row is 4, tokens is 4"),
        ({"text_rows": 9}, "text_rows=9 with a prefix"),
    ],
)
def test_bad_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory(tiny_config("llama"), **arguments)


@pytest.mark.parametrize(("text", "size"), [("8GB", 8 * 10**9), ("1.5 GiB", 3 * 2**29), ("500m", 5 * 10**8)])
def test_sizes_are_read_with_their_units(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["8", "eight GB", "8 GBs", "1.2.3GB", ".GB"])
def test_sizes_without_a_unit_are_refused(text):
    with pytest.raises(ValueError, match=text):
        parse_bytes(text)


def test_the_table_says_what_fits(tmp_path):
    tiny_config("llama").save_pretrained(tmp_path)
    command = [sys.executable, "-m", "peft_prompt_ext.cli", "memory", str(tmp_path), "--card", "1MB", "--tokens", "16"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "QLoRA" in ran.stdout and " no " in ran.stdout and "kept" not in ran.stdout
    ran = subprocess.run([*command, "--text_rows", "100000"], capture_output=True, text=True)
    assert "kept texts" in ran.stdout and "suffix" in ran.stdout and "host's memory" in ran.stdout, ran.stderr
    ran = subprocess.run([*command, "--labels_per_row", "16"], capture_output=True, text=True)
    assert ran.returncode == 1 and "error: labels_per_row is 16, tokens is 16" in ran.stderr
