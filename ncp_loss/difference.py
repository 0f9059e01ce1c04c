"""difference: how far features move when latents do, f(x* + d) - f(x*), where the compute dtype can still see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from einops import reduce
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from .schedule import constant_to_compilers, per_sample

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
    """The estimator for what the model computes in; the reaches are those that benchmarks/precision.py found best.

    "auto" is the cheapest that is right: the definition itself in float64, "scaled" in float32, at the same cost and
    the definition again where that is no shorter, and "central" where rounding is coarser.
    """
    coarse = dtype in (torch.float16, torch.bfloat16) or (dtype == torch.float32 and _uses_tf32(device))
    if difference == "auto":
        difference = "central" if coarse else "literal" if dtype == torch.float64 else "scaled"
    if dtype == torch.bfloat16:
        return Estimator(difference, reach=0.06, graph_at_end=difference != "central")
    return Estimator(difference, reach=0.02 if coarse else 0.001)


@constant_to_compilers  # no compiler reads these settings; it keeps what they were when it compiled
def _uses_tf32(device: torch.device) -> bool:
    """Whether matrix products are given inputs rounded to fp16's mantissa, as cuDNN's convolutions are by default."""
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul, torch.backends)  # type: ignore[attr-defined]
    chosen = [getattr(backend, "fp32_precision", "none") for backend in backends]
    if chosen[0] == "none":  # before the setting had a name for each operator
        return device.type == "cuda" and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    return device.type == "cuda" and "tf32" in chosen


class FeatureDifference(NamedTuple):
    """``scale * (plus - minus)`` is the difference of features; kept apart, since the error takes one pass over both.

    Its derivative runs through ``graph``: features at a point that moves as the displacement does. Whatever estimated
    the difference, there its cotangent enters the encoder's backward pass, and ``gate`` carries the cotangent's size.
    """

    plus: Features
    minus: Features | None  # None: 0, where plus is a derivative already
    scale: Tensor  # (B,), exactly 0 where the displacement is
    target: Features | None  # at x*; None: half way between plus and minus
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
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, size: Tensor) -> Tensor:
        return gradient * per_sample(size, gradient)


def feature_differences(
    encode: Encode,
    base: Tensor,
    displacements: Sequence[Tensor],
    estimator: Estimator,
    target: Features | None,
) -> list[FeatureDifference]:
    r"""Differences of features between ``base + displacement`` and ``base``, for each displacement.

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
        displacements: d = B (prediction - target), (B, ...) each; the first, the model's, alone carries a gradient.
        estimator: which of the above.
        target: f(x*) where it is known already, for the estimators that take it ("literal" and "scaled").
    """
    displacement, moves = displacements[0], [d.detach() for d in displacements]
    d = moves[0]
    trains = torch.is_grad_enabled() and displacement.requires_grad
    features: dict[int, Features] = {} if target is None else {id(base): target}
    if estimator.kind == "tangent":
        results, moving = _tangents(encode, base, moves), base + d
    else:
        ends = [_ends(base, move, estimator) for move in moves]
        moving = ends[0].plus if estimator.graph_at_end else base + d
        points = {id(x): x for end in ends for x in (end.plus, end.minus)}
        fixed = [key for key, x in points.items() if key not in features and not (trains and x is moving)]
        if fixed:
            with torch.no_grad():
                found = encode(torch.cat([points[key] for key in fixed]))
            features |= zip(fixed, _split(found, len(fixed)), strict=True)
    if trains:
        entered, gate = Enter.apply(moving + (displacement - d))  # the value of moving, the derivative of displacement
        features[id(moving)] = graph = encode(entered)
    if estimator.kind != "tangent":
        target = features.get(id(base))
        results = [FeatureDifference(features[id(x.plus)], features[id(x.minus)], x.scale, target) for x in ends]
    if trains:
        results[0] = results[0]._replace(graph=graph, gate=gate)
    return results


class _Ends(NamedTuple):
    plus: Tensor
    minus: Tensor
    scale: Tensor


def _ends(base: Tensor, d: Tensor, estimator: Estimator) -> _Ends:
    """The two points of a difference, and what to multiply it by, (B,); 0 where d is.

    Exactly 0, since two evaluations of one point in batches of two sizes may differ in a last digit.
    """
    central = estimator.kind == "central"
    r = base.new_full(base.shape[:1], 0.5 if central else 1.0)
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


def _tangents(encode: Encode, base: Tensor, moves: list[Tensor]) -> list[FeatureDifference]:
    """For each move, the derivative of features along it, at its middle; per unit of rms, so that fp16 can hold it."""
    points, move = torch.cat([base + 0.5 * d for d in moves]), torch.cat(moves)
    length = _rms(move)
    unit = move / per_sample(torch.where(length > 0, length, torch.ones_like(length)), move)
    # The fused attention kernels have no forward mode, and group norm's takes contiguous input only.
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), _ContiguousNorm():
        pairs = {k: forward_ad.unpack_dual(f) for k, f in encode(forward_ad.make_dual(points, unit)).items()}
    tangents = _split({k: pair.tangent for k, pair in pairs.items()}, len(moves))
    primals = _split({k: pair.primal for k, pair in pairs.items()}, len(moves))
    scales = length.chunk(len(moves))
    return [FeatureDifference(t, None, scale, p) for t, scale, p in zip(tangents, scales, primals, strict=True)]


class _ContiguousNorm(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.group_norm:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


def _split(features: Features, count: int) -> list[Features]:
    """Features of several batches stacked, batch by batch."""
    chunks = {k: f.chunk(count) for k, f in features.items()}
    return [{k: f[i] for k, f in chunks.items()} for i in range(count)]


def _rms(x: Tensor) -> Tensor:
    return reduce(x.square(), "b ... -> b", "mean").sqrt()
