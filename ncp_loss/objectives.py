"""objectives: preference losses on per-sample errors of any kind, where a lower error is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .checks import (
    bad,
    check_choice,
    check_device,
    check_errors,
    check_floating,
    check_like,
    check_number,
    check_shaped,
    check_tensor,
    check_timesteps,
    values_are_free,
)
from .tensors import at_least_float32

LOSS_TYPES = ("sigmoid", "hinge", "ipo", "robust", "linear", "dmpo")
REDUCTIONS = ("mean", "sum", "none")
# As published: the slope and the lower bound of Linear-DPO's weight, and DMPO's target probability of the loser.
LINEAR_SLOPE, LINEAR_FLOOR = 0.2, 1e-3
DMPO_TARGET = 0.01
# relative_beta clamps the reference's error to this range, so that no beta is infinite or 0.
ERROR_RANGE = 1e-30, 1e30


class PreferenceOutput(NamedTuple):
    """A loss, and metrics to log, which are 0-dim tensors without gradient."""

    loss: Tensor
    metrics: dict[str, Tensor]


def reduce_batch(per_sample: Tensor, reduction: str) -> Tensor:
    """(B,) -> the mean or the sum, 0-dim, or (B,) unchanged for "none"."""
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "none":
        return per_sample
    return per_sample.mean() if reduction == "mean" else per_sample.sum()


def dpo_loss(
    chosen_error: Tensor,
    rejected_error: Tensor,
    ref_chosen_error: Tensor,
    ref_rejected_error: Tensor,
    *,
    beta: float | Tensor = 2500.0,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Direct preference optimisation on denoising errors, and variants of it.

    It is Diffusion-DPO (arXiv 2311.12908) on latent errors, and NCP-DPO (paper, eq. 18) on perceptual ones.

    With ``z = beta [(rejected - ref_rejected) - (chosen - ref_chosen)]``, beta times the margin, the loss of a pair is

    - "sigmoid": ``-(1 - s) log sigmoid(z) - s log sigmoid(-z)`` with label smoothing s;
    - "hinge": ``max(0, 1 - z)``, as in diffusers' scripts;
    - "ipo": ``(z / beta - 1 / (2 beta))^2``, as in diffusers' scripts;
    - "robust": ``[-(1 - s) log sigmoid(z) + s log sigmoid(-z)] / (1 - 2 s)``, which is unbiased if labels are flipped
      with probability s (arXiv 2403.00409);
    - "linear": ``beta w (chosen - rejected)`` with ``w = clamp(1/2 - 0.2 z, 0.001, 0.999)``, through which no gradient
      flows. The gradient is DPO's with w in place of sigmoid(-z) (Linear-DPO, arXiv 2605.21123, whose code leaves out
      the factor beta);
    - "dmpo": ``KL[(p, 1 - p) || (0.99, 0.01)]`` with ``p = sigmoid(z)`` (DMPO, arXiv 2507.07510).

    ``sft_weight * chosen`` is added to each.

    Args:
        chosen_error, rejected_error: the model's errors on winners and losers, (B,).
        ref_chosen_error, ref_rejected_error: the reference model's errors, (B,).
        beta: the factor of the margin of mean errors, a positive number, or one for each pair, (B,). It enters once,
            and nothing is halved.
        loss_type: one of the types above.
        label_smoothing: the probability that a preference is the wrong way round, in [0, 0.5), for "sigmoid" and
            "robust" only.
        sft_weight: the weight of the winner's own error, which is added as an anchor; not negative.
        reduction: "mean", "sum" or "none".

    Returns:
        0-dim, or (B,) for "none".

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value.

    >>> e = torch.tensor([0.1, 0.2])
    >>> dpo_loss(e, e, e, e, beta=2500.0)  # model equals reference: log 2
    tensor(0.6931)
    """
    check_errors(
        chosen_error=chosen_error,
        rejected_error=rejected_error,
        ref_chosen_error=ref_chosen_error,
        ref_rejected_error=ref_rejected_error,
    )
    check_choice("loss_type", loss_type, LOSS_TYPES)
    beta = _check_beta(beta, chosen_error)
    sft_weight = _check_weight("sft_weight", sft_weight)
    label_smoothing = check_number("label_smoothing", label_smoothing, "in [0, 0.5)", lambda s: 0 <= s < 0.5)
    if label_smoothing and loss_type not in ("sigmoid", "robust"):
        raise bad("label_smoothing", f"0 for loss_type={loss_type!r}", repr(label_smoothing))
    margin = _margin(chosen_error, rejected_error, ref_chosen_error, ref_rejected_error)
    if loss_type == "ipo":
        loss = (margin - 1 / (2 * beta)).square()
    elif loss_type == "linear":
        weight = (0.5 - LINEAR_SLOPE * beta * margin).clamp(LINEAR_FLOOR, 1 - LINEAR_FLOOR).detach()
        loss = -beta * weight * _margin(chosen_error, rejected_error)
    else:
        loss = _of_logits(beta * margin, loss_type, label_smoothing)
    return reduce_batch(loss + sft_weight * chosen_error.to(loss.dtype), reduction)


@torch.no_grad()
def relative_beta(ref_chosen_error: Tensor, ref_rejected_error: Tensor, kappa: float = 2.0) -> Tensor:
    r"""A beta for each pair that makes its margin relative to the reference's errors on it.

    ``beta = kappa / mean(ref_chosen, ref_rejected)``, so ``beta * margin`` is kappa times the margin as a share of the
    reference's error. The scale of errors cancels. It differs by orders of magnitude between models, layers, steps and
    timesteps. Each pair's beta depends on this pair alone: there is no state, and nothing of other batches or processes
    is needed.

    Args:
        ref_chosen_error, ref_rejected_error: the reference model's errors on winners and losers, (B,).
        kappa: the factor of the relative margin, a positive number without unit.

    Returns:
        (B,), in float32 or better, without gradient. It is finite for every error.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value.

    >>> relative_beta(torch.tensor([1.0, 1e-6]), torch.tensor([3.0, 3e-6]), kappa=2.0)
    tensor([1.0000e+00, 1.0000e+06])
    """
    check_errors(ref_chosen_error=ref_chosen_error, ref_rejected_error=ref_rejected_error)
    kappa = check_number("kappa", kappa)
    mean = (ref_chosen_error.to(at_least_float32(ref_chosen_error)) + ref_rejected_error) / 2
    limits = torch.finfo(mean.dtype)
    return (kappa / mean.nan_to_num(nan=1.0).clamp(*ERROR_RANGE)).clamp(limits.tiny, limits.max)


def _of_logits(logits: Tensor, loss_type: str, label_smoothing: float) -> Tensor:
    """The types of loss that depend on a pair through ``z`` alone."""
    if loss_type == "hinge":
        return (1 - logits).relu()
    right, wrong = logsigmoid(logits), logsigmoid(-logits)  # log p, log(1 - p)
    if loss_type == "dmpo":
        kept, lost = math.log(1 - DMPO_TARGET), math.log(DMPO_TARGET)
        return right.exp() * (right - kept) + wrong.exp() * (wrong - lost)
    if loss_type == "robust":
        return (label_smoothing * wrong - (1 - label_smoothing) * right) / (1 - 2 * label_smoothing)
    return -(1 - label_smoothing) * right - label_smoothing * wrong if label_smoothing else -right


def cpo_loss(
    chosen_error: Tensor,
    rejected_error: Tensor,
    *,
    beta: float | Tensor = 2500.0,
    sft_weight: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Contrastive preference optimisation, which has the winner's own error in place of a reference (paper, eq. 19).

    ``-log sigmoid(beta (rejected - chosen)) + sft_weight * chosen`` per pair.

    Args:
        chosen_error, rejected_error: the model's errors on winners and losers, (B,).
        beta: the factor of the margin of mean errors, a positive number, or one for each pair, (B,).
        sft_weight: the weight of the winner's own error, the paper's lambda; not negative.
        reduction: "mean", "sum" or "none".

    Returns:
        0-dim, or (B,) for "none".

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value.

    >>> e = torch.tensor([0.5])
    >>> cpo_loss(e, e, beta=2500.0, sft_weight=1.0)  # log 2 + 0.5
    tensor(1.1931)
    """
    check_errors(chosen_error=chosen_error, rejected_error=rejected_error)
    beta = _check_beta(beta, chosen_error)
    sft_weight = _check_weight("sft_weight", sft_weight)
    loss = -logsigmoid(beta * _margin(chosen_error, rejected_error))
    return reduce_batch(loss + sft_weight * chosen_error.to(loss.dtype), reduction)


def sft_loss(chosen_error: Tensor, *, reduction: str = "mean") -> Tensor:
    """Supervised fine-tuning on winners: the error itself.

    Args:
        chosen_error: the model's errors on winners, (B,).
        reduction: "mean", "sum" or "none".

    Returns:
        0-dim, or (B,) for "none".

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype, or an unknown reduction.

    >>> sft_loss(torch.tensor([0.25, 0.75]))
    tensor(0.5000)
    """
    check_errors(chosen_error=chosen_error)
    return reduce_batch(chosen_error.to(at_least_float32(chosen_error)), reduction)


def mapo_loss(
    chosen_error: Tensor,
    rejected_error: Tensor,
    *,
    beta: float | Tensor = 0.1,
    scale: float = 0.5,
    steps: int = 1000,
    reduction: str = "mean",
) -> Tensor:
    r"""Margin-aware preference optimisation, which has the winner's error and no reference (MaPO, arXiv 2406.06424).

    ``chosen - beta log sigmoid(steps [f(chosen) - f(rejected)])`` per pair, ``f(e) = scale e / (exp(scale e) - 1)``.

    Args:
        chosen_error, rejected_error: the model's errors on winners and losers, (B,). The published ``scale`` and
            ``beta`` are for latent errors, which are of order 0.1 to 1.
        beta: the weight of the preference beside the winner's error, a positive number, or one for each pair, (B,). It
            multiplies no margin.
        scale: the factor of the errors in f, a positive number.
        steps: T, the number of steps of the noise schedule, a positive number.
        reduction: "mean", "sum" or "none".

    Returns:
        0-dim, or (B,) for "none".

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value.

    >>> e = torch.tensor([0.5])
    >>> mapo_loss(e, e)  # 0.5 + 0.1 log 2
    tensor(0.5693)
    """
    check_errors(chosen_error=chosen_error, rejected_error=rejected_error)
    beta = _check_beta(beta, chosen_error)
    scale, T = check_number("scale", scale), check_number("steps", steps)
    chosen, rejected = (e.to(at_least_float32(e)) for e in (chosen_error, rejected_error))
    logits = T * (_bernoulli_less_1(scale * chosen) - _bernoulli_less_1(scale * rejected))
    return reduce_batch(chosen - beta * logsigmoid(logits), reduction)


def _bernoulli_less_1(y: Tensor) -> Tensor:
    """``y / (exp(y) - 1) - 1``, where neither the value for a small y nor its derivative loses digits."""
    small = y.abs() < 0.1
    # The branch that is not taken is evaluated too, at a place where its derivative is finite: 0 * inf would be NaN.
    near, far = y.where(small, 0.0), y.where(~small, 1.0)
    # The first terms of the Taylor series, whose coefficients are Bernoulli numbers over factorials.
    series = near * (near * (1 / 12 - near.square() * (1 / 720 - near.square() / 30240)) - 0.5)
    return series.where(small, -far * (-far).exp() / (-far).expm1() - 1)


def kto_loss(
    error: Tensor,
    ref_error: Tensor,
    desirable: Tensor,
    *,
    beta: float | Tensor = 1000.0,
    kl: float | Tensor | None = None,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Kahneman-Tversky optimisation on single samples, liked or not, without pairs (Diffusion-KTO, arXiv 2404.04465).

    ``w (1 - sigmoid(y beta [(ref_error - error) - kl]))`` per sample, where y is 1 if it is desirable and -1 if not.

    Args:
        error, ref_error: the model's and the reference model's errors, (B,).
        desirable: a bool tensor, (B,), True for samples that are liked.
        beta: the factor of the difference of mean errors, a positive number, or one for each sample, (B,).
        kl: the gain that counts as none, in units of error, a number or a 0-dim tensor. Less than 0 counts as 0. It
            has no gradient. None is the batch's mean of ``ref_error - error``. If a batch is spread over processes,
            pass that mean over all of them.
        desirable_weight, undesirable_weight: w of each kind of sample, not negative.
        reduction: "mean", "sum" or "none".

    Returns:
        0-dim, or (B,) for "none".

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value.

    >>> e = torch.tensor([0.5, 0.25])
    >>> kto_loss(e, e, torch.tensor([True, False]))  # model equals reference: 1 - sigmoid(0)
    tensor(0.5000)
    """
    check_errors(error=error, ref_error=ref_error)
    if check_tensor("desirable", desirable).dtype != torch.bool:
        raise bad("desirable", "a bool tensor", desirable.dtype, TypeError)
    check_shaped("desirable", desirable, "error", error)
    beta = _check_beta(beta, error)
    desirable_weight = _check_weight("desirable_weight", desirable_weight)
    undesirable_weight = _check_weight("undesirable_weight", undesirable_weight)
    gain = ref_error.to(at_least_float32(ref_error)) - error
    # As published, the reference point takes no part in the gradient and is never below 0.
    kl = gain.mean() if kl is None else _check_kl(kl, gain)
    advantage = beta * (gain - kl.detach().clamp(min=0))
    liked, disliked = desirable_weight * (-advantage).sigmoid(), undesirable_weight * advantage.sigmoid()
    return reduce_batch(liked.where(desirable, disliked), reduction)


@torch.no_grad()
def preference_metrics(
    loss: Tensor,
    chosen_error: Tensor,
    rejected_error: Tensor,
    ref: tuple[Tensor, Tensor] | None,
    beta: float | Tensor,
) -> dict[str, Tensor]:
    """What preference trainers log, by the names that they use, with ``rewards/* = beta * (ref_error - error)``.

    Args:
        loss: the loss of each pair, (B,), or their mean. The metric is its mean.
        chosen_error, rejected_error: the model's errors on winners and losers, (B,).
        ref: the reference's errors on winners and on losers, (B,) each, or None if there is no reference, as in CPO.
        beta: that of the loss, a positive number, or one for each pair, (B,).

    Returns:
        0-dim tensors without gradient. ``loss`` is the mean loss. ``raw_model_loss`` and ``ref_loss`` are the mean
        errors of the model and of a reference. ``rewards/margins`` is ``rewards/chosen`` less ``rewards/rejected``.
        ``rewards/accuracies`` and ``implicit_acc`` are the share of pairs with a positive margin, where a tie counts
        one half. No value is read, so the host does not wait for a GPU.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value.

    >>> e = torch.tensor([0.5, 0.25])
    >>> preference_metrics(e.mean(), e, e + 0.5, (e, e), beta=2.0)["rewards/margins"]
    tensor(1.)
    """
    if ref is not None and not (isinstance(ref, tuple | list) and len(ref) == 2):
        raise bad("ref", "the reference's errors on winners and on losers, or None", type(ref).__name__, TypeError)
    refs = {} if ref is None else {"ref_chosen_error": ref[0], "ref_rejected_error": ref[1]}
    check_errors(chosen_error=chosen_error, rejected_error=rejected_error, **refs)
    if check_device("loss", check_floating("loss", loss), "chosen_error", chosen_error).numel() == 0:
        raise bad("loss", "of one value or more", f"shaped {tuple(loss.shape)}")
    beta, dtype = _check_beta(beta, chosen_error), at_least_float32(chosen_error)
    chosen, rejected = chosen_error.to(dtype), rejected_error.to(dtype)
    ref_chosen, ref_rejected = ref or (0.0, 0.0)
    # The margin is computed as in the loss, so that accuracy and loss agree on which side of a tie a pair is.
    margins = beta * _margin(chosen, rejected, ref_chosen, ref_rejected)
    accuracy = (0.5 * (margins.sign() + 1)).mean()
    return {
        "loss": loss.mean(),
        "raw_model_loss": torch.cat([chosen, rejected]).mean(),
        **({"ref_loss": torch.cat(ref).mean(dtype=dtype)} if ref else {}),
        "implicit_acc": accuracy,
        "rewards/chosen": (beta * (ref_chosen - chosen)).mean(),
        "rewards/rejected": (beta * (ref_rejected - rejected)).mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": accuracy,
    }


@torch.no_grad()
def by_timestep(
    values: Tensor, timesteps: Tensor, edges: Sequence[float] = (0, 250, 500, 750, 1000)
) -> dict[str, Tensor]:
    """The mean of per-sample or per-pair values, such as errors or margins, in each range of timesteps.

    Args:
        values: the values, (B,).
        timesteps: the values' timesteps, (B,). For pairs these are the winners' timesteps.
        edges: the edges of the ranges, in rising order. A range includes its lower edge, and the last one both edges.

    Returns:
        For each range, named as in ``"0-250"``, the mean, a 0-dim tensor without gradient. It is NaN if no timestep is
        in the range, so average it over batches by ``nanmean``. No value is read, so the host does not wait for a
        GPU.

    Raises:
        ValueError, TypeError: values and timesteps have different shapes or devices, or the edges do not rise.

    >>> by_timestep(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([10, 300, 499]), edges=(0, 250, 500))
    {'0-250': tensor(1.), '250-500': tensor(4.)}
    """
    if check_floating("values", values).ndim != 1:
        raise bad("values", "one for each sample or pair, shape (B,)", f"shaped {tuple(values.shape)}")
    timesteps = check_timesteps(check_tensor("timesteps", timesteps), math.inf, whole=False, low=-math.inf)
    check_shaped("timesteps", timesteps, "values", values)
    must_be = "two numbers or more, in rising order"
    if not isinstance(edges, Sequence):
        raise bad("edges", must_be, type(edges).__name__, TypeError)
    rising = [check_number("edges", edge, must_be, lambda x: True) for edge in edges]
    if len(rising) < 2 or any(low >= high for low, high in pairwise(rising)):
        raise bad("edges", must_be, repr(edges))
    found = {}
    for low, high in pairwise(rising):
        below = timesteps <= high if high == rising[-1] else timesteps < high
        inside = (timesteps >= low) & below
        found[f"{low:.12g}-{high:.12g}"] = values.where(inside, 0.0).sum(dtype=at_least_float32(values)) / inside.sum()
    return found


def _margin(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor | float = 0.0, ref_rejected: Tensor | float = 0.0
) -> Tensor:
    """``(rejected - ref_rejected) - (chosen - ref_chosen)``, in units of error. A larger margin is better."""
    dtype = at_least_float32(chosen)
    return (rejected.to(dtype) - ref_rejected) - (chosen.to(dtype) - ref_chosen)


def _check_beta(beta: object, errors: Tensor) -> float | Tensor:
    """A positive number, or a tensor with one for each error, whose values are read on the host only."""
    must_be = "a positive number, or a tensor with one for each pair, (B,)"
    if not isinstance(beta, Tensor):
        limits = torch.finfo(at_least_float32(errors))  # past these it would become infinite or 0
        return check_number("beta", beta, must_be, lambda x: limits.tiny <= x <= limits.max)
    given = check_like("beta", beta, "the errors", errors)
    beta = given.to(at_least_float32(errors))  # in which it may be infinite or 0
    if values_are_free(beta) and not (beta.isfinite() & (beta > 0)).all():
        raise bad("beta", must_be, given.tolist())
    return beta


def _check_kl(kl: object, gain: Tensor) -> Tensor:
    """A number or a 0-dim tensor, as a tensor on the errors' device."""
    if isinstance(kl, Tensor) and check_floating("kl", kl).ndim:
        raise bad("kl", "a number or a 0-dim tensor", f"shaped {tuple(kl.shape)}")
    if isinstance(kl, Tensor) and not values_are_free(kl):
        return check_device("kl", kl, "error", gain)
    return gain.new_zeros(()) + check_number("kl", kl, "a number", lambda x: True)


def _check_weight(name: str, value: object) -> float:
    return check_number(name, value, "a number, not negative", lambda x: x >= 0)
