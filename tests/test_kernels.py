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
from ncp_loss.difference import Stencil

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


def features_of(
    shape: tuple[int, ...], dtype: torch.dtype, order: str, seed: int, points: int
) -> tuple[list[Tensor], Tensor]:
    """Features at some points, and coefficients of three combinations of them, (3, points, B)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    orders = ["channels_last", *["contiguous"] * (points - 1)] if order == "mixed" else [order] * points
    features = [arranged(normal(*shape).to(DEVICE, dtype), each) for each in orders]
    return features, normal(3, points, shape[0]).to(DEVICE, torch.promote_types(dtype, torch.float32))


@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    order=st.sampled_from(ORDERS),
    points=st.integers(2, 4),
    seed=st.integers(0, 99),
)
def test_kernels_agree_with_their_eager_twins(shape, dtype, order, points, seed):
    features, (model, gap, _) = features_of(shape, dtype, order, seed, points)
    sums, twin = (room._sums(features, model, gap, impl) for impl in ("triton", "eager"))
    tight = torch.finfo(model.dtype).eps
    assert sums.dtype == twin.dtype
    scale = float(twin[:2].amax())  # a margin may be a small difference of large terms
    torch.testing.assert_close(sums, twin, rtol=40 * tight, atol=40 * tight * scale)
    found, twin = (room._cotangent(features, model, impl) for impl in ("triton", "eager"))
    assert found.dtype == dtype
    torch.testing.assert_close(found, twin, rtol=2 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


def test_a_kernels_reduction_is_the_same_on_every_run():
    features, coefficients = features_of((2, 3 * fused.BLOCK * fused.ROUNDS + 5), torch.float32, "contiguous", 0, 4)
    assert len({str(fused.sums(features, coefficients[:2]).tolist()) for _ in range(3)}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ops_pass_torchs_own_checks(dtype):
    features, coefficients = features_of((2, 4, 4, 4), dtype, "channels_last", 0, 3)
    # No autograd of their own: the gradient is computed with the error, outside of autograd.
    which = ("test_schema", "test_faketensor")
    torch.library.opcheck(fused.sums, (features, coefficients[:2]), test_utils=which)
    torch.library.opcheck(fused.combined, (features, coefficients[0]), test_utils=which)


@pytest.mark.parametrize("difference", ["literal", "scaled", "central"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reference", [False, True])
def test_the_loss_is_the_same_with_kernels_as_without(difference, normalize, reference):
    unet = add_lora(small()).to(DEVICE)
    arguments = {k: v.to(DEVICE) for k, v in batch(unet).items() if k != "ref_pred" or reference}
    layers = {"down_blocks.0": 0.5, "mid_block": 1.0}
    losses = [NCP(unet, layers, difference=difference, normalize=normalize, impl=i) for i in ("triton", "eager")]
    found, twin = (loss.errors(**arguments) for loss in losses)
    torch.testing.assert_close(found, twin, rtol=1e-11, atol=0)
    gradient, twin_gradient = (
        torch.autograd.grad(errors.error.sum(), arguments["model_pred"])[0] for errors in (found, twin)
    )
    torch.testing.assert_close(gradient, twin_gradient, rtol=1e-9, atol=1e-12 * float(twin_gradient.abs().max()))


def test_a_loss_runs_eagerly_unless_it_is_asked_for_kernels(monkeypatch):
    monkeypatch.setattr(fused, "sums", None)
    unet = small()
    assert NCP(unet).errors(**batch(unet))[0].isfinite().all()
    with pytest.raises(TypeError):
        NCP(unet, impl="triton").errors(**batch(unet))


def test_kernels_without_triton_are_refused_when_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(importlib.sys.modules, "triton", None)
    monkeypatch.delitem(importlib.sys.modules, "ncp_loss.fused")
    with pytest.raises(ImportError, match="triton"):
        NCP(small(), impl="triton")
    NCP(small())


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


def test_the_error_of_many_layers_makes_nothing_as_large_as_features_but_the_cotangents():
    layers = {f"layer {i}": 1.0 for i in range(3)}
    features = [{k: torch.randn(2, 64, 16, 16, dtype=torch.bfloat16) for k in layers} for _ in range(4)]
    size = features[0]["layer 0"].numel()
    model, gap, target = torch.randn(3, 4, 2)
    stencil = Stencil([], model, gap, target, target)
    made: dict[str, int] = {}
    for impl in ("triton", "eager"):
        with Allocations() as forward:
            _, cotangents, _ = room.feature_errors(features, stencil, layers, normalize=True, impl=impl)
        with Allocations() as backward:
            cotangents()
        made |= {f"{impl} errors": forward.largest, f"{impl} cotangents": backward.largest}
    assert made["triton errors"] < size / 100
    assert made["triton cotangents"] == size  # the cotangents themselves, in the features' dtype
    assert made["eager errors"] == size  # what this test is able to see
