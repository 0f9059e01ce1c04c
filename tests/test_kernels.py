"""The Triton kernels give what the eager passes give; interpreted on a CPU, or as they are on a GPU."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from users import add_lora, batch, small

from ncp_loss import NoiseConditionedPerceptualLoss as NCP
from ncp_loss import error as room
from ncp_loss import fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# More than one program, and not a multiple of what a program holds.
SHAPES = [(2, 3), (1, 1, 1, 1), (3, 5, 7, 9), (2, 40, 16, 17), (2, 4, 3, 4, 5), (2, fused.BLOCK * fused.ROUNDS + 1)]
ORDERS = ["contiguous", "channels_last", "transposed", "every other", "mixed"]


def arranged(x: Tensor, order: str) -> Tensor:
    """The same values, otherwise in memory."""
    if order == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if order == "transposed" and x.ndim > 2:
        return x.transpose(1, -1).contiguous().transpose(1, -1)
    if order == "every other":
        return torch.stack([x, torch.full_like(x, float("nan"))], -1).flatten(-2)[..., ::2]
    return x


def ends(shape: tuple[int, ...], dtype: torch.dtype, order: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for _ in range(2))
    slope = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    orders = (order, "contiguous") if order == "mixed" else (order, order)
    first = "channels_last" if order == "mixed" else orders[0]
    return arranged(x, first), arranged(y, orders[1]), slope.to(DEVICE, torch.promote_types(dtype, torch.float32))


@given(st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.sampled_from(ORDERS), st.booleans(), st.integers(0, 99))
def test_kernels_agree_with_their_eager_twins(shape, dtype, order, alone, seed):
    x, y, slope = ends(shape, dtype, order, seed)
    y = None if alone else y
    tight = torch.finfo(slope.dtype).eps
    square, twin = room._mean_square(x, y, True), room._mean_square(x, y, False)
    assert square.dtype == twin.dtype
    torch.testing.assert_close(square, twin, rtol=20 * tight, atol=0)
    scaled, twin = room._scaled_difference(x, y, slope, True), room._scaled_difference(x, y, slope, False)
    assert scaled.dtype == dtype
    torch.testing.assert_close(scaled, twin, rtol=torch.finfo(dtype).eps, atol=0)


def test_a_kernels_reduction_is_the_same_on_every_run():
    x, y, _ = ends((2, 3 * fused.BLOCK * fused.ROUNDS + 5), torch.float32, "contiguous", 0)
    assert len({tuple(fused.mean_square(x, y).tolist()) for _ in range(3)}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ops_pass_torchs_own_checks(dtype):
    x, y, slope = ends((2, 4, 4, 4), dtype, "channels_last", 0)
    # No autograd of their own: the edge of the graph is error._Leave, whose backward calls the second op.
    which = ("test_schema", "test_faketensor")
    torch.library.opcheck(fused.mean_square, (x, y), test_utils=which)
    torch.library.opcheck(fused.mean_square, (x, None), test_utils=which)
    torch.library.opcheck(fused.scaled_difference, (x, y, slope), test_utils=which)


def loss_and_gradient(loss: Any, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    value = loss(**arguments)
    return value.detach(), *torch.autograd.grad(value, arguments["model_pred"])


@pytest.mark.parametrize("difference", ["literal", "scaled", "central", "tangent"])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_loss_is_the_same_with_kernels_as_without(difference, normalize):
    unet = add_lora(small()).to(DEVICE)
    arguments = {k: v.to(DEVICE) for k, v in batch(unet).items() if k != "ref_pred"}
    layers = {"down_blocks.0": 0.5, "mid_block": 1.0}
    losses = [NCP(unet, layers, difference=difference, normalize=normalize, impl=i) for i in ("triton", "eager")]
    (value, gradient), (twin, twin_gradient) = (loss_and_gradient(loss, arguments) for loss in losses)
    torch.testing.assert_close(value, twin, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, twin_gradient, rtol=1e-9, atol=1e-12 * float(twin_gradient.abs().max()))


@pytest.mark.skipif(DEVICE == "cuda", reason="auto takes the kernels on a GPU")
def test_auto_runs_eagerly_on_a_cpu(monkeypatch):
    monkeypatch.setattr(fused, "mean_square", None)
    unet = small()
    assert NCP(unet).errors(**batch(unet))[0].isfinite().all()


def test_kernels_without_triton_are_refused_when_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(importlib.sys.modules, "triton", None)
    monkeypatch.delitem(importlib.sys.modules, "ncp_loss.fused")
    with pytest.raises(ImportError, match="triton"):
        NCP(small(), impl="triton")
    NCP(small(), impl="auto")


class Allocations(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given_storages = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given_storages:
                self.largest = max(self.largest, x.numel())
        return out


def test_the_error_of_many_layers_makes_nothing_as_large_as_features_but_the_gradient():
    layers = {f"layer {i}": 1.0 for i in range(3)}
    plus, minus = ({k: torch.randn(2, 64, 16, 16, dtype=torch.bfloat16) for k in layers} for _ in range(2))
    graph = {k: f.clone().requires_grad_() for k, f in plus.items()}
    size, scale = plus["layer 0"].numel(), torch.ones(2)
    gate = torch.ones(2, requires_grad=True)
    difference = room.FeatureDifference(plus, minus, scale, minus, graph, gate)
    made: dict[str, int] = {}
    for impl in ("triton", "eager"):
        with Allocations() as forward:
            error = room.feature_error(difference, layers, normalize=True, impl=impl)
        with Allocations() as backward:
            torch.autograd.grad(error.sum(), list(graph.values()))
        made |= {f"{impl} forward": forward.largest, f"{impl} backward": backward.largest}
    assert made["triton forward"] < size / 100
    assert made["triton backward"] == size  # the gradients themselves, in the features' dtype
    assert made["eager forward"] == size  # what this test is able to see
