"""The engine under torch.compile, in several processes, and over quantised backbones."""

import contextlib
import logging
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from peft_prompt_ext import engine_status, load_frozen_backbone
from tests.helpers import one_thread, prompt_of, prompted  # noqa: F401
from tests.shared_prefix.helpers import padded
from tests.zoo import AUTO_CLASSES, tiny_config


# bitsandbytes quantises in blocks of 64
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_key_value_heads": 2}


def tiny_model(**changes):
    torch.manual_seed(0)
    return AUTO_CLASSES["CAUSAL_LM"].from_config(tiny_config("llama", **changes)).eval()


def ragged(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, (3 + seed % 2, 9 + seed), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, : seed % 5] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.filterwarnings("ignore")  # tracing reads deprecated attributes
@pytest.mark.parametrize("mode", ["train", pytest.param("eval", marks=pytest.mark.slow)])
def test_a_compiled_model_is_not_compiled_again_for_other_shapes(mode):
    from torch._dynamo.testing import CompileCounter

    model = getattr(prompted(tiny_model(num_hidden_layers=1), "CAUSAL_LM", train_logits="supervised"), mode)()
    counter = CompileCounter()
    compiled, counts = torch.compile(model, backend=counter), []
    for seed in range(7):
        with torch.set_grad_enabled(mode == "train"):
            torch.testing.assert_close(compiled(**ragged(seed)).loss, model(**ragged(seed)).loss)
        counts.append(counter.frame_count)
    assert engine_status(model).packed
    assert 0 < counts[3] == counts[-1], counts  # torch 2.11 compiles for one more batch than torch 2.13


def in_one_of_two_processes(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = prompted(tiny_model(), "CAUSAL_LM").train()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for step in range(2):  # rows of other lengths in each process
        with contextlib.nullcontext() if step else parallel.no_sync():
            parallel(**ragged(2 * step + rank)).loss.backward()
    assert engine_status(parallel).packed
    torch.save(prompt_of(model).grad, Path(folder, f"{rank}.pt"))
    dist.barrier()
    del parallel  # its reducer may hang if it is freed after the group
    dist.destroy_process_group()


def test_two_processes_get_the_mean_of_their_gradients():
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(in_one_of_two_processes, (folder,), nprocs=2)
        gradients = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(2)]
    model = prompted(tiny_model(), "CAUSAL_LM").train()
    for seed in range(4):
        (model(**ragged(seed)).loss / 2).backward()
    assert torch.equal(*gradients)
    torch.testing.assert_close(gradients[0], prompt_of(model).grad)


def in_one_of_two_sharded_processes(rank, folder, quantization):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    base = load_frozen_backbone(folder, quantization=quantization, dtype=torch.float32, quant_storage=torch.float32)
    model, batch = prompted(base, "CAUSAL_LM").train(), padded("left", "CAUSAL_LM")
    expected = model(**batch)
    expected.loss.backward()
    gradient, prompt_of(model).grad = prompt_of(model).grad, None
    mesh = init_device_mesh("cpu", (2,))
    for part in (*base.model.layers, model):
        fully_shard(part, mesh=mesh)
    out = model(**batch)
    out.loss.backward()
    assert engine_status(model).packed
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(prompt_of(model).grad.full_tensor(), gradient)
    with torch.no_grad():  # no kept prefix, because all processes run the same passes
        torch.testing.assert_close(model.eval()(**batch).loss, expected.loss)
    assert not model._engine.prefixes
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:  # as the Trainer does; the other process runs no pass that could gather the prompt
        model.save_pretrained(f"{folder}/adapter", state_dict=state)
        saved = load_file(f"{folder}/adapter/adapter_model.safetensors")["prompt_embeddings"]
        torch.testing.assert_close(saved, state["prompt_encoder.default.embedding.weight"])
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_fully_sharded_backbones_give_the_same_gradients(tmp_path, quantization):
    tiny_model(**SIZES).save_pretrained(tmp_path)

    # the processes compare, and an error in one is raised here
    assert (
        torch.multiprocessing.spawn(in_one_of_two_sharded_processes, (str(tmp_path), quantization), nprocs=2) is None
    )


QUANTIZED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(params=QUANTIZED)
def quantized_base(request, tmp_path):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a line for each int8 product
    tiny_model(**SIZES).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**QUANTIZED[request.param], llm_int8_skip_modules=["lm_head"])
    return request.param, AUTO_CLASSES["CAUSAL_LM"].from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32
    )


def test_quantised_backbones_give_what_pefts_path_gives(quantized_base):
    kind, base = quantized_base
    results = []
    for shared_prefix in (True, False):
        model = prompted(base, "CAUSAL_LM", shared_prefix=shared_prefix, prompt_tuning_init_seed=1)
        out = model(**padded("holes", "CAUSAL_LM"))
        out.loss.backward()
        assert engine_status(model).packed == shared_prefix
        results.append((out.loss, prompt_of(model).grad))
    # int8 also rounds activations, scaled by each token's maximum
    torch.testing.assert_close(*results, rtol=1e-5 if kind == "nf4" else 2e-2, atol=1e-7 if kind == "nf4" else 1e-3)


def replicate(module, copies):
    """As torch.nn.parallel.replicate, which needs GPUs: the modules' parameters are non-leaf tensors."""
    if module not in copies:
        copy = copies[module] = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            copy._modules[name] = replicate(child, copies)
        for name, parameter in module._parameters.items():
            setattr(copy, name, None if parameter is None else parameter * 1)
    return copies[module]


def test_a_replica_of_data_parallel_is_right_on_pefts_path():
    model, batch = prompted(tiny_model(), "CAUSAL_LM").train(), padded("left", "CAUSAL_LM")
    expected = model(**batch)
    (wanted,) = torch.autograd.grad(expected.loss, prompt_of(model))

    replica = replicate(model, {})
    out = replica(**batch)
    (got,) = torch.autograd.grad(out.loss, prompt_of(model))

    assert "DataParallel" in engine_status(replica).reason
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=0)
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()
    assert model(**batch).loss is not None and engine_status(model).packed
