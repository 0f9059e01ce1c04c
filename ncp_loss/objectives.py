"""objectives: preference losses on per-sample errors, lower error = better, whatever the errors were measured in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .checks import bad, check_choice, check_errors, check_positive

LOSS_TYPES = ("sigmoid", "hinge", "ipo")
REDUCTIONS = ("mean", "sum", "none")


class PreferenceOutput(NamedTuple):
    """A loss, and detached 0-dim tensors to log."""

    loss: Tensor
    metrics: dict[str, Tensor]


def reduce_batch(per_sample: Tensor, reduction: str) -> Tensor:
    """(B,) -> the batch's mean or sum, or (B,) as it is for "none"."""
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
    beta: float = 2500.0,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Direct preference optimisation on denoising errors (Diffusion-DPO; paper, eq. 18).

    ``m = -beta [(chosen - ref_chosen) - (rejected - ref_rejected)]``, then per pair

    - "sigmoid": ``-(1 - s) log sigmoid(m) - s log sigmoid(-m)`` with label smoothing s,
    - "hinge": ``max(0, 1 - m)``,
    - "ipo": ``(m / beta - 1 / (2 beta))^2``.

    Args:
        chosen_error, rejected_error: the model's errors on winners and losers, (B,).
        ref_chosen_error, ref_rejected_error: the reference model's, (B,).
        beta: multiplies the margin of mean errors, once; nothing is halved.
        loss_type: "sigmoid", "hinge" or "ipo".
        label_smoothing: probability that a preference is the wrong way round, in [0, 0.5); "sigmoid" only.
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
    check_positive("beta", beta)
    if not 0 <= label_smoothing < 0.5:
        raise bad("label_smoothing", "in [0, 0.5)", repr(label_smoothing))
    if label_smoothing and loss_type != "sigmoid":
        raise bad("label_smoothing", f"0 for loss_type={loss_type!r}", repr(label_smoothing))
    margin = _margin(chosen_error, rejected_error, ref_chosen_error, ref_rejected_error)
    logits = beta * margin
    if loss_type == "hinge":
        loss = (1 - logits).relu()
    elif loss_type == "ipo":
        loss = (margin - 1 / (2 * beta)).square()
    else:
        loss = -logsigmoid(logits)
        if label_smoothing:
            loss = (1 - label_smoothing) * loss - label_smoothing * logsigmoid(-logits)
    return reduce_batch(loss, reduction)


def cpo_loss(
    chosen_error: Tensor,
    rejected_error: Tensor,
    *,
    beta: float = 2500.0,
    sft_weight: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Contrastive preference optimisation: no reference, and the winner's own error as an anchor (paper, eq. 19).

    ``-log sigmoid(-beta (chosen - rejected)) + sft_weight * chosen`` per pair.

    Args:
        chosen_error, rejected_error: the model's errors on winners and losers, (B,).
        beta: multiplies the margin of mean errors, once.
        sft_weight: lambda, not negative.
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
    check_positive("beta", beta)
    if not sft_weight >= 0:
        raise bad("sft_weight", "not negative", repr(sft_weight))
    loss = -logsigmoid(beta * _margin(chosen_error, rejected_error)) + sft_weight * chosen_error
    return reduce_batch(loss, reduction)


def sft_loss(chosen_error: Tensor, *, reduction: str = "mean") -> Tensor:
    """Supervised fine-tuning on winners: the error itself.

    Args:
        chosen_error: the model's errors on winners, (B,).
        reduction: "mean", "sum" or "none".

    Returns:
        0-dim, or (B,) for "none".

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype, an unknown reduction.

    >>> sft_loss(torch.tensor([0.25, 0.75]))
    tensor(0.5000)
    """
    check_errors(chosen_error=chosen_error)
    return reduce_batch(chosen_error, reduction)


def preference_metrics(
    loss: Tensor, chosen_error: Tensor, rejected_error: Tensor, ref: tuple[Tensor, Tensor] | None, beta: float
) -> dict[str, Tensor]:
    """What trainers log, by the names they use: ``rewards/* = beta * (ref_error - error)``; a tie counts one half.

    Args:
        loss: of the batch, any shape.
        chosen_error, rejected_error: the model's errors on winners and losers, (B,).
        ref: the reference's on winners and losers, (B,) each, or None, as for CPO.
        beta: as in the loss.

    Returns:
        0-dim tensors without gradient, ``ref_loss`` where there is a reference. Reading none, it waits for no GPU.

    >>> e = torch.tensor([0.5, 0.25])
    >>> preference_metrics(e.mean(), e, e + 0.5, (e, e), beta=2.0)["rewards/margins"]
    tensor(1.)
    """
    chosen, rejected = chosen_error.detach(), rejected_error.detach()
    ref_chosen, ref_rejected = ref or (0.0, 0.0)
    # The margin is taken as the loss takes it, so that accuracy and loss agree on which side of a tie a pair is.
    margins = beta * _margin(chosen, rejected, ref_chosen, ref_rejected)
    accuracy = (0.5 * (margins.sign() + 1)).mean()
    return {
        "loss": loss.detach().mean(),
        "raw_model_loss": torch.cat([chosen, rejected]).mean(),
        **({"ref_loss": torch.cat(ref).mean()} if ref else {}),
        "implicit_acc": accuracy,
        "rewards/chosen": (beta * (ref_chosen - chosen)).mean(),
        "rewards/rejected": (beta * (ref_rejected - rejected)).mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": accuracy,
    }


def _margin(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor | float = 0.0, ref_rejected: Tensor | float = 0.0
) -> Tensor:
    """How much better than the reference the model is on winners than on losers, in units of error."""
    dtype = torch.promote_types(chosen.dtype, torch.float32)
    return (rejected.to(dtype) - ref_rejected) - (chosen.to(dtype) - ref_chosen)
