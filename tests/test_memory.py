"""The memory estimate beside what training takes."""

import os
import subprocess
import sys

import pytest
import torch

from peft_prompt_ext import MemoryEstimate, estimate_memory, load_frozen_backbone
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

    estimate = estimate_memory(
        smollm2,
        method,
        quantization,
        batch=batch,
        tokens=tokens,
        num_virtual_tokens=virtual,
        gradient_checkpointing=checkpointing,
    )

    assert 0.8 * measured <= estimate.above_weights_bytes <= 1.2 * measured


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
    assert small.total_bytes == sum(vars(small).values())
    assert small.trainable_bytes == 4 * 20 * 24 and small.optimizer_bytes == 8 * 20 * 24
    assert estimate_memory(config, batch=3, tokens=37).step_bytes > small.step_bytes
    assert estimate_memory(config, batch=3, tokens=11, num_virtual_tokens=47).step_bytes > small.step_bytes
    assert estimate_memory(config, batch=3, tokens=11, gradient_checkpointing=True).step_bytes < small.step_bytes
    int8, nf4 = (estimate_memory(config, "prompt_tuning", kind, batch=3, tokens=11) for kind in ("int8", "nf4"))
    assert int8.step_bytes > nf4.step_bytes  # LLM.int8 keeps the inputs of its products
    assert estimate_memory(config, batch=3, tokens=11, dtype=torch.bfloat16).weights_bytes == small.weights_bytes / 2


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
    assert "QLoRA" in ran.stdout and " no " in ran.stdout
