"""The Triton kernels give what the eager passes give; interpreted on a CPU, or as they are on a GPU."""

from __future__ import annotations

import importlib
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from einops import reduce
from hypothesis import given
from hypothesis import strategies as st
from models import batch, small
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from users import add_lora

from ncp_loss import NoiseConditionedPerceptualLoss as NCP
from ncp_loss import error as room
from ncp_loss import fused
from ncp_loss.difference import Stencil
from ncp_loss.error import Errors
from ncp_loss.tensors import per_sample

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


class Given(NamedTuple):
    """What an error takes: features at a stencil's points, and coefficients of ordinary size, (points, B)."""

    features: list[Tensor]
    model: Tensor
    gap: Tensor

    def spread(self, coefficients: Tensor) -> Tensor:
        """Sizes of the terms that a combination adds: its rounding is in proportion to these, not to their sum."""
        return sum(abs(per_sample(c, f) * f.double()) for c, f in zip(coefficients, self.features, strict=True))


def given_at(points: int, shape: tuple[int, ...], dtype: torch.dtype, order: str, seed: int) -> Given:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE)

    orders = ["channels_last" if order == "mixed" else order, *["contiguous" if order == "mixed" else order] * 3]
    features = [arranged(normal(*shape).to(dtype), orders[i]) for i in range(points)]
    return Given(features, *normal(2, points, shape[0]).to(torch.promote_types(dtype, torch.float32)))


@given(st.integers(2, 4), st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.sampled_from(ORDERS), st.integers(0, 99))
def test_kernels_agree_with_their_eager_twins(points, shape, dtype, order, seed):
    made = given_at(points, shape, dtype, order, seed)
    sums, twins = (room._sums(*made, impl) for impl in ("triton", "eager"))
    assert sums.dtype == twins.dtype
    assert sums.shape == twins.shape == (3, shape[0])
    terms = made.spread(2 * abs(made.model) + abs(made.gap))
    assert (abs(sums - twins) <= 20 * torch.finfo(sums.dtype).eps * reduce(terms**2, "b ... -> b", "mean")).all()

    combined, twin = (room._cotangent(made.features, made.model, impl) for impl in ("triton", "eager"))
    assert combined.dtype == twin.dtype == dtype
    assert combined.shape == shape
    rounding = torch.finfo(dtype).eps * abs(twin.double()).clamp(min=torch.finfo(dtype).tiny)
    bound = rounding + 4 * torch.finfo(made.model.dtype).eps * made.spread(made.model)
    assert (abs(combined.double() - twin.double()) <= bound).all()


def test_float64_features_are_summed_in_float64_whatever_the_coefficients_are_in():
    made = given_at(3, (2, 5, 7, 9), torch.float64, "contiguous", 0)
    narrow = made._replace(model=made.model.float(), gap=made.gap.float())
    sums, twins = (room._sums(*narrow, impl) for impl in ("triton", "eager"))
    assert sums.dtype == twins.dtype == torch.float64
    torch.testing.assert_close(sums, twins, rtol=1e-12, atol=1e-13)


def test_a_kernels_reduction_is_the_same_on_every_run():
    made = given_at(4, (2, 3 * fused.BLOCK * fused.ROUNDS + 5), torch.float32, "contiguous", 0)
    assert len({tuple(room._sums(*made, "triton").flatten().tolist()) for _ in range(3)}) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("points", [2, 3, 4])
def test_the_ops_pass_torchs_own_checks(points, dtype):
    features, model, gap = given_at(points, (2, 4, 4, 4), dtype, "channels_last", 0)
    # No autograd of their own: the loss calls them without gradients and attaches the slope itself.
    which = ("test_schema", "test_faketensor")
    torch.library.opcheck(fused.sums, (features, torch.stack([model, gap])), test_utils=which)
    torch.library.opcheck(fused.combined, (features, model), test_utils=which)


def errors_and_gradient(loss: NCP, arguments: dict[str, Any]) -> tuple[Errors, Tensor]:
    errors = loss.errors(**arguments)
    return errors, *torch.autograd.grad(errors.error.sum(), arguments["model_pred"])


@pytest.mark.parametrize("difference", ["literal", "scaled", "central"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reference", [False, True])
def test_the_loss_is_the_same_with_kernels_as_without(difference, normalize, reference):
    unet = add_lora(small()).to(DEVICE)
    arguments = {k: v.to(DEVICE) for k, v in batch(unet).items() if reference or k != "ref_pred"}
    layers = {"down_blocks.0": 0.5, "mid_block": 1.0}
    losses = [NCP(unet, layers, difference=difference, normalize=normalize, impl=i) for i in ("triton", "eager")]
    (errors, gradient), (twins, twin_gradient) = (errors_and_gradient(loss, arguments) for loss in losses)
    torch.testing.assert_close(errors.error, twins.error, rtol=1e-11, atol=0)
    torch.testing.assert_close(gradient, twin_gradient, rtol=1e-9, atol=1e-12 * float(twin_gradient.abs().max()))
    if reference:
        margin, twin = (e.error - e.ref_error for e in (errors, twins))
        torch.testing.assert_close(margin, twin, rtol=1e-12, atol=1e-12 * float(twins.error.detach().max()))


def test_a_loss_runs_eagerly_unless_it_is_asked_for_kernels(monkeypatch):
    monkeypatch.setattr(fused, "sums", None)
    unet = small()
    assert NCP(unet).errors(**batch(unet)).error.isfinite().all()
    with pytest.raises(TypeError):
        NCP(unet, impl="triton").errors(**batch(unet))


def test_kernels_without_triton_are_refused_when_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(importlib.sys.modules, "triton", None)
    monkeypatch.delitem(importlib.sys.modules, "ncp_loss.fused")
    with pytest.raises(ImportError, match="triton"):
        NCP(small(), impl="triton")
    NCP(small())  # which needs none


class Allocations(TorchDispatchMode):
    """What operations made that is as large as one layer's features: dtypes, one for each tensor."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.made = size, list[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        fresh = (x for x in tree_leaves(out) if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known)
        self.made += [x.dtype for x in fresh if x.numel() >= self.size / 100]
        return out


@pytest.mark.parametrize("points", [2, 3, 4])
def test_kernels_make_nothing_as_large_as_features_but_the_cotangents(points):
    layers = {f"layer {i}": 1.0 for i in range(3)}
    made = [given_at(points, (2, 64, 16, 16), torch.bfloat16, "channels_last", i) for i in range(3)]
    features = [dict(zip(layers, at, strict=True)) for at in zip(*(m.features for m in made), strict=True)]
    stencil, allocated = Stencil([], made[0].model, made[0].gap, made[0].model, made[0].model), {}
    for impl, trains in itertools.product(("triton", "eager"), (True, False)):
        with Allocations(made[0].features[0].numel()) as allocations:
            _, cotangents, _ = room.feature_errors(features, stencil, layers, normalize=True, impl=impl)
            if trains:
                cotangents()
        allocated[impl, trains] = allocations.made
    assert allocated["triton", True] == [torch.bfloat16] * 3  # one for each layer, in the features' dtype
    assert allocated["triton", False] == []
    assert torch.float32 in allocated["eager", False]  # what this test is able to see
