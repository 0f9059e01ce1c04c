"""error: one number per sample from a difference of features, in float32 or better, and the cotangent it sends back."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, cast

import torch
from einops import reduce
from torch import Tensor
from torch.autograd.function import once_differentiable

from .difference import FeatureDifference
from .schedule import per_sample


def feature_error(
    difference: FeatureDifference,
    weights: Mapping[str, float],
    *,
    normalize: bool = False,
    unit: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Per-sample mean square of a feature difference, summed over layers by weight (paper, eq. 13).

    ``error_b = sum_l w_l mean(|scale_b (plus_l - minus_l)|^2)``, the mean over everything but the batch.

    Args:
        difference: features at both ends, (B, ...) each, the scale of their difference, (B,), and the graph.
        weights: of each layer.
        normalize: divide each layer's term by the mean square of the target's features.
        unit: (B,), what the latents moved by per unit of prediction, B; the error is divided by its square.
        impl: "eager", or "triton": kernels that make no float32 copy of features; "auto": those on a GPU, where triton
            is installed and no compiler is at work, which fuses the eager passes itself.

    Returns:
        (B,), float32 at least.
    """
    plus, minus, scale, graph = difference.plus, difference.minus, difference.scale, difference.graph
    fused = _use_triton(impl, scale)
    with torch.no_grad():
        per_unit = torch.ones_like(scale) if unit is None else _inverse(unit.square())
        error, slopes, sizes = torch.zeros_like(scale), [], []
        for layer, weight in weights.items():
            square = _mean_square(plus[layer], minus[layer] if minus else None, fused)
            relative = torch.full_like(square, weight)
            if normalize:
                relative = relative * _inverse(_energy(difference, layer, square, fused))
            error = error + relative * square
            slopes.append(relative * (2 / plus[layer][0].numel()))
            sizes.append(slopes[-1] * square.sqrt())
        error = error * per_unit * scale.square()
        if graph is None:
            return error
        # d error / d (features of the graph) is slope * (plus - minus) * per_unit * scale: one scale of the two, since
        # the graph's point moves by the displacement unscaled. The encoder's backward pass gets it divided by the size
        # of its largest layer; that size, for each sample, goes through the gate.
        size = torch.stack(sizes).amax(0)
        slope = torch.stack(slopes) * _inverse(size)
    ends = [*plus.values(), *(minus or {}).values()]
    fixed = [f for f in ends if all(f is not g for g in graph.values())]
    size = per_unit * scale * size
    return cast(Tensor, _Leave.apply(difference.gate, error, size, slope, len(ends), fused, *graph.values(), *fixed))


class _Leave(torch.autograd.Function):
    """The error; backward, a cotangent of order one for the features of the graph, and its true size for the gate."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, error: Tensor, size: Tensor, slope: Tensor, ends: int, fused: bool, *features: Tensor
    ) -> Tensor:
        # The features are the graph's, then the ends; where the graph stands at the plus end, it is not given twice.
        ctx.fixed, ctx.fused = len(features) - len(slope), fused
        ctx.save_for_backward(size, slope, *features[len(features) - ends :])
        return error.view_as(error)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        size, slope, *ends = ctx.saved_tensors
        plus, minus = ends[: len(slope)], ends[len(slope) :] or [None] * len(slope)
        cotangents = [_scaled_difference(*x, ctx.fused) for x in zip(plus, minus, slope, strict=True)]
        return gradient * size, None, None, None, None, None, *cotangents, *[None] * ctx.fixed


def _energy(difference: FeatureDifference, layer: str, square: Tensor, fused: bool) -> Tensor:
    """Mean square of the target's features; where the ends stand about it, of their middle."""
    if difference.target is not None:
        return _mean_square(difference.target[layer], None, fused)
    assert difference.minus is not None
    ends = difference.plus[layer], difference.minus[layer]
    return (_mean_square(ends[0], None, fused) + _mean_square(ends[1], None, fused)) / 2 - square / 4


def _use_triton(impl: str, x: Tensor) -> bool:
    if impl == "auto":
        return x.is_cuda and not torch.compiler.is_compiling() and importlib.util.find_spec("triton") is not None
    return impl == "triton"


# The two passes over features, each in float32 at least; ncp_loss/fused.py has both as kernels.


def _mean_square(plus: Tensor, minus: Tensor | None, fused: bool) -> Tensor:
    """``mean |plus_b - minus_b|^2``: (B, ...) -> (B,)."""
    if fused:
        from .fused import mean_square

        return cast(Tensor, mean_square(plus, minus))
    return reduce(_difference(plus, minus).square(), "b ... -> b", "mean")


def _scaled_difference(plus: Tensor, minus: Tensor | None, slope: Tensor, fused: bool) -> Tensor:
    """``slope_b (plus_b - minus_b)``, in the features' dtype."""
    if fused:
        from .fused import scaled_difference

        return cast(Tensor, scaled_difference(plus, minus, slope))
    return (per_sample(slope, plus) * _difference(plus, minus)).to(plus.dtype)


def _difference(plus: Tensor, minus: Tensor | None) -> Tensor:
    plus = plus.to(torch.promote_types(plus.dtype, torch.float32))
    return plus if minus is None else plus - minus


def _inverse(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0: where nothing moved, or a layer is silent, there is no error to divide."""
    return torch.where(x == 0, torch.zeros_like(x), 1 / x)
