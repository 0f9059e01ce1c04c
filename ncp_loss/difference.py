"""difference: how far features move when latents do, f(x* + d) - f(x*), where the compute dtype can still see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import reduce
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .schedule import per_sample

Features = dict[str, Tensor]
Encode = Callable[[Tensor], Features]

DIFFERENCES = ("literal", "scaled", "central", "tangent", "auto")


class Estimator(NamedTuple):
    """How a difference is taken; ``reach``: how far from their middle the ends stand, in multiples of rms(x*).

    A longer reach shows curvature, a shorter one rounding. Where it is short, the graph may stand at the plus end;
    where it must be long, as in bf16, the gradient is worth an evaluation of its own at the definition's end, x* + d.
    """

    kind: str
    reach: float = 0.0
    graph_at_end: bool = True


def choose(difference: str, dtype: torch.dtype, device: torch.device) -> Estimator:
    """The estimator for what the model computes in, after benchmarks/precision.py.

    "auto" is the definition where rounding leaves it standing, and otherwise the cheapest that is right.
    """
    # TF32 rounds what enters a matrix product to fp16's mantissa; cuDNN's convolutions do so by default.
    tf32 = device.type == "cuda" and (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)
    if difference == "auto":
        exact = dtype == torch.float64 or (dtype == torch.float32 and not tf32)
        difference = "literal" if exact else "central"
    if dtype == torch.bfloat16:
        return Estimator(difference, reach=0.07, graph_at_end=difference != "central")
    return Estimator(difference, reach=0.02)


class FeatureDifference(NamedTuple):
    """``scale * (plus - minus)`` is the difference of features; kept apart, since the error takes one pass over both.

    Its derivative runs through ``graph``: features at a point that moves as the displacement does. Whatever estimated
    the difference, there its cotangent enters the encoder's backward pass, and ``gate`` carries the cotangent's size.
    """

    plus: Features
    minus: Features | None  # None: 0, where plus is a derivative already
    scale: Tensor  # (B,), exactly 0 where the displacement is
    target: Features  # at x*, or near enough to tell how large features are
    graph: Features | None = None
    gate: Tensor | None = None


class Enter(torch.autograd.Function):
    """The latents, and a gate of ones, (B,): backward multiplies the latents' gradient by the gate's, per sample.

    An encoder in half precision is given a cotangent of order one; what it was divided by, a float32 number for each
    sample, comes round by way of the gate. So fp16 neither underflows nor overflows, with or without a GradScaler.
    """

    @staticmethod
    def forward(ctx: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
        return latents.view_as(latents), latents.new_ones(len(latents))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, size: Tensor) -> Tensor:
        return gradient * per_sample(size, gradient)


def feature_differences(
    encode: Encode, base: Tensor, displacement: Tensor, ref_displacement: Tensor | None, estimator: Estimator
) -> tuple[FeatureDifference, FeatureDifference | None]:
    r"""Differences of features between ``base + displacement`` and ``base``, for the model and for the reference.

    With d the displacement, m = x* + d/2 the middle, and r chosen per sample so that ``rms(r d) = reach * rms(x*)``,
    but never shorter than the definition's own:

    - "literal": ``f(x* + d) - f(x*)``, the definition;
    - "scaled": ``(f(x* + r d) - f(x*)) / r``;
    - "central": ``(f(m + r d) - f(m - r d)) / 2r``, which is the definition at r = 1/2;
    - "tangent": ``J_f(m) d``, by forward-mode differentiation.

    What needs no graph is one encoder call; one more, with a graph, at an end or at x* + d, gives the gradient.

    Args:
        encode: from latents, one batch or several stacked, to features.
        base: x*, the latents reached by the true prediction, (B, ...).
        displacement: d = B (prediction - target), (B, ...), the only input that carries a gradient.
        ref_displacement: the reference's, or None.
        estimator: which of the above.
    """
    d = displacement.detach()
    moves = [d] if ref_displacement is None else [d, ref_displacement]
    if estimator.kind == "tangent":
        found = _tangents(encode, base, moves)
        entered, gate = Enter.apply(base + displacement)
        graph = encode(entered)
        results = [FeatureDifference(plus, None, scale, target) for plus, scale, target in found]
    else:
        ends = [_ends(base, move, estimator) for move in moves]
        moving = ends[0].plus if estimator.graph_at_end else base + d
        fixed = {id(x): x for end in ends for x in (end.plus, end.minus) if x is not moving}
        with torch.no_grad():
            features = dict(zip(fixed, _evaluate(encode, list(fixed.values())), strict=True))
        entered, gate = Enter.apply(moving + (displacement - d))  # the value of moving, the derivative of displacement
        graph = encode(entered)
        features[id(moving)] = graph
        results = [
            FeatureDifference(features[id(end.plus)], features[id(end.minus)], end.scale, features[id(end.minus)])
            for end in ends
        ]
    model = results[0]._replace(graph=graph, gate=gate)
    return model, results[1] if len(results) > 1 else None


class _Ends(NamedTuple):
    plus: Tensor
    minus: Tensor
    scale: Tensor


def _ends(base: Tensor, d: Tensor, estimator: Estimator) -> _Ends:
    """The two points of a difference, and what to multiply it by, (B,); 0 where d is.

    Exactly 0, since two evaluations of one point in batches of two sizes may differ in a last digit.
    """
    central = estimator.kind == "central"
    r = torch.full_like(base[:, 0].flatten(1)[:, 0], 0.5 if central else 1.0)
    if estimator.kind != "literal":
        r = torch.maximum(r, (estimator.reach * _rms(base) / _rms(d)).nan_to_num(posinf=1.0, nan=1.0))
    moved = reduce(d != 0, "b ... -> b", "max")
    apart = 2 * r if central else r
    scale = torch.where(moved, 1 / apart, torch.zeros_like(r))
    reach = per_sample(r, d) * d
    if central:
        middle = base + 0.5 * d
        return _Ends(middle + reach, middle - reach, scale)
    return _Ends(base + reach, base, scale)


def _tangents(encode: Encode, base: Tensor, moves: list[Tensor]) -> list[tuple[Features, Tensor, Features]]:
    """For each move: the derivative of features along it, at its middle, per unit of rms; its rms; and the features."""
    points = torch.cat([base + 0.5 * d for d in moves])
    lengths = _rms(torch.cat(moves))
    unit = torch.cat(moves) / per_sample(torch.where(lengths > 0, lengths, torch.ones_like(lengths)), points)
    # The fused attention kernels have no forward mode.
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        pairs = {k: forward_ad.unpack_dual(f) for k, f in encode(forward_ad.make_dual(points, unit)).items()}
    primals, tangents = ({k: pair[i] for k, pair in pairs.items()} for i in (0, 1))
    split = [{k: f.chunk(len(moves)) for k, f in features.items()} for features in (tangents, primals)]
    return [
        ({k: f[i] for k, f in split[0].items()}, length, {k: f[i] for k, f in split[1].items()})
        for i, length in enumerate(lengths.chunk(len(moves)))
    ]


def _evaluate(encode: Encode, points: list[Tensor]) -> list[Features]:
    """Features at several points in one call."""
    if not points:
        return []
    features = {k: f.chunk(len(points)) for k, f in encode(torch.cat(points)).items()}
    return [{k: f[i] for k, f in features.items()} for i in range(len(points))]


def _rms(x: Tensor) -> Tensor:
    return reduce(x.square(), "b ... -> b", "mean").sqrt()
