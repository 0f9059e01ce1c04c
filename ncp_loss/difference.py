"""difference: how far features move when latents do, f(x* + d) - f(x*), taken where the compute dtype can still see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor

from .schedule import per_sample

Features = dict[str, Tensor]
Encode = Callable[[Tensor], Features]

DIFFERENCES = ("literal", "scaled", "auto")
# Latents in half precision have 8 to 11 bits: a displacement of 2% leaves the difference three to six of them.
_RELATIVE_STEP = 0.02


class FeatureDifference(NamedTuple):
    """``scale * (plus - minus)`` is the difference of features; kept apart, since the error can be taken in one pass."""

    plus: Features
    minus: Features
    scale: Tensor  # (B,), exactly 0 where the displacement is


def choose(difference: str, dtype: torch.dtype) -> str:
    """What "auto" means for a compute dtype: the definition where it is exact, the scaled difference in half precision."""
    if difference != "auto":
        return difference
    return "scaled" if dtype in (torch.float16, torch.bfloat16) else "literal"


def feature_differences(
    encode: Encode, base: Tensor, displacement: Tensor, ref_displacement: Tensor | None, difference: str
) -> tuple[FeatureDifference, FeatureDifference | None]:
    r"""Differences of features between ``base + displacement`` and ``base``, for the model and for the reference.

    "literal" is ``f(x* + d) - f(x*)``; "scaled" is ``(f(x* + r d) - f(x*)) / r`` with ``rms(r d) = h rms(x*)`` for
    each sample. One encoder call without a graph serves the base and the reference, one with a graph the model.

    Args:
        encode: from latents, one batch or several stacked, to features.
        base: x*, the latents reached by the true prediction, (B, ...).
        displacement: d = B (prediction - target), (B, ...), the only input that carries a gradient.
        ref_displacement: the reference's, or None.
        difference: "literal" or "scaled".
    """
    r = _stretch(base, displacement, difference)
    r_ref = None if ref_displacement is None else _stretch(base, ref_displacement, difference)
    fixed = [base] if r_ref is None else [base, base + per_sample(r_ref, base) * ref_displacement]
    with torch.no_grad():
        features = encode(torch.cat(fixed))
    at_base = {layer: f[: len(base)] for layer, f in features.items()}
    moved = encode(base + per_sample(r, base) * displacement)
    model = FeatureDifference(moved, at_base, _scale(r, displacement))
    if ref_displacement is None or r_ref is None:
        return model, None
    at_ref = {layer: f[len(base) :] for layer, f in features.items()}
    return model, FeatureDifference(at_ref, at_base, _scale(r_ref, ref_displacement))


def _stretch(base: Tensor, displacement: Tensor, difference: str) -> Tensor:
    """r, (B,): how much longer than d the displacement is that features are taken at; 1 where d is 0."""
    if difference == "literal":
        return base.new_ones(len(base))
    length = _rms(displacement.detach())
    return torch.where(length > 0, _RELATIVE_STEP * _rms(base) / length, torch.ones_like(length))


def _scale(stretch: Tensor, displacement: Tensor) -> Tensor:
    """1/r; exactly 0 where d is, since two evaluations of one point in batches of two sizes may differ in a last digit."""
    moved = reduce(displacement.detach() != 0, "b ... -> b", "max")
    return torch.where(moved, 1 / stretch, torch.zeros_like(stretch))


def _rms(x: Tensor) -> Tensor:
    return reduce(x.square(), "b ... -> b", "mean").sqrt()
