"""difference: at which latents to evaluate the encoder, and how features there combine into differences of features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor

from .tensors import constant_to_compilers, per_sample

DIFFERENCES = ("literal", "scaled", "central", "auto")


class Estimator(NamedTuple):
    """How differences are taken in one dtype.

    A longer reach shows more of the encoder's curvature, a shorter one more of its rounding. Where a dtype needs a long
    reach, the gradient is worth an evaluation of its own at ``x* + d``, which is where the definition has it.
    """

    kind: str  # "literal", "scaled" or "central"
    reach: float = 0.0  # how far from their middle the points stand, in multiples of rms(x*)
    reach_alone: float = 0.0  # the same without a reference: two points, whose rounding no other two average out
    graph_at_point: bool = True  # take the gradient at the first point; or else at x* + d


def choose(difference: str, dtype: torch.dtype, device: torch.device) -> Estimator:
    """The estimator for the dtype that the model computes in; benchmarks/reach.py measures its reaches.

    "auto" is the cheapest one that is right: the definition itself in float64, "scaled" in float32, at the same cost,
    and "central" where rounding is coarser.
    """
    coarse = dtype in (torch.float16, torch.bfloat16) or (dtype == torch.float32 and _uses_tf32(device))
    if difference == "auto":
        difference = "central" if coarse else "literal" if dtype == torch.float64 else "scaled"
    if difference == "literal":
        return Estimator(difference)
    if dtype == torch.bfloat16:
        return Estimator(difference, 0.045, 0.06, graph_at_point=difference != "central")
    return Estimator(difference, *((0.02, 0.02) if coarse else (0.0005, 0.0005)))


@constant_to_compilers  # no compiler reads these settings; it keeps what they were when it compiled
def _uses_tf32(device: torch.device) -> bool:
    """Whether matrix products are given inputs rounded to fp16's mantissa, as cuDNN's convolutions are by default."""
    backends = (getattr(torch.backends.cudnn, "conv", None), torch.backends.cuda.matmul, torch.backends)
    chosen = [getattr(backend, "fp32_precision", "none") for backend in backends]
    if chosen[0] == "none":  # before the setting had a name for each operator
        return device.type == "cuda" and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    return device.type == "cuda" and "tf32" in chosen


class Stencil(NamedTuple):
    """The points of a finite difference, and the coefficients of their features, one for each point and sample.

    With ``f_i`` the features of point i, ``sum_i model_i f_i`` is the model's difference of features,
    ``f(x* + d) - f(x*)``; ``sum_i gap_i f_i`` is the model's less the reference's; ``sum_i target_i f_i`` is f(x*).
    """

    latents: list[Tensor]  # the k points, (B, ...) each
    model: Tensor  # (k, B)
    gap: Tensor | None  # (k, B); None without a reference
    target: Tensor  # (k, B)
    graph: Tensor  # where the gradient is taken: the first point, or x* + d


# For each number of points, every point's share in the difference along the long direction (v), and along the short one
# (u). A share's sign is the side of the middle on which the point stands. A side's shares add up to one half.
_SHARES = {
    2: ((1 / 2, 0.0), (-1 / 2, 0.0)),
    3: ((1 / 4, 1 / 2), (1 / 4, -1 / 2), (-1 / 2, 0.0)),
    4: ((1 / 4, 1 / 4), (1 / 4, -1 / 4), (-1 / 4, 1 / 4), (-1 / 4, -1 / 4)),
}


def stencil(base: Tensor, d: Tensor, reference: Tensor | None, gap: Tensor | None, estimator: Estimator) -> Stencil:
    r"""Where to look, and how to combine what is seen there, for one displacement or for two.

    The model's displacement is d, the reference's r, and the gap between them ``d - r``. Where one of the three is
    much shorter than the others, a difference of these would leave rounding for it. It is therefore measured along
    itself, as p, together with one long direction q; all three follow from ``u = J p`` and ``v = J q``:

    ==================  ===========  ===============  ===============  ===============
    p                   q            of the model     of the gap       middle M
    ==================  ===========  ===============  ===============  ===============
    gap (mostly)        d + r        (v + u) / 2      u                x* + q/4
    d, right model      d - 2 r      u                (u + v) / 2      x* + p/2 - q/4
    r, right reference  r - 2 d      (u - v) / 2      -(u + v) / 2     x* + p/2 - q/4
    ==================  ===========  ===============  ===============  ===============

    The points stand at ``M +- a q +- b p``. An arm is as long as the dtype needs, ``reach * rms(x*)``, but never
    shorter than the definition's own, ``a = 1/4`` and ``b = 1/2``.

    - "literal": the first row and the shortest arms, which make the points ``x* + d``, ``x* + r`` and ``x*``;
    - "scaled": three points, ``M + a q +- b p`` and ``M - a q``; in the first row ``M = x* + a q``, so that the third
      is x* itself;
    - "central": all four, about the middle of the definition's points, where errors of second order cancel. Each point
      serves both differences, which halves their rounding.

    Without a reference there is one displacement and no gap: two points, ``M +- a q`` with ``q = 2 d``.

    Args:
        base: x*, the latents that the true prediction gives, (B, ...).
        d: ``B (prediction - target)``, (B, ...).
        reference: ``B (the reference's prediction - target)``, (B, ...), or None.
        gap: ``B (prediction - the reference's)``, (B, ...), or None; given, since a difference would lose its digits.
        estimator: which of the above, and its reaches.
    """
    alone = reference is None or gap is None
    r, g = (d, torch.zeros_like(d)) if reference is None or gap is None else (reference, gap)
    shares = _SHARES[2 if alone else 4 if estimator.kind == "central" else 3]
    reach = (estimator.reach_alone if alone else estimator.reach) * _rms(base)
    lengths = torch.stack([_rms(x) for x in (g, d, r)])
    shortest = torch.where(lengths.amin(0) < lengths[0] / 4, lengths.argmin(0), 0)
    shortest = torch.zeros_like(shortest) if estimator.kind == "literal" else shortest

    def pick(of_gap: Tensor, of_model: Tensor, of_reference: Tensor) -> Tensor:
        rest = torch.where(per_sample(shortest == 1, of_model), of_model, of_reference)
        return torch.where(per_sample(shortest == 0, of_gap), of_gap, rest)

    p, q = pick(g, d, r), pick(d + r, d - 2 * r, r - 2 * d)
    a, b = _arm(q, reach, 1 / 4), _arm(p, reach, 1 / 2)
    quarter, half, none = (torch.full_like(a, x) for x in (1 / 4, 1 / 2, 0.0))
    middle_q, middle_p = pick(a if estimator.kind == "scaled" else quarter, -quarter, -quarter), pick(none, half, half)
    # Where a displacement is exactly 0, so is the coefficient of its difference: two evaluations of one point may
    # differ in a last digit. A reference that is right has the gap for the model's difference, to the bit.
    q_moves, p_moves, moves, reference_moves = (reduce(x != 0, "b ... -> b", "max") for x in (q, p, d, r))
    latents, of_model, of_gap, of_target = [], [], [], []
    for v_share, u_share in shares:
        along_q, along_p = middle_q + _sign(v_share) * a, middle_p + _sign(u_share) * b
        latents.append(base + (per_sample(along_q, q) * q + per_sample(along_p, p) * p))
        v, u = q_moves * v_share / a, p_moves * u_share / b
        of_gap.append(pick(u, (u + v) / 2, -(u + v) / 2))
        model = pick((v + u) / 2, u, (u - v) / 2)
        of_model.append(moves * torch.where(reference_moves, model, of_gap[-1]))
        of_target.append(abs(v_share) - middle_q * v_share / a - middle_p * u_share / b)
    graph = latents[0] if estimator.graph_at_point else base + d
    model, target, gaps = (torch.stack(x) for x in (of_model, of_target, of_gap))
    return Stencil(latents, model, None if alone else gaps, target, graph)


def _arm(displacement: Tensor, reach: Tensor, least: float) -> Tensor:
    """How many displacements long an arm is, (B,)."""
    length = _rms(displacement)
    return torch.where(length > 0, (reach / length).clamp(min=least), torch.full_like(length, least))


def _sign(share: float) -> int:
    return (share > 0) - (share < 0)


def _rms(x: Tensor) -> Tensor:
    return reduce(x.square(), "b ... -> b", "mean").sqrt()
