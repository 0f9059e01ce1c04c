"""error: one number per sample from a difference of features, in float32 or better, and the cotangent it sends back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import reduce
from torch import Tensor

from .difference import FeatureDifference
from .schedule import per_sample


def feature_error(
    difference: FeatureDifference, weights: Mapping[str, float], *, normalize: bool = False, unit: Tensor | None = None
) -> Tensor:
    r"""Per-sample mean square of a feature difference, summed over layers by weight (paper, eq. 13).

    ``error_b = sum_l w_l mean(|scale_b (plus_l - minus_l)|^2)``, the mean over everything but the batch.

    Args:
        difference: features at both ends, (B, ...) each, the scale of their difference, (B,), and the graph.
        weights: of each layer.
        normalize: divide each layer's term by the mean square of the target's features.
        unit: (B,), what the latents moved by per unit of prediction, B; the error is divided by its square.

    Returns:
        (B,), float32 at least.
    """
    plus, minus = list(difference.plus.values()), list((difference.minus or {}).values())
    with torch.no_grad():
        scale = difference.scale
        per_unit = torch.ones_like(scale) if unit is None else _inverse(unit.square())
        squares = torch.stack([_mean_square(*ends) for ends in _ends(plus, minus)], 1)
        relative = squares.new_tensor([weights[layer] for layer in difference.plus]).expand_as(squares)
        if normalize:
            relative = relative / torch.stack([_mean_square(f) for f in difference.target.values()], 1)
        error = per_unit * scale.square() * (relative * squares).sum(1)
        if difference.graph is None:
            return error
        # d error / d (features of the graph) is slope * (plus - minus) * per_unit * scale: one scale of the two,
        # since the graph's point moves by the displacement unscaled. The encoder's backward pass gets it divided by the
        # size of its largest layer; that size, for each sample, goes through the gate.
        slope = 2 * relative / relative.new_tensor([f[0].numel() for f in plus])
        size = (slope * squares.sqrt()).amax(1)
        slope = slope * _inverse(size)[:, None]
    graph = list(difference.graph.values())
    fixed = [f for f in (*plus, *minus) if all(f is not g for g in graph)]
    return _Leave.apply(difference.gate, error, per_unit * scale * size, slope, bool(minus), *graph, *fixed)  # type: ignore[no-any-return]


class _Leave(torch.autograd.Function):
    """The error; backward, a cotangent of order one for the features of the graph, and its true size for the gate."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, error: Tensor, size: Tensor, slope: Tensor, two: bool, *features: Tensor
    ) -> Tensor:
        layers = slope.shape[1]
        ctx.two, ctx.unused = two, len(features) - layers
        # The graph's features are the plus end too, unless both ends came without a graph.
        ends = features if len(features) == layers * (1 + two) else features[layers:]
        ctx.save_for_backward(size, slope, *ends)
        return error.view_as(error)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        size, slope, *features = ctx.saved_tensors
        layers = slope.shape[1]
        ends = _ends(features[:layers], features[layers:])
        cotangents = [
            (per_sample(slope[:, i], pair[0]) * _difference(*pair)).to(pair[0].dtype) for i, pair in enumerate(ends)
        ]
        return gradient * size, None, None, None, None, *cotangents, *[None] * ctx.unused


def _ends(plus: list[Tensor], minus: list[Tensor]) -> list[tuple[Tensor, ...]]:
    return list(zip(plus, minus, strict=True)) if minus else [(p,) for p in plus]


def _difference(plus: Tensor, minus: Tensor | None = None) -> Tensor:
    plus = plus.to(torch.promote_types(plus.dtype, torch.float32))
    return plus if minus is None else plus - minus


def _mean_square(plus: Tensor, minus: Tensor | None = None) -> Tensor:
    return reduce(_difference(plus, minus).square(), "b ... -> b", "mean")


def _inverse(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0: where nothing moved there is no error to divide."""
    return torch.where(x == 0, torch.zeros_like(x), 1 / x)
