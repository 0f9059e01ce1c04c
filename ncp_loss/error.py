"""error: one number per sample from features at a stencil's points, and the cotangent of those features."""

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
    """Per-sample errors, (B,) each; the gradient comes with ``error``, and ``ref_error`` has none."""

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
    r"""Mean square differences of features, summed over layers by weight (paper, eq. 13), of model and reference.

    With w the model's difference of features, and u the model's less the reference's,

    ``error = sum_l w_l mean |w|^2``, ``ref_error = sum_l w_l mean |w - u|^2`` and
    ``error - ref_error = sum_l w_l mean u (2 w - u)``,

    the mean over everything but the batch. The last line is the sample's margin, negated. It is summed as it is,
    since two errors that agree to several digits would leave rounding, and the larger error is the smaller one plus it.

    Args:
        features: at each of the stencil's points, by layer, (B, ...).
        points: the stencil, whose coefficients combine them.
        weights: of each layer.
        normalize: divide each layer's term by the mean square of the target's features.
        unit: (B,), what the latents moved by per unit of prediction, B; errors are divided by its square.
        impl: "eager", or "triton": kernels that make no float32 copy of features.

    Returns:
        The errors, float32 at least. A function that makes ``d error / d features`` by layer, in the features' dtype
        and of order one, since half precision holds neither very small cotangents nor very large ones. What to
        multiply these by, (B,).
    """
    gap = torch.zeros_like(points.model) if points.gap is None else points.gap
    per_unit = torch.ones_like(gap[0]) if unit is None else _inverse(unit.square())
    total, slopes, sizes = torch.zeros_like(gap[:1]).expand(3, -1), {}, []
    for layer, weight in weights.items():
        at = [f[layer] for f in features]
        sums, relative = _sums(at, points.model, gap, impl), weight * per_unit
        if normalize:
            relative = relative * _inverse(_sums(at, points.target, torch.zeros_like(gap), impl)[0])
        total = total + relative * sums
        slopes[layer] = relative * (2 / at[0][0].numel())  # d error / d features is this times w
        sizes.append(slopes[layer] * sums[0].sqrt())
    size = torch.stack(sizes).amax(0)

    def cotangents() -> Features:
        of_order_one = points.model * _inverse(size)
        return {k: _cotangent([f[k] for f in features], of_order_one * slope, impl) for k, slope in slopes.items()}

    error, reference, margin = total
    smaller = torch.minimum(error, reference)
    errors = Errors(smaller + margin.relu(), smaller + (-margin).relu() if points.gap is not None else None)
    return errors, cotangents, size


def attach(error: Tensor, prediction: Tensor, slope: Tensor) -> Tensor:
    """``error`` (B,), whose derivative with respect to ``prediction`` is ``slope``, known already, (B, ...)."""
    return cast(Tensor, _Attached.apply(prediction, error, slope))


def check_reverse_mode(prediction: Tensor) -> None:
    """Refuse forward-mode derivatives, which would come out as 0."""
    if not torch.compiler.is_compiling() and unpack_dual(prediction).tangent is not None:
        raise RuntimeError("ncp errors have reverse-mode derivatives only: model_pred must carry no tangent (jvp)")


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prediction: Tensor, error: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.dtype = prediction.dtype
        return error.view_as(error)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a second derivative would come out as 0
            raise RuntimeError("ncp errors have first derivatives only: create_graph=True cannot be used with them")
        (slope,) = ctx.saved_tensors
        return (per_sample(gradient, slope) * slope).to(ctx.dtype), None, None


# The two passes over features, each in float32 at least; ncp_loss/fused.py has both as kernels.


def _sums(features: list[Tensor], model: Tensor, gap: Tensor, impl: str) -> Tensor:
    """``mean |w|^2``, ``mean |w - u|^2`` and ``mean u (2 w - u)``, (3, B)."""
    if impl == "triton":
        from .fused import sums

        coefficients = torch.stack([model, gap]).to(torch.promote_types(model.dtype, features[0].dtype))
        return cast(Tensor, sums(features, coefficients))
    w, u = _combined(features, model), _combined(features, gap)
    means = [reduce(x, "b ... -> b", "mean") for x in (w.square(), (w - u).square(), u * (2 * w - u))]
    return torch.stack(means)


def _cotangent(features: list[Tensor], coefficients: Tensor, impl: str) -> Tensor:
    """``sum_i coefficients_i features_i`` in the features' dtype."""
    if impl == "triton":
        from .fused import combined

        return cast(Tensor, combined(features, coefficients))
    return _combined(features, coefficients).to(features[0].dtype)


def _combined(features: list[Tensor], coefficients: Tensor) -> Tensor:
    dtype = at_least_float32(features[0])
    terms = [per_sample(c, f) * f.to(dtype) for c, f in zip(coefficients, features, strict=True)]
    return cast(Tensor, sum(terms))


def _inverse(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0: where nothing moved, or a layer is silent, there is no error to divide."""
    return torch.where(x == 0, torch.zeros_like(x), 1 / x)
