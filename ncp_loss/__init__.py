"""Noise-conditioned perceptual losses for aligning diffusion models (arXiv 2406.17636)."""

from .loss import NoiseConditionedPerceptualLoss
from .objectives import PreferenceOutput, cpo_loss, dpo_loss, sft_loss
from .preference import ncp_cpo_loss, ncp_dpo_loss, ncp_sft_loss
from .schedule import FlowSchedule, NoiseSchedule
from .view import frozen_view

__version__ = "0.1.0"
__all__ = [
    "FlowSchedule",
    "NoiseConditionedPerceptualLoss",
    "NoiseSchedule",
    "PreferenceOutput",
    "cpo_loss",
    "dpo_loss",
    "frozen_view",
    "ncp_cpo_loss",
    "ncp_dpo_loss",
    "ncp_sft_loss",
    "sft_loss",
]
