"""What a user writes, as type checkers see it: `make types` checks it strictly, and tests run it."""

from __future__ import annotations

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn

from ncp_loss import (
    NoiseConditionedPerceptualLoss,
    NoiseSchedule,
    PreferenceOutput,
    dpo_loss,
    frozen_view,
    ncp_cpo_loss,
    ncp_dpo_loss,
    ncp_sft_loss,
)


def step(unet: nn.Module) -> PreferenceOutput:
    schedule: NoiseSchedule = NoiseSchedule.from_scheduler(DDPMScheduler())
    ncp = NoiseConditionedPerceptualLoss(unet, ["down_blocks"], schedule=schedule, step=2, weighting="noise")
    reference: nn.Module = frozen_view(unet)
    noisy, noise = torch.randn(4, 3, 8, 8), torch.randn(2, 3, 8, 8).repeat(2, 1, 1, 1)
    timesteps = torch.tensor([10, 500]).repeat(2)
    prediction: Tensor = unet(noisy, timesteps).sample
    with torch.no_grad():
        ref_prediction: Tensor = reference(noisy, timesteps).sample
    error, ref_error = ncp.errors(prediction, noise, noisy, timesteps, ref_pred=ref_prediction)
    assert ref_error is not None
    chosen, rejected = error.chunk(2)
    ref_chosen, ref_rejected = ref_error.chunk(2)
    loss: Tensor = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=1.0)
    features: dict[str, Tensor] = ncp.features(noisy, timesteps)
    assert loss.ndim == 0
    assert features["down_blocks"].ndim == 4
    inputs = prediction, noise, noisy, timesteps
    outputs = [ncp_cpo_loss(ncp, *inputs), ncp_sft_loss(ncp, *inputs)]
    assert all(output.metrics["loss"].isfinite() for output in outputs)
    return ncp_dpo_loss(ncp, *inputs, ref_pred=ref_prediction, beta=1.0)


def test_a_typed_program_runs() -> None:
    config = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    out = step(UNet2DModel(**config))
    loss, metrics = out
    assert loss is out.loss
    assert metrics["rewards/accuracies"] == 0.5
