"""Two processes, sharded weights and recomputed activations give the loss and gradients of one process without them."""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from models import batch, small
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint as recompute
from users import AT, RANKS, Build, add_lora, attention_only, full, peft_lora

from ncp_loss import NoiseConditionedPerceptualLoss as NCP
from ncp_loss import frozen_view, ncp_dpo_loss

pytestmark = pytest.mark.slow
PROCESSES = 2
Numbers = dict[str, np.ndarray]  # tensors, as they travel between processes
Run = Callable[..., list[Numbers]]


def join(rank: int, store: Path) -> None:
    """The processes meet in a file: a port that is free now may be another's by the time they listen on it."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "ACCELERATE_USE_CPU": "1"}
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["MASTER_ADDR"] = "127.0.0.1"  # accelerate asks for it, and uses the group that is there
    meet = {"init_method": f"file://{store}", "rank": rank, "world_size": PROCESSES}
    dist.init_process_group("gloo", **meet, timeout=timedelta(minutes=10))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Calls a function in two processes that stay, and gives what each returned."""
    store = tmp_path_factory.mktemp("gloo") / "store"
    spawn = multiprocessing.get_context("spawn")
    pools = [ProcessPoolExecutor(1, spawn, join, (rank, store)) for rank in range(PROCESSES)]

    def run(function: Callable[..., Numbers], *args: Any) -> list[Numbers]:
        futures = [pool.submit(function, *args) for pool in pools]
        return [future.result() for future in futures]

    yield run
    for pool in pools:
        pool.shutdown()


def pairs(size: int = 4) -> dict[str, Any]:
    """The whole batch; what each process takes of it is its own rows, winners first."""
    arguments = batch(small(), size=size, pairs=True)
    return {name: value.detach() for name, value in arguments.items() if name not in ("model_pred", "ref_pred")}


def rows(arguments: dict[str, Any], *which: int) -> dict[str, Any]:
    return {name: torch.cat([half[list(which)] for half in x.chunk(2)]) for name, x in arguments.items()}


def share(arguments: dict[str, Any]) -> dict[str, Any]:
    mine = torch.arange(len(arguments["timesteps"]) // 2).chunk(PROCESSES)[dist.get_rank()]
    return rows(arguments, *mine.tolist())


def preference(
    model: nn.Module, ncp: NCP, reference: nn.Module, arguments: dict[str, Any], *, shrunk: float = 0.9, **options: Any
) -> Any:
    """A step's loss; margins are of order one, where DPO is not linear in its errors."""
    at = [arguments[name] for name in AT]
    with torch.no_grad():
        ref_pred = shrunk * reference(*at).sample  # no pair is a tie, which rounding would break
    # Who trains LoRA with reentrant checkpoints has to give them an input that needs a gradient.
    at[0] = at[0].clone().requires_grad_()
    return ncp_dpo_loss(ncp, model(*at).sample, **arguments, ref_pred=ref_pred, beta=1e5, **options)


def gradients(model: nn.Module) -> Numbers:
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            found[name] = (grad.float() if grad.dtype == torch.bfloat16 else grad).numpy().copy()
    return found


def numbers(out: Any, model: nn.Module) -> Numbers:
    return {name: value.numpy() for name, value in out.metrics.items()} | gradients(model)


@functools.cache
def expected(build: Build, size: int = 4) -> Numbers:
    """One process, the whole batch, nothing recomputed."""
    model = build(small()).train()
    out = preference(model, NCP(model), frozen_view(model), pairs(size))
    out.loss.backward()
    return numbers(out, model)


def assert_same(got: Numbers, want: Numbers, rtol: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    largest = max(np.abs(value).max() for name, value in want.items() if "." in name)
    assert largest > 1e-4
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=rtol, atol=rtol * largest if "." in name else 0, err_msg=name)


def assert_processes_give(want: Numbers, results: list[Numbers], rtol: float = 1e-6) -> None:
    """Each process has the gradients of the whole batch, and the metrics' mean over processes is the batch's."""
    metrics = [name for name in want if "." not in name]
    for got in results:
        assert_same(got | {name: np.mean([each[name] for each in results]) for name in metrics}, want, rtol)


THEIRS = {"": None, "reentrant": True, "not reentrant": False}  # recomputation of the user's model
recomputed = pytest.mark.parametrize(
    ("theirs", "ours"), [(theirs, ours) for theirs in THEIRS for ours in (False, True) if theirs or ours]
)
builds = pytest.mark.parametrize("build", [add_lora, full])


def in_training(build: Build, theirs: str) -> nn.Module:
    model = build(small()).train()
    if theirs:
        function = functools.partial(recompute, use_reentrant=THEIRS[theirs])
        model.enable_gradient_checkpointing(gradient_checkpointing_func=function)
    return model


@builds
@recomputed
def test_recomputed_activations_change_no_gradient(build: Build, theirs: str, ours: bool) -> None:
    model = in_training(build, theirs)
    out = preference(model, NCP(model, checkpoint=ours), frozen_view(model), pairs())
    out.loss.backward()
    got, want = numbers(out, model), expected(build)
    assert got.keys() == want.keys()
    if theirs == "reentrant":  # whose backward passes add up in another order
        assert_same(got, want, rtol=1e-12)
    else:
        assert [name for name in want if not np.array_equal(got[name], want[name])] == []


def under_ddp(build: Build, before: bool, theirs: str, ours: bool) -> Numbers:
    model = in_training(build, theirs)
    early = NCP(model, checkpoint=ours), frozen_view(model)
    wrapped = DDP(model)
    ncp, reference = early if before else (NCP(wrapped, checkpoint=ours), frozen_view(wrapped))
    for _ in range(2):  # DDP complains in the second step of what went wrong in the first
        wrapped.zero_grad()
        out = preference(wrapped, ncp, reference, share(pairs()))
        out.loss.backward()
    return numbers(out, model)


@builds
@pytest.mark.parametrize("before", [False, True], ids=["built after", "built before"])
def test_ddp(run: Run, build: Build, before: bool) -> None:
    assert_processes_give(expected(build), run(under_ddp, build, before, "", False))


def with_buffers(unet: nn.Module) -> nn.Module:
    """LoRA, and a table of positions, as transformers have."""
    unet.conv_in.register_buffer("positions", torch.arange(3.0))
    return add_lora(unet)


def test_ddp_with_buffers_which_it_writes_to_at_every_step(run: Run) -> None:
    assert_processes_give(expected(add_lora), run(under_ddp, with_buffers, True, "", False))


@builds
@recomputed
def test_ddp_with_recomputed_activations(run: Run, build: Build, theirs: str, ours: bool) -> None:
    assert_processes_give(expected(build), run(under_ddp, build, False, theirs, ours))


def under_fsdp(build: Build, before: bool, ours: bool, shard_reference: bool = False) -> Numbers:
    model = build(small()).train()
    early = (NCP(model, checkpoint=ours), frozen_view(model)) if before else None
    for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
        fully_shard(block)
    fully_shard(model)
    ncp, reference = early or (NCP(model, checkpoint=ours), frozen_view(model))
    if shard_reference:
        fully_shard(reference)
    for _ in range(2):
        model.zero_grad()
        out = preference(model, ncp, reference, share(pairs()))
        out.loss.backward()
    return numbers(out, model)


@pytest.mark.parametrize("build", [add_lora, full, attention_only])
@pytest.mark.parametrize("ours", [False, True], ids=["", "ours"])
def test_fsdp2(run: Run, build: Build, ours: bool) -> None:
    assert_processes_give(expected(build), run(under_fsdp, build, False, ours))


def test_fsdp2_of_a_loss_built_before_on_trainable_weights(run: Run) -> None:
    assert_processes_give(expected(full), run(under_fsdp, full, True, False))


@pytest.mark.parametrize(("build", "before"), [(add_lora, False), (full, False), (full, True)])
def test_fsdp2_with_a_reference_that_is_sharded_too(run: Run, build: Build, before: bool) -> None:
    assert_processes_give(expected(build), run(under_fsdp, build, before, False, True))


def sharded_after_the_loss(build: Build) -> Numbers:
    model = build(small())
    ncp = NCP(model)
    fully_shard(model)
    arguments = share(pairs())
    prediction = torch.zeros_like(arguments["target"])
    with pytest.raises(RuntimeError, match=r"conv_in\.\w+ was sharded over processes. Build the loss again"):
        ncp(prediction, **arguments)
    return {}


def test_shared_weights_that_are_sharded_later_are_named(run: Run) -> None:
    run(sharded_after_the_loss, add_lora)


def by_accelerate(build: Build, before: bool) -> Numbers:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == PROCESSES
    model = build(small()).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    early = NCP(model), frozen_view(model)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    ncp, reference = early if before else (NCP(wrapped), frozen_view(wrapped))
    for _ in range(2):
        optimizer.zero_grad()
        out = preference(wrapped, ncp, reference, share(pairs()))
        accelerator.backward(out.loss)
        optimizer.step()
    gathered = {name: accelerator.gather(value).mean() for name, value in out.metrics.items()}
    reduced = accelerator.reduce(out.metrics, "mean")
    torch.testing.assert_close(gathered, reduced)
    return numbers(out._replace(metrics=gathered), accelerator.unwrap_model(wrapped))


@pytest.mark.parametrize("build", [add_lora, peft_lora, full])
@pytest.mark.parametrize("before", [False, True], ids=["built after", "built before"])
def test_accelerate_gathers_the_whole_batchs_metrics_and_gradients(run: Run, build: Build, before: bool) -> None:
    for got in run(by_accelerate, build, before):
        assert_same(got, expected(build))


UNEVEN = [[[0, 1], [2, 3]], [[4, 5], [6]]]  # pairs of each batch, of each process: the last of the data is short


def accumulated(build: Build) -> Numbers:
    """As the docs say: sums, divided by all the pairs of the step; DDP and accelerate divide by the other two."""
    arguments, batches = pairs(7), UNEVEN[dist.get_rank()]
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(batches))
    model = build(small()).train()
    wrapped = accelerator.prepare(model)
    ncp, reference = NCP(wrapped), frozen_view(wrapped)
    mine = torch.tensor(sum(map(len, batches)))
    total = accelerator.reduce(mine, "sum").item()
    scale = accelerator.num_processes * accelerator.gradient_accumulation_steps / total
    sums: dict[str, Tensor] = {}
    for which in batches:
        with accelerator.accumulate(wrapped):
            out = preference(wrapped, ncp, reference, rows(arguments, *which), reduction="sum")
            accelerator.backward(out.loss * scale)
        for name, value in out.metrics.items():
            sums[name] = sums.get(name, torch.zeros(())) + value * len(which)
    metrics = {name: value / total for name, value in accelerator.reduce(sums, "sum").items()}
    return numbers(out._replace(metrics=metrics), model)


@builds
def test_accumulated_gradients_of_uneven_batches_are_the_whole_batchs(run: Run, build: Build) -> None:
    for got in run(accumulated, build):
        assert_same(got, expected(build, 7))


def fresh_lora(unet: nn.Module) -> nn.Module:
    """As training begins: the adapters change nothing yet."""
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(**RANKS))
    return unet


def in_bfloat16(build: Build, how: str, whole: bool, shrunk: float) -> Numbers:
    """The first step, by one process on the whole batch or by each on its share."""
    dtype = torch.float32 if how == "autocast" else torch.bfloat16
    arguments = {name: x.to(dtype) if x.is_floating_point() else x for name, x in pairs().items()}
    model = build(small(dtype)).train()
    wrapped = model if whole else DDP(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        mine = arguments if whole else share(arguments)
        out = preference(wrapped, NCP(wrapped), frozen_view(wrapped), mine, shrunk=shrunk)
    out.loss.backward()
    return numbers(out, model)


half = pytest.mark.parametrize("how", ["autocast", "weights"])


@builds
@half
def test_ddp_in_bfloat16(run: Run, build: Build, how: str) -> None:
    """What is left between them is the rounding of sums over a batch, and of their mean over processes."""
    want = in_bfloat16(build, how, True, 0.9)
    assert_processes_give(want, run(in_bfloat16, build, how, False, 0.9), rtol=0.02)


@half
def test_margins_of_the_first_step_are_zero_in_bfloat16_under_ddp(run: Run, how: str) -> None:
    for got in run(in_bfloat16, fresh_lora, how, False, 1.0):
        assert got["rewards/margins"] == got["rewards/chosen"] == got["rewards/rejected"] == 0
        assert max(np.abs(value).max() for name, value in got.items() if "." in name) > 1e-4


def flattened(build: Build, orig: bool) -> Numbers:
    """FSDP1 takes the parameters of whole modules into one flat tensor, of which each process keeps a part."""
    model = build(small())
    ncp, arguments = NCP(model), share(pairs())
    wrapped = FSDP1(model, use_orig_params=orig, device_id=torch.device("cpu"))
    for make in (NCP, frozen_view):
        with pytest.raises(ValueError, match="flattened by FSDP1: shard with fully_shard"):
            make(wrapped)
    if build is add_lora:
        with pytest.raises(RuntimeError, match=r"conv_in\.\w+ was sharded over processes. Build the loss again"):
            ncp(torch.zeros_like(arguments["target"]), **arguments)
    return {}


@pytest.mark.parametrize(("build", "orig"), [(full, False), (add_lora, True)])
def test_flat_parameters_of_fsdp1_are_refused_by_name(run: Run, build: Build, orig: bool) -> None:
    run(flattened, build, orig)


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: make test-deepspeed"
)


def two_steps(model: nn.Module, step: Callable[[], Any]) -> Numbers:
    """The second step's metrics, and how far each parameter has moved by then."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    start = {name: p.detach().clone() for name, p in named}
    step()
    out = step()
    moved = {name: p.detach() - start[name] for name, p in named}
    return {name: value.numpy() for name, value in (out.metrics | moved).items()}


def descent(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)


@functools.cache
def expected_of_two_steps(build: Build) -> Numbers:
    model = build(small()).train()
    ncp, reference, optimizer, arguments = NCP(model), frozen_view(model), descent(model), pairs()

    def step() -> Any:
        optimizer.zero_grad()
        out = preference(model, ncp, reference, arguments)
        out.loss.backward()
        optimizer.step()
        return out

    return two_steps(model, step)


def deepspeed_engine(model: nn.Module, stage: int) -> nn.Module:
    import deepspeed

    # Where no accelerator is, DeepSpeed compiles an all-reduce of its own at the first start, for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=model, optimizer=descent(model), config=config)[0]


def under_deepspeed(stage: int, build: Build, before: bool) -> Numbers:
    model = build(small()).train()
    early = (NCP(model), frozen_view(model)) if before else None
    engine, arguments = deepspeed_engine(model, stage), share(pairs())
    ncp, reference = early or (NCP(engine), frozen_view(engine))

    def step() -> Any:
        out = preference(engine, ncp, reference, arguments)
        engine.backward(out.loss)
        engine.step()
        return out

    return two_steps(model, step)


@needs_deepspeed
@builds
@pytest.mark.parametrize("before", [False, True], ids=["built after", "built before"])
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_zero_1_and_2(run: Run, stage: int, build: Build, before: bool) -> None:
    """DeepSpeed's optimizer keeps weights in float32, which bounds how exact a step of them is."""
    assert_processes_give(expected_of_two_steps(build), run(under_deepspeed, stage, build, before), rtol=1e-4)


def partitioned(build: Build) -> Numbers:
    model = build(small())
    ncp, arguments = NCP(model), share(pairs())
    engine = deepspeed_engine(model, 3)
    for make in (NCP, frozen_view):
        with pytest.raises(ValueError, match="partitioned by DeepSpeed's ZeRO-3: take ZeRO-2"):
            make(engine)
    with pytest.raises(RuntimeError, match=r"conv_in\.\w+ was sharded over processes. Build the loss again"):
        ncp(torch.zeros_like(arguments["target"]), **arguments)
    return {}


@needs_deepspeed
def test_zero_3_of_deepspeed_is_refused_by_name(run: Run) -> None:
    run(partitioned, add_lora)
