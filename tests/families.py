"""Transformers of diffusers at tiny sizes, random weights, and how a trainer calls each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

ROWS, TEXT, WIDTH = 2, 5, 16


class Family(NamedTuple):
    """``call`` is a trainer's own line, None the library's; ``extra`` what the model is given besides the text."""

    model: str
    config: dict[str, Any]
    layers: list[str]  # the last is the one whose successor must not run
    scheduler: Any
    call: Callable[..., Any] | None = None
    extra: dict[str, Any] = {}  # noqa: RUF012


def pack(x: Tensor) -> Tensor:
    """2 x 2 latents to a token, as Flux and Qwen-Image have them."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def call_flux(model: nn.Module, x: Tensor, t: Tensor, **conditioning: Any) -> Any:
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)).to(x.dtype)
    return model(pack(x), timestep=t / 1000, img_ids=ids, txt_ids=torch.zeros(TEXT, 3).to(x.dtype), **conditioning)


def call_qwen(model: nn.Module, x: Tensor, t: Tensor, **conditioning: Any) -> Any:
    return model(pack(x), timestep=t / 1000, **conditioning)


def call_lumina(model: nn.Module, x: Tensor, t: Tensor, **conditioning: Any) -> Any:
    return model(x, timestep=1 - t / 1000, **conditioning)


def call_z_image(model: nn.Module, x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Any:
    return model(list(x.unsqueeze(2)), 1 - t / 1000, list(encoder_hidden_states))


def call_hunyuan(model: nn.Module, x: Tensor, t: Tensor, **conditioning: Any) -> Any:
    return model(x, timestep=t.to(x.dtype), **conditioning)  # its embeddings take the timesteps' dtype


def normal(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def flow(shift: float = 3.0) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=shift)


MASK = torch.ones(ROWS, TEXT, dtype=torch.int64)
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
FAMILIES = {
    "SD3": Family(
        "SD3Transformer2DModel",
        {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 3, "joint_attention_dim": WIDTH}
        | {"caption_projection_dim": 32, "pooled_projection_dim": WIDTH, "pos_embed_max_size": 8, **HEADS},
        ["transformer_blocks.0", "transformer_blocks.1"],
        flow(),
        extra={"pooled_projections": normal(WIDTH)},
    ),
    "Flux": Family(
        "FluxTransformer2DModel",
        {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": WIDTH, **HEADS}
        | {"pooled_projection_dim": WIDTH, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True},
        ["transformer_blocks.1", "single_transformer_blocks.0"],
        flow(1.0),
        call_flux,
        {"pooled_projections": normal(WIDTH), "guidance": torch.full((ROWS,), 3.5, dtype=torch.float64)},
    ),
    "PixArt": Family(
        "PixArtTransformer2DModel",
        {"sample_size": 8, "num_layers": 3, "cross_attention_dim": 32, "caption_channels": WIDTH, **HEADS}
        | {"use_additional_conditions": False},
        ["transformer_blocks.-2"],
        DDPMScheduler(),
        extra={"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "encoder_attention_mask": MASK},
    ),
    "Sana": Family(
        "SanaTransformer2DModel",
        {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 3, "caption_channels": WIDTH, **HEADS}
        | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32},
        ["transformer_blocks.1"],
        flow(),
    ),
    "Lumina 2": Family(
        "Lumina2Transformer2DModel",
        {"sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 3, "num_refiner_layers": 1}
        | {"num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2, "cap_feat_dim": WIDTH}
        | {"axes_dim_rope": (4, 2, 2), "axes_lens": (64, 64, 64)},
        ["layers.1"],
        flow(6.0),
        call_lumina,
        {"encoder_attention_mask": MASK.bool()},
    ),
    "Qwen-Image": Family(
        "QwenImageTransformer2DModel",
        {"in_channels": 16, "out_channels": 4, "num_layers": 3, "joint_attention_dim": WIDTH, **HEADS}
        | {"axes_dims_rope": (4, 4, 8)},
        ["transformer_blocks.1"],
        flow(1.0),
        call_qwen,
        {"encoder_hidden_states_mask": MASK, "img_shapes": [[(1, 4, 4)]] * ROWS},
    ),
    "Z-Image": Family(
        "ZImageTransformer2DModel",
        {"in_channels": 4, "dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
        | {"cap_feat_dim": WIDTH, "axes_dims": [4, 6, 6], "axes_lens": [64, 32, 32]},
        ["layers.1"],
        flow(3.0),
        call_z_image,
    ),
    "HunyuanDiT": Family(
        "HunyuanDiT2DModel",
        {"sample_size": 8, "in_channels": 4, "patch_size": 2, "num_layers": 4, "hidden_size": 32, **HEADS}
        | {"cross_attention_dim": WIDTH, "cross_attention_dim_t5": WIDTH, "pooled_projection_dim": 4}
        | {"text_len": TEXT, "text_len_t5": TEXT},
        ["blocks.1"],
        DDPMScheduler(prediction_type="v_prediction"),
        call_hunyuan,
        {
            "text_embedding_mask": MASK,
            "encoder_hidden_states_t5": normal(TEXT, WIDTH),
            "text_embedding_mask_t5": MASK,
            "image_meta_size": torch.tensor([[64.0, 64, 64, 64, 0, 0]] * ROWS),
            "style": torch.zeros(ROWS, dtype=torch.int64),
            "image_rotary_emb": tuple(normal(16)[:1].expand(16, 16).contiguous() for _ in range(2)),
        },
    ),
}


def of_diffusers(name: str) -> Any:
    """A class of diffusers that the oldest version which is declared may lack."""
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return getattr(diffusers, name)


def transformer(family: Family, seed: int = 0) -> nn.Module:
    of_class = of_diffusers(family.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = of_class(**family.config)
        with torch.no_grad():  # gates that start at zero would hide every block
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.double().eval().requires_grad_(False)


def family_batch(family: Family, seed: int = 0) -> dict[str, Any]:
    """Arguments of ``ncp.errors``, timesteps on the scheduler's own grid."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(ROWS, *shape, generator=generator, dtype=torch.float64)

    target = random(4, 8, 8)
    at = torch.tensor([300.0, 700.0], dtype=torch.float64)
    if not isinstance(family.scheduler, DDPMScheduler):  # on the grid: t / 1000 = sigma(u), u = 0.3 and 0.7
        shift = family.scheduler.config.shift
        at = 1000 * shift * at / (1000 + (shift - 1) * at)
    return {
        "model_pred": (target + 0.3 * random(4, 8, 8)).requires_grad_(),
        "ref_pred": target + 0.3 * random(4, 8, 8),
        "target": target,
        "noisy_latents": random(4, 8, 8),
        "timesteps": at,
        "encoder_hidden_states": random(TEXT, WIDTH),
        **family.extra,
    }
