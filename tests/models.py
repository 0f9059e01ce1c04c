"""Small diffusers U-Nets with the block layouts of Stable Diffusion 1.5, 2 and XL, and batches to feed them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ncp_loss import NoiseConditionedPerceptualLoss
from ncp_loss.encoder import FrozenEncoder


def sd15(seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any) -> UNet2DConditionModel:
    """Four levels, attention in all but the last; frozen."""
    config = {
        "sample_size": 16,
        "block_out_channels": (16, 16, 32, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
    }
    return _seeded(seed, dtype, config | overrides)


def sd2(seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any) -> UNet2DConditionModel:
    """SD 2's layout: linear projections, a head count for each level; it predicts velocity."""
    return sd15(seed, dtype, use_linear_projection=True, attention_head_dim=(2, 4, 4, 4), **overrides)


def sdxl(seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any) -> UNet2DConditionModel:
    """Three levels, deeper transformers below, pooled text and sizes added to the time embedding; frozen."""
    config = {
        "sample_size": 16,
        "block_out_channels": (16, 16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 12,
        "attention_head_dim": (2, 4, 4),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 8 + 6 * 4,
    }
    return _seeded(seed, dtype, config | overrides)


def small(dtype: torch.dtype = torch.float64, seed: int = 0) -> UNet2DConditionModel:
    """Two levels of `sd15`: where the layout makes no difference."""
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    config = {"block_out_channels": (8, 16), "norm_num_groups": 4, "down_block_types": down, "up_block_types": up}
    return sd15(seed, dtype, sample_size=8, **config)


LAYOUTS = {"sd15": sd15, "sd2": sd2, "sdxl": sdxl}
PREDICTION_TYPE = {"sd15": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}


def batch(
    unet: UNet2DConditionModel,
    size: int = 2,
    *,
    pairs: bool = False,
    height: int | None = None,
    width: int | None = None,
    timesteps: list[int] | None = None,
    error: float = 0.3,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Arguments of ``ncp.errors``, ``size`` rows; with ``pairs``, size winners and then their losers.

    Without height or width, that is the model's own ``sample_size``.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = unet.dtype if dtype is None else dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def twice(x: Tensor) -> Tensor:
        return x.repeat(2, *[1] * (x.ndim - 1)) if pairs else x

    rows = 2 * size if pairs else size
    shape = (unet.config.in_channels, *(side or unet.config.sample_size for side in (height, width)))
    t = torch.tensor(timesteps) if timesteps else torch.randint(1, 1000, (size,), generator=generator)
    target = twice(normal(size, *shape))
    arguments: dict[str, Any] = {
        "target": target,
        "model_pred": (target + error * normal(rows, *shape)).requires_grad_(),
        "noisy_latents": normal(rows, *shape),
        "timesteps": twice(t),
        "encoder_hidden_states": twice(normal(size, 5, unet.config.cross_attention_dim)),
        "ref_pred": target + error * normal(rows, *shape),
        "variance_noise": twice(normal(size, *shape)),
    }
    if unet.config.addition_embed_type == "text_time":
        sizes = torch.tensor([64.0, 80.0, 1.0, 3.0, 1021.0, 1024.0], dtype=dtype).expand(rows, 6)
        arguments["added_cond_kwargs"] = {"text_embeds": twice(normal(size, 8)), "time_ids": sizes}
    return arguments


def encoder_of(ncp: NoiseConditionedPerceptualLoss) -> FrozenEncoder:
    """What the loss calls, which has no public name.

    Only from inside a loss can it be told which calls the encoder gets, in what dtype and how many, what its gradients
    are, and whose memory its weights are in. What it computes is public: ``ncp.features``.
    """
    return ncp._encoder


def _seeded(seed: int, dtype: torch.dtype, config: dict[str, Any]) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**config)
    return unet.to(dtype).requires_grad_(False)
