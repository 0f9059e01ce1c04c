"""error: one number per sample from the features at a stencil's points, and its derivative by these features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from einops import reduce
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .difference import Stencil
from .tensors import Features, at_least_float32, per_sample


class Errors(NamedTuple):
    """Per-sample errors, (B,) each. ``error`` has a gradient, and ``ref_error`` has none."""

    error: Tensor
    ref_error: Tensor | None = None


def feature_errors(
    features: Sequence[Features],
    points: Stencil,
    weights: Mapping[str, float],
    normalize: bool = False,
    unit: Tensor | None = None,
    impl: str = "eager",
) -> tuple[Errors, Callable[[], Features], Tensor]:
    r"""The model's and the reference's errors: mean square differences of features (paper, eq. 13).

    Let w be the model's difference of features, and u the model's minus the reference's. The layers' terms are added
    with the weights ``c_l``:

    ``error = sum_l c_l mean |w|^2``, ``ref_error = sum_l c_l mean |w - u|^2`` and
    ``error - ref_error = sum_l c_l mean u (2 w - u)``,

    where the mean is over everything but the batch. The last line is the margin, negated. Two errors that agree to
    several digits would leave little of it but rounding, so it is computed as written here. The larger error is then
    the smaller one plus its size.

    Args:
        features: the features at each of the stencil's points, by layer, (B, ...).
        points: the stencil, whose coefficients combine the features.
        weights: the weight of each layer.
        normalize: whether each layer's term is divided by the mean square of the target's features.
        unit: B of the reverse step, (B,), or None. Errors are divided by its square.
        impl: "eager", or "triton" for kernels that make no float32 copy of features.

    Returns:
        The errors, in float32 or better. A function that makes the cotangents by layer, in the features' dtype: they
        are ``d error / d features`` over a size, since half precision can hold neither very small numbers nor very
        large ones. That size, (B,), by which what is pulled back from the cotangents must be multiplied.
    """
    ones = torch.ones_like(points.model[0])
    per_unit = ones if unit is None else _inverse(unit.square())
    total, slopes, sizes = torch.zeros_like(ones).expand(3, -1), {}, []
    for layer, weight in weights.items():
        at = [f[layer] for f in features]
        sums, relative = _sums(at, points.model, points.gap, impl), weight * per_unit
        if normalize:
            relative = relative * _inverse(_sums(at, points.target, None, impl)[0])
        total = total + relative * sums
        slopes[layer] = relative * (2 / at[0][0].numel())  # the derivative of error by w is this times w
        sizes.append(slopes[layer] * sums[0].sqrt())
    size = torch.stack(sizes).amax(0)  # the rms of the derivative by w, in the layer where it is largest

    def cotangents() -> Features:
        of_order_one = points.model * _inverse(size)
        return {k: _cotangent([f[k] for f in features], of_order_one * slope, impl) for k, slope in slopes.items()}

    error, reference, excess = total
    # `error` and `reference` were each summed with rounding of their own, which their difference would keep.
    smaller = torch.minimum(error, reference)
    errors = Errors(smaller + excess.relu(), smaller + (-excess).relu() if points.gap is not None else None)
    return errors, cotangents, size


def attach(error: Tensor, prediction: Tensor, slope: Tensor) -> Tensor:
    """``error``, (B,), with the derivative ``slope``, (B, ...), with respect to ``prediction``."""
    return cast(Tensor, _Attached.apply(prediction, error, slope))


def check_reverse_mode(prediction: Tensor) -> None:
    """Refuse forward-mode derivatives, which would come out as 0, and functional ones, which torch cannot take here."""
    if torch.compiler.is_compiling():
        return
    if unpack_dual(prediction).tangent is not None:
        raise RuntimeError("ncp errors have reverse-mode derivatives only: model_pred must carry no tangent (jvp)")
    if getattr(torch._C, "_are_functorch_transforms_active", bool)():
        raise RuntimeError("ncp errors must be computed outside of torch.func's transforms: call backward() instead")


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prediction: Tensor, error: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.dtype = prediction.dtype
        return error.clone()  # no view, so that the caller may write into it

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # Gradients are enabled in backward where create_graph=True. A second derivative would come out as 0.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("ncp errors have first derivatives only: create_graph=True cannot be used with them")
        (slope,) = ctx.saved_tensors
        return (per_sample(gradient, slope) * slope).to(ctx.dtype), None, None


# The two passes over features, each computed in float32 or better. ncp_loss/fused.py has both as kernels.


def _sums(features: list[Tensor], model: Tensor, gap: Tensor | None, impl: str) -> Tensor:
    """``mean |w|^2``, ``mean |w - u|^2`` and ``mean u (2 w - u)`` of each sample, (3, B). Without a gap u is 0."""
    if impl == "triton":
        from .fused import sums

        coefficients = torch.stack([model, torch.zeros_like(model) if gap is None else gap]).to(
            torch.promote_types(model.dtype, features[0].dtype)
        )
        return cast(Tensor, sums(features, coefficients))
    w = _combined(features, model)
    if gap is None:
        error = reduce(w.square(), "b ... -> b", "mean")
        return torch.stack([error, error, torch.zeros_like(error)])
    u = _combined(features, gap)
    means = [reduce(x, "b ... -> b", "mean") for x in (w.square(), (w - u).square(), u * (2 * w - u))]
    return torch.stack(means)


def _cotangent(features: list[Tensor], coefficients: Tensor, impl: str) -> Tensor:
    """``sum_i coefficients_i features_i`` in the features' dtype."""
    if impl == "triton":
        from .fused import combined

        return cast(Tensor, combined(features, coefficients))
    return _combined(features, coefficients).to(features[0].dtype)


def _combined(features: list[Tensor], coefficients: Tensor) -> Tensor:
    """``sum_i coefficients_i features_i`` in float32 or better."""
    dtype = at_least_float32(features[0])
    terms = [per_sample(c, f) * f.to(dtype) for c, f in zip(coefficients, features, strict=True)]
    return cast(Tensor, sum(terms))


def _inverse(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0. There the latents did not move, or a layer's features are all 0, and errors are 0."""
    return torch.where(x == 0, torch.zeros_like(x), 1 / x)
