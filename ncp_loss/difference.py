"""difference: the points at which the encoder is evaluated, and how features there combine into differences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor

from .tensors import constant_to_compilers, per_sample

DIFFERENCES = ("literal", "scaled", "central", "auto")


class Estimator(NamedTuple):
    """How differences of features are taken in one dtype.

    The reach is the distance of the points from their middle. A longer reach adds error from the encoder's curvature,
    and a shorter one adds error from rounding. The definition has the gradient at ``x* + d``. With a short reach the
    first point is close enough to it, and its evaluation gives the gradient too. With a long reach the gradient is less
    exact there, so it gets an evaluation of its own at ``x* + d``.
    """

    kind: str  # "literal", "scaled" or "central"
    reach: float = 0.0  # in multiples of rms(x*)
    reach_alone: float = 0.0  # without a reference: fewer points average less rounding out
    gradient_at_first: bool = True  # whether the gradient is taken at the first point, or else at x* + d


def choose(difference: str, dtype: torch.dtype, device: torch.device) -> Estimator:
    """The estimator for the dtype that the model computes in.

    "auto" chooses the cheapest estimator that is exact enough. This is "literal", the definition, in float64, "scaled"
    in float32, at the same cost, and "central" in half precision and TF32. ``benchmarks/reach.py`` measures the
    reaches.
    """
    coarse = dtype in (torch.float16, torch.bfloat16) or (dtype == torch.float32 and _uses_tf32(device))
    if difference == "auto":
        difference = "central" if coarse else "literal" if dtype == torch.float64 else "scaled"
    if difference == "literal":
        return Estimator(difference)
    if dtype == torch.bfloat16:
        return Estimator(difference, 0.045, 0.06, gradient_at_first=difference != "central")
    return Estimator(difference, *((0.02, 0.02) if coarse else (0.0005, 0.0005)))


@constant_to_compilers  # a compiler cannot trace these settings; it keeps their values at the time of compilation
def _uses_tf32(device: torch.device) -> bool:
    """Whether products round their inputs to TF32, which has fp16's mantissa: cuDNN's default for convolutions."""
    backends = (getattr(torch.backends.cudnn, "conv", None), torch.backends.cuda.matmul, torch.backends)
    chosen = [getattr(backend, "fp32_precision", "none") for backend in backends]
    if chosen[0] == "none":  # torch before 2.9 has one setting for cuDNN and one for matrix products
        return device.type == "cuda" and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    return device.type == "cuda" and "tf32" in chosen


class Stencil(NamedTuple):
    """The points of a finite difference, and the coefficients with which their features are added.

    There are k points, and one coefficient for each point and sample. With ``f_i`` the features at point i,

    - ``sum_i model_i f_i`` is the model's difference of features, ``f(x* + d) - f(x*)``,
    - ``sum_i gap_i f_i`` is the model's difference minus the reference's,
    - ``sum_i target_i f_i`` is the target's features, ``f(x*)``.
    """

    latents: list[Tensor]  # the k points, (B, ...) each; the first is the one nearest to x* + d
    model: Tensor  # (k, B)
    gap: Tensor | None  # (k, B); None without a reference
    target: Tensor  # (k, B)
    gradient_point: Tensor  # the point at which the gradient is taken, (B, ...): the first one, or x* + d itself


# By the number of points: each point's share in v, the difference along the long direction q, and in its side's u, the
# difference along the short direction p. A share's sign says on which side of the middle the point stands.
_SHARES = {
    2: ((1 / 2, 0.0), (-1 / 2, 0.0)),
    3: ((1 / 4, 1 / 2), (1 / 4, -1 / 2), (-1 / 2, 0.0)),
    4: ((1 / 4, 1 / 2), (1 / 4, -1 / 2), (-1 / 4, 1 / 2), (-1 / 4, -1 / 2)),
}


def stencil(
    target_latents: Tensor, d: Tensor, reference: Tensor | None, gap: Tensor | None, estimator: Estimator
) -> Stencil:
    r"""The points and coefficients for the model's displacement, and for a reference's too if there is one.

    The model's displacement is d, the reference's is r, and the gap between them is ``d - r``. One of the three may be
    much shorter than the others. If its difference of features were computed from those of the other two, little but
    rounding would be left. So each sample's shortest displacement is one direction, p, and a long combination of d and
    r is the other, q. With J the encoder's response to a small displacement, all differences follow from ``u = J p``
    and ``v = J q``:

    ====================================  ===========  ==============  ==============  ===============
    p                                     q            model's         gap's           middle M
    ====================================  ===========  ==============  ==============  ===============
    gap (unless another is much shorter)  d + r        (v + u) / 2     u               x* + q/4
    d (the model is nearly right)         d - 2 r      u               (u + v) / 2     x* + p/2 - q/4
    r (the reference is nearly right)     r - 2 d      (u - v) / 2     -(u + v) / 2    x* + p/2 - q/4
    ====================================  ===========  ==============  ==============  ===============

    The points are ``M +- a q +- b p``. The arms a and b are so long that ``rms(a q)`` and ``rms(b p)`` are at least
    ``reach * rms(x*)``. They are never shorter than in the definition, ``a = 1/4`` and ``b = 1/2``. If p is long
    itself, it takes the points away from x*, and the arm along q may be shorter by that.

    - "literal" always takes the first row and the definition's arms. The points are ``x* + d``, ``x* + r`` and ``x*``.
    - "scaled" has three points, ``M + a q +- b p`` and ``M - a q``. In the first row ``M = x* + a q``, so the third
      point is x*.
    - "central" has all four points, about the middle of the definition's. Errors of second order cancel there. Each
      point is used in both differences, which halves their rounding.

    With long displacements, as of ``step="clean"``, the encoder's response differs from place to place, so it counts
    where u is measured. The definition has it at ``M + q/4``. "scaled" measures it there. "central" interpolates
    between the two sides, which is the first side's u alone where a is 1/4, and takes the other side's points nearer to
    each other. So where all displacements are longer than the reach, every kind of stencil is the definition.

    Without a reference there is no gap, ``q = 2 d``, and the points are ``M +- a q``.

    Args:
        target_latents: x*, the latents after the step with the true prediction, (B, ...).
        d: ``B (prediction - target)``, (B, ...).
        reference: r, ``B (the reference's prediction - target)``, (B, ...), or None.
        gap: ``B (prediction - the reference's prediction)``, (B, ...), or None. It is an argument of its own because
            ``d - r`` would lose digits.
        estimator: the kind of estimator and its reaches.
    """
    alone = reference is None or gap is None
    r, g = (d, torch.zeros_like(d)) if reference is None or gap is None else (reference, gap)
    shares = _SHARES[2 if alone else 4 if estimator.kind == "central" else 3]
    reach = (estimator.reach_alone if alone else estimator.reach) * _rms(target_latents)
    row = _row(g, d, r, estimator.kind)

    def pick(of_gap: Tensor, of_model: Tensor, of_reference: Tensor) -> Tensor:
        """For each sample the value in its row of the table."""
        rest = torch.where(per_sample(row == 1, of_model), of_model, of_reference)
        return torch.where(per_sample(row == 0, of_gap), of_gap, rest)

    p, q = pick(g, d, r), pick(d + r, d - 2 * r, r - 2 * d)
    # A long p moves the points away from x*, so q need not.
    reach_q = (reach.square() - (_rms(p) / 2).square()).relu().sqrt()
    a, b = _arm(q, reach_q, 1 / 4), _arm(p, reach, 1 / 2)
    quarter, half, none = (torch.full_like(a, x) for x in (1 / 4, 1 / 2, 0.0))
    middle_q, middle_p = pick(a if estimator.kind == "scaled" else quarter, -quarter, -quarter), pick(none, half, half)
    # In the definition u belongs to the first side. "central" finds it there from both sides, by interpolation.
    lead = quarter / a if estimator.kind == "central" else torch.ones_like(a)
    # The other side's arm along p, sqrt(b^2 - lead / 4), with which errors of second order cancel. b^2 may overflow.
    far = b * (1 - lead / (4 * b.square())).sqrt()
    # A displacement of exactly 0 must give a difference of exactly 0. Two evaluations of one point may differ in the
    # last digit, so the coefficients are set to 0. If the reference's displacement is 0, the model's difference is the
    # gap's, bit for bit. Displacements that are opposite, and long, have a v although q is 0.
    q_moves, p_moves, moves, reference_moves = (reduce(x != 0, "b ... -> b", "max") for x in (q, p, d, r))
    q_moves = q_moves | (reach_q == 0)
    latents, of_model, of_gap, of_target = [], [], [], []
    # In the table's last row the points come in reverse order, since there x* + d is the last one.
    reverse = (row == 2).to(a.dtype)
    for share, reversed_share in zip(shares, reversed(shares), strict=True):
        side, along = (x + (y - x) * reverse for x, y in zip(share, reversed_share, strict=True))
        sign, arm = side.sign(), torch.where(side > 0, b, far)
        along_q, along_p = middle_q + sign * a, middle_p + along.sign() * arm
        latents.append(target_latents + (per_sample(along_q, q) * q + per_sample(along_p, p) * p))
        v, u = q_moves * side / a, p_moves * along * (1 + sign * lead) / 2 / torch.where(arm > 0, arm, 1.0)
        of_gap.append(pick(u, (u + v) / 2, -(u + v) / 2))
        of_model.append(moves * torch.where(reference_moves, pick((v + u) / 2, u, (u - v) / 2), of_gap[-1]))
        of_target.append(side.abs() - middle_q * side / a - middle_p * u)
    end = latents[0] if estimator.gradient_at_first else target_latents + d
    return Stencil(latents, torch.stack(of_model), None if alone else torch.stack(of_gap), torch.stack(of_target), end)


def _row(gap: Tensor, d: Tensor, reference: Tensor, kind: str) -> Tensor:
    """The row of the stencil's table for each sample, 0, 1 or 2: which displacement is the shortest."""
    lengths = torch.stack([_rms(x) for x in (gap, d, reference)])
    row = torch.where(lengths.amin(0) < lengths[0] / 4, lengths.argmin(0), 0)
    return torch.zeros_like(row) if kind == "literal" else row


def _arm(displacement: Tensor, reach: Tensor, least: float) -> Tensor:
    """The length of an arm in multiples of the displacement, (B,): ``least`` or more, and ``reach`` in rms or more."""
    length = _rms(displacement)
    return torch.where(length > 0, (reach / length).clamp(min=least), torch.full_like(length, least))


def _rms(x: Tensor) -> Tensor:
    return reduce(x.square(), "b ... -> b", "mean").sqrt()
