"""Noise-conditioned perceptual losses for aligning diffusion models (arXiv 2406.17636)."""

from .loss import NoiseConditionedPerceptualLoss
from .objectives import (
    PreferenceOutput,
    by_timestep,
    cpo_loss,
    dpo_loss,
    kto_loss,
    mapo_loss,
    preference_metrics,
    relative_beta,
    sft_loss,
)
from .preference import ncp_cpo_loss, ncp_dpo_loss, ncp_sft_loss
from .schedule import FlowSchedule, NoiseSchedule
from .view import frozen_view
from .winners import absolute_winners

__version__ = "0.1.0"
__all__ = [
    "FlowSchedule",
    "NoiseConditionedPerceptualLoss",
    "NoiseSchedule",
    "PreferenceOutput",
    "absolute_winners",
    "by_timestep",
    "cpo_loss",
    "dpo_loss",
    "frozen_view",
    "kto_loss",
    "mapo_loss",
    "ncp_cpo_loss",
    "ncp_dpo_loss",
    "ncp_sft_loss",
    "preference_metrics",
    "relative_beta",
    "sft_loss",
]
