"""error: one number per sample from a difference of features, in float32 or better."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import reduce
from torch import Tensor

from .difference import FeatureDifference


def feature_error(
    difference: FeatureDifference, weights: Mapping[str, float], *, normalize: bool = False, unit: Tensor | None = None
) -> Tensor:
    r"""Per-sample mean square of a feature difference, summed over layers by weight (paper, eq. 13).

    ``error_b = sum_l w_l mean(|scale_b (plus_l - minus_l)|^2)``, the mean over everything but the batch.

    Args:
        difference: features at both ends, (B, ...) each, and the scale of their difference, (B,).
        weights: of each layer.
        normalize: divide each layer's term by the mean square of ``minus_l``, the target's features.
        unit: (B,), what the latents moved by per unit of prediction, B; the error is divided by its square.

    Returns:
        (B,), float32 at least.
    """
    total = torch.zeros_like(difference.scale)
    for layer, weight in weights.items():
        plus, minus = _at_least_float32(difference.plus[layer]), _at_least_float32(difference.minus[layer])
        error = _mean_square(plus - minus)
        if normalize:
            error = error / _mean_square(minus)
        total = total + weight * error
    scale = difference.scale
    if unit is not None:  # nothing moved where it is 0, so that there is no error to divide
        scale = torch.where(unit == 0, torch.zeros_like(scale), scale / unit)
    return scale.square() * total


def _mean_square(x: Tensor) -> Tensor:
    return reduce(x.square(), "b ... -> b", "mean")


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
