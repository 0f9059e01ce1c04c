"""preference: the objectives on predictions: the one call that a preference-training loop makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checks import bad, check_like, check_no_reference
from .loss import NoiseConditionedPerceptualLoss
from .objectives import PreferenceOutput, cpo_loss, dpo_loss, preference_metrics, reduce_batch, relative_beta, sft_loss


def ncp_dpo_loss(
    ncp: NoiseConditionedPerceptualLoss,
    model_pred: Tensor,
    target: Tensor,
    noisy_latents: Tensor,
    timesteps: Tensor,
    encoder_hidden_states: Tensor | None = None,
    *,
    ref_pred: Tensor | None = None,
    ref_error: Tensor | None = None,
    beta: float | Tensor = 2500.0,
    kappa: float | None = None,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    reduction: str = "mean",
    variance_noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    **model_kwargs: Any,
) -> PreferenceOutput:
    r"""NCP-DPO (paper, eq. 18): direct preference optimisation on perceptual errors.

    ``-log sigmoid(beta [(PLl - PLl_ref) - (PLw - PLw_ref)])``, where PL is the error that
    :class:`NoiseConditionedPerceptualLoss` gives on winners (w) and losers (l).

    The batch holds B winners and then their B losers, so every tensor has 2B rows. Both members of a pair must have the
    same timestep, noise and ``variance_noise``.

    Args:
        ncp: the loss that computes the errors.
        model_pred, target, noisy_latents: (2B, C, H, W), as in :meth:`NoiseConditionedPerceptualLoss.errors`.
        timesteps: 0-dim or (2B,).
        encoder_hidden_states: the text condition, (2B, L, D).
        ref_pred: the reference model's prediction, (2B, C, H, W). Either this or ``ref_error`` is given.
        ref_error: the reference model's error, (2B,), computed earlier by ``ncp.errors(..., pairs=True)`` with the same
            noise, timesteps and draws: the same ``variance_noise``, a ``generator`` in the same state, or neither.
        beta: the factor of the margin of mean errors, a positive number, or one for each pair, (B,). The scale of
            errors depends on model, layer and timestep: ``metrics["rewards/margins"]`` should reach order one.
        kappa: a positive number that takes beta's place. Each pair's beta is then
            ``relative_beta(ref_chosen, ref_rejected, kappa)``, kappa divided by the reference's mean error on the pair,
            so that the scale of errors need not be known. 2 is a value to begin with.
        loss_type, label_smoothing, sft_weight, reduction: as in :func:`dpo_loss`.
        variance_noise, generator, **model_kwargs: as in :meth:`NoiseConditionedPerceptualLoss.errors`.

    Returns:
        The loss and metrics: ``loss, raw_model_loss, ref_loss, implicit_acc, rewards/chosen, rewards/rejected,
        rewards/margins, rewards/accuracies``, with ``rewards/* = beta * (ref_error - error)``.

    Raises:
        ValueError, TypeError: both or neither of ``ref_pred`` and ``ref_error`` are given, a beta other than the
            default is given beside kappa, the batch is odd, the members of a pair differ in what they must share
            (checked on the host only), or another argument is bad.

    >>> from diffusers import UNet2DModel
    >>> unet = UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    >>> ncp = NoiseConditionedPerceptualLoss(unet.requires_grad_(False))
    >>> x, noise, t = torch.randn(2, 3, 8, 8), torch.randn(1, 3, 8, 8).repeat(2, 1, 1, 1), torch.tensor([10, 10])
    >>> ncp_dpo_loss(ncp, noise, noise, x, t, ref_pred=noise).loss  # log 2: the model is its reference
    tensor(0.6931)
    """
    if (ref_pred is None) == (ref_error is None):
        was = "both" if ref_error is not None else "neither"
        raise bad("ref_pred or ref_error", "given, and only one of them", was)
    _check_loss(ncp, model_kwargs)
    if kappa is not None and not (isinstance(beta, float) and beta == 2500.0):
        raise bad("beta", "left out where kappa is given, which takes its place", "given")
    if ref_error is not None and generator is None and ncp.step == "uniform":
        raise bad(
            "ref_error", "None for step='uniform' without a generator, which draws other steps each time", "given"
        )
    inputs = model_pred, target, noisy_latents, timesteps, encoder_hidden_states
    options: dict[str, Any] = {"variance_noise": variance_noise, "generator": generator, **model_kwargs}
    error, from_pred = ncp.errors(*inputs, ref_pred=ref_pred, pairs=True, **options)
    ref = ref_error if from_pred is None else from_pred
    chosen, rejected = error.chunk(2)
    ref_chosen, ref_rejected = check_like("ref_error", ref, "the batch's errors", error).detach().chunk(2)
    errors = chosen, rejected, ref_chosen, ref_rejected
    beta = beta if kappa is None else relative_beta(ref_chosen, ref_rejected, kappa)
    losses = dpo_loss(
        *errors,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        sft_weight=sft_weight,
        reduction="none",
    )
    metrics = preference_metrics(losses, chosen, rejected, (ref_chosen, ref_rejected), beta)
    return PreferenceOutput(reduce_batch(losses, reduction), metrics)


def ncp_cpo_loss(
    ncp: NoiseConditionedPerceptualLoss,
    model_pred: Tensor,
    target: Tensor,
    noisy_latents: Tensor,
    timesteps: Tensor,
    encoder_hidden_states: Tensor | None = None,
    *,
    beta: float | Tensor = 2500.0,
    sft_weight: float = 1.0,
    reduction: str = "mean",
    variance_noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    **model_kwargs: Any,
) -> PreferenceOutput:
    r"""NCP-CPO (paper, eq. 19): no reference model.

    ``-log sigmoid(beta (PLl - PLw)) + sft_weight * PLw``. The batch is laid out as in :func:`ncp_dpo_loss`.

    Args:
        ncp, model_pred, target, noisy_latents, timesteps, encoder_hidden_states: as in :func:`ncp_dpo_loss`.
        beta, sft_weight, reduction: as in :func:`cpo_loss`.
        variance_noise, generator, **model_kwargs: as in :meth:`NoiseConditionedPerceptualLoss.errors`.

    Returns:
        The loss and the metrics of :func:`ncp_dpo_loss` without ``ref_loss``. ``rewards/* = -beta * error``.

    Raises:
        ValueError, TypeError: the batch is odd, or another argument is bad.

    >>> from diffusers import UNet2DModel
    >>> unet = UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    >>> ncp = NoiseConditionedPerceptualLoss(unet.requires_grad_(False))
    >>> x, noise, t = torch.randn(2, 3, 8, 8), torch.randn(1, 3, 8, 8).repeat(2, 1, 1, 1), torch.tensor([10, 10])
    >>> ncp_cpo_loss(ncp, noise, noise, x, t).loss  # log 2: winner and loser are both predicted rightly
    tensor(0.6931)
    """
    inputs = model_pred, target, noisy_latents, timesteps, encoder_hidden_states
    _check_loss(ncp, model_kwargs)
    error, _ = ncp.errors(*inputs, pairs=True, variance_noise=variance_noise, generator=generator, **model_kwargs)
    chosen, rejected = error.chunk(2)
    losses = cpo_loss(chosen, rejected, beta=beta, sft_weight=sft_weight, reduction="none")
    metrics = preference_metrics(losses, chosen, rejected, None, beta)
    return PreferenceOutput(reduce_batch(losses, reduction), metrics)


def ncp_sft_loss(
    ncp: NoiseConditionedPerceptualLoss,
    model_pred: Tensor,
    target: Tensor,
    noisy_latents: Tensor,
    timesteps: Tensor,
    encoder_hidden_states: Tensor | None = None,
    *,
    reduction: str = "mean",
    variance_noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    **model_kwargs: Any,
) -> PreferenceOutput:
    """NCP-SFT: PLw, the perceptual error of a batch of winners only.

    Args:
        ncp, model_pred, target, noisy_latents, timesteps, encoder_hidden_states: B winners, as in
            :meth:`NoiseConditionedPerceptualLoss.errors`.
        reduction: "mean", "sum" or "none".
        variance_noise, generator, **model_kwargs: as in the same method.

    Returns:
        The loss, and the metrics ``loss`` and ``raw_model_loss``.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value.

    >>> from diffusers import UNet2DModel
    >>> unet = UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    >>> ncp = NoiseConditionedPerceptualLoss(unet.requires_grad_(False))
    >>> x, noise, t = torch.randn(2, 3, 8, 8), torch.randn(1, 3, 8, 8).repeat(2, 1, 1, 1), torch.tensor([10, 10])
    >>> ncp_sft_loss(ncp, noise, noise, x, t).loss
    tensor(0.)
    """
    inputs = model_pred, target, noisy_latents, timesteps, encoder_hidden_states
    _check_loss(ncp, model_kwargs)
    error, _ = ncp.errors(*inputs, variance_noise=variance_noise, generator=generator, **model_kwargs)
    mean = error.detach().mean()
    return PreferenceOutput(sft_loss(error, reduction=reduction), {"loss": mean, "raw_model_loss": mean})


def _check_loss(ncp: object, model_kwargs: Mapping[str, object]) -> None:
    check_no_reference(model_kwargs)
    if not callable(getattr(ncp, "errors", None)):
        raise bad("ncp", "a NoiseConditionedPerceptualLoss", type(ncp).__name__, TypeError)
