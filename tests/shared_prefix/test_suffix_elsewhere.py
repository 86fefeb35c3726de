"""Prompts behind the text in several processes, over quantised and offloaded backbones, compiled and copied."""

import contextlib
import copy
import logging
import os
import pickle
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import BitsAndBytesConfig

from peft_prompt_ext import PromptTuningExtConfig, engine_status
from peft_prompt_ext._versions import checkpoint_activations
from tests.helpers import one_thread, prompt_of, prompted  # noqa: F401
from tests.peft_models.suffix import assert_equals_rows_alone, make_suffix_batch, run_alone
from tests.shared_prefix.test_engine_elsewhere import QUANTIZED, SIZES, replicate, tiny_model
from tests.shared_prefix.test_shared_prefix import other_model
from tests.test_devices import OFFLOADS
from tests.zoo import AUTO_CLASSES


STEPS = 3


def large_model(**changes):
    base_model = tiny_model(**changes)
    for parameter in base_model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # large enough for attention to matter
    return base_model


def assert_near(got, wanted, rtol=1e-5):
    """Loss and gradient within a relative error."""
    for mine, other in zip(got, wanted, strict=True):
        assert (mine - other).norm() <= rtol * other.norm()


def with_suffix(base_model, **changes):
    changes = {"prompt_position": "suffix", "train_logits": "supervised", **changes}
    return prompted(base_model, "CAUSAL_LM", **changes).train()


def texts_of(model):
    return engine_status(model).texts


def gradient_of(model, batch):
    prompt_of(model).grad = None
    out = model(**batch)
    out.loss.backward()
    return out.loss.detach(), prompt_of(model).grad


def gradient_of_rows_alone(model, batch):
    prompt = prompt_of(model)
    loss, *_ = run_alone(model.get_base_model(), [prompt] * len(batch["labels"]), batch)
    return loss.detach(), torch.autograd.grad(loss, prompt)[0]


def batch_of(rank, step):
    """The first process gets the same rows in each step, the second one gets new rows."""
    return make_suffix_batch("holes", seed=1 if rank == 0 else 2 + step)


def leave():
    """End a process that found no difference, before its interpreter ends: a thread of torch may abort it there."""
    dist.destroy_process_group()
    os._exit(0)


def join(rank, folder):
    store, limit = f"file://{folder}/store", timedelta(seconds=100)  # processes that wait for each other are an error
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)


def in_one_of_two_processes(rank, folder):
    join(rank, folder)
    model = with_suffix(large_model())
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for step in range(STEPS):
        with contextlib.nullcontext() if step == STEPS - 1 else parallel.no_sync():
            parallel(**batch_of(rank, step)).loss.backward()
    assert engine_status(parallel).packed
    torch.save((prompt_of(model).grad, texts_of(parallel).hits), Path(folder, f"{rank}.pt"))
    dist.barrier()
    del parallel  # its reducer may hang if it is freed after the group
    leave()


def test_two_processes_get_the_mean_of_their_gradients_with_texts_kept_in_one():
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(in_one_of_two_processes, (folder,), nprocs=2)
        gradients, hits = zip(*(torch.load(Path(folder, f"{rank}.pt")) for rank in range(2)), strict=True)
    model = with_suffix(large_model())
    for step in range(STEPS):  # all rows of the step in one batch
        batches = [batch_of(rank, step) for rank in range(2)]
        model(**{name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}).loss.backward()
    assert torch.equal(*gradients)
    assert_near([gradients[0]], [prompt_of(model).grad])
    assert hits == (3 * (STEPS - 1), 0)


def shard(model, version):
    """Shard a model with FSDP 1 or 2. Returns the model to call."""
    layers = model.get_base_model().model.layers
    if version == 2:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for part in (*layers, model):
            fully_shard(part, mesh=mesh)
        return model
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy, device = ModuleWrapPolicy({type(layers[0])}), torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)


def gather_gradient(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    if not isinstance(model, FullyShardedDataParallel):
        return prompt_of(model).grad.full_tensor()
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        return prompt_of(model.module).grad.clone()


def in_one_of_two_sharded_processes(rank, folder, version):
    join(rank, folder)
    batches = [batch_of(rank, step) for step in (0, 0)]  # texts of the first step could be kept
    whole, model = with_suffix(large_model()), shard(with_suffix(large_model()), version)
    for step, batch in enumerate(batches):
        loss, _ = gradient_of(whole, batch)
        out = model(**batch)
        out.loss.backward()
        assert engine_status(model).packed
        assert texts_of(model) is None  # all processes have to run the same passes
        mean = (step + 1) * prompt_of(whole).grad
        dist.all_reduce(mean)
        assert_near((out.loss, gather_gradient(model)), (loss, mean / 2))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).loss, loss)
    assert texts_of(model) is None
    dist.barrier()
    leave()


def with_both_positions():
    model = with_suffix(large_model())
    prefix = {"num_virtual_tokens": 3, "prompt_tuning_init": "RANDOM_UNIFORM"}
    model.add_adapter("prefix", PromptTuningExtConfig(task_type="CAUSAL_LM", **prefix))
    return model


def in_one_of_two_processes_of_other_positions(rank, folder):
    join(rank, folder)
    whole, model, batch = with_both_positions(), shard(with_both_positions(), 2), batch_of(rank, 0)
    names = ["default", "default", "__base__"] if rank == 0 else ["default"] * 3
    loss, out = whole(**batch, adapter_names=names).loss, model(**batch, adapter_names=names)
    out.loss.backward()
    assert_near([out.loss], [loss])
    with torch.no_grad():
        names = ["default" if rank == 0 else "prefix"] * 3
        loss, out = (one.eval()(**batch, adapter_names=names).loss for one in (whole, model))
    assert_near([out], [loss])
    dist.barrier()
    leave()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_sharded_processes_with_other_positions_run_the_same_passes(tmp_path):
    assert torch.multiprocessing.spawn(in_one_of_two_processes_of_other_positions, (str(tmp_path),), nprocs=2) is None


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("version", [1, 2])
def test_sharded_backbones_give_the_same_gradients_and_keep_no_texts(tmp_path, version):
    # the processes compare, and an error in one is raised here
    arguments = str(tmp_path), version
    assert torch.multiprocessing.spawn(in_one_of_two_sharded_processes, arguments, nprocs=2) is None


@pytest.fixture(params=[*QUANTIZED, "int8 with outliers"])
def quantized_base(request, tmp_path):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a line for each int8 product
    base, kind = large_model(**SIZES), request.param.split()[0]
    if request.param.endswith("outliers"):
        with torch.no_grad():
            for layer in base.model.layers:
                layer.input_layernorm.weight[3] = 20
    base.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**QUANTIZED[kind], llm_int8_skip_modules=["lm_head"])
    return request.param, AUTO_CLASSES["CAUSAL_LM"].from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32
    )


def test_quantised_backbones_give_what_each_row_gives_alone(quantized_base):
    kind, base = quantized_base
    model, batch = with_suffix(base), make_suffix_batch("holes")
    wanted = gradient_of_rows_alone(model, batch)
    # int8 rounds activations too, scaled by each token's maximum; an outlier changes how all tokens of its pass round
    rtol = {"nf4": 1e-5, "int8": 2e-2, "int8 with outliers": 5e-2}[kind]
    for hits in (0, 3):
        assert_near(gradient_of(model, batch), wanted, rtol)
        assert engine_status(model).packed
        assert texts_of(model).hits == hits
    model.peft_config["default"].text_cache = "disk"
    with pytest.raises(ValueError, match="not for quantised weights"):
        model(**batch)


@pytest.mark.filterwarnings("ignore")  # tracing reads deprecated attributes
def test_a_compiled_model_gives_the_same_and_is_not_compiled_again_for_other_rows():
    from torch._dynamo.testing import CompileCounter

    model = with_suffix(large_model(num_hidden_layers=1))
    counter = CompileCounter()
    compiled, counts = torch.compile(model, backend=counter), []
    for seed in range(7):
        batch = make_suffix_batch(["holes", "left", "right"][seed % 3], (1 + seed % 2, 2, 1), seed)
        batch = {name: value[: 2 + seed % 2] for name, value in batch.items()}
        wanted = gradient_of(model, batch)
        prompt_of(model).grad = None
        loss = compiled(**batch).loss
        loss.backward()
        assert_near((loss, prompt_of(model).grad), wanted)
        counts.append(counter.frame_count)
    assert engine_status(compiled).packed
    assert 0 < counts[3] == counts[-1], counts


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradient(use_reentrant):
    model, batch = with_suffix(large_model()), make_suffix_batch("holes")
    wanted = gradient_of_rows_alone(model, batch)
    checkpoint_activations(model.get_base_model(), use_reentrant)
    for hits in (0, 3):
        assert_near(gradient_of(model, batch), wanted)
        assert engine_status(model).packed
        assert texts_of(model).hits == hits


@pytest.mark.parametrize("place", OFFLOADS)
def test_offloaded_and_dispatched_backbones_give_what_each_row_gives_alone(tmp_path, place):
    model, batch = with_suffix(large_model()), make_suffix_batch("holes")
    wanted = gradient_of_rows_alone(model, batch)
    with torch.no_grad():
        OFFLOADS[place](model.get_base_model(), tmp_path)
    for _ in range(2):
        assert_near(gradient_of(model, batch), wanted)
    assert engine_status(model).packed
    assert texts_of(model) is None or texts_of(model).hits == 3


def test_a_replica_of_data_parallel_is_right_on_pefts_path():
    model, batch = with_suffix(large_model()), make_suffix_batch("holes")
    wanted = gradient_of_rows_alone(model, batch)
    replica = replicate(model, {})
    loss = replica(**batch).loss
    (gradient,) = torch.autograd.grad(loss, prompt_of(model))
    assert "DataParallel" in engine_status(replica).reason
    assert_near((loss, gradient), wanted)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_has_no_texts_of_its_source(how):
    model, batch = with_suffix(large_model()), make_suffix_batch("holes")
    model(**batch)
    model(**batch)
    assert texts_of(model).hits == 3
    twin = COPIES[how](model)
    assert texts_of(twin) is None
    with torch.no_grad():
        next(twin.get_base_model().model.parameters()).mul_(1.5)
    assert_near(gradient_of(twin, batch), gradient_of_rows_alone(twin, batch))
    assert texts_of(twin).hits == 0
    assert_near(gradient_of(model, batch), gradient_of_rows_alone(model, batch))
    assert texts_of(model).hits == 6


def test_models_that_the_engine_does_not_take_give_what_each_row_gives_alone():
    model = with_suffix(other_model("mamba"), train_logits="all")
    assert_equals_rows_alone(model, make_suffix_batch("right"))
    assert not engine_status(model).packed
