"""Pipelines with the layouts of Stable Diffusion 1.5, XL and 3, untrained and tiny, and pairs of real digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from models import sd15, sdxl
from PIL import Image
from sklearn.datasets import load_digits
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WIDTH, LENGTH = 12, 16  # of the text encoders


def tokenizer() -> CLIPTokenizer:
    """Letters and figures, alone and at the end of a word, and no merges."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({name: i for i, name in enumerate(names)}, [], model_max_length=LENGTH)


def text_encoder(kind: type = CLIPTextModel, width: int = WIDTH, projection: int = 8) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=80,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=projection,
        bos_token_id=72,
        eos_token_id=73,
        pad_token_id=73,
    )
    return kind(config)


def vae(channels: int = 4, **config: Any) -> AutoencoderKL:
    """Scales by 8, as the real ones do."""
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    widths = {"block_out_channels": (4, 4, 4, 8), "norm_num_groups": 4, "layers_per_block": 1}
    return AutoencoderKL(**levels, **widths, latent_channels=channels, **config)


def scheduler(**config: Any) -> DDIMScheduler:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **betas, **config)


def save_sd(path: Path, **config: Any) -> Path:
    """A U-Net with dropout, so that a run can be resumed only with the state of the random number generator."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(sd15().config, dropout=0.1)
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(vae(), text_encoder(), tokenizer(), unet, scheduler(**config), **parts)
    pipeline.save_pretrained(path)
    return path


def save_sdxl(path: Path) -> Path:
    torch.manual_seed(0)
    second = text_encoder(CLIPTextModelWithProjection, width=4)
    unet = UNet2DConditionModel.from_config(sdxl().config, cross_attention_dim=WIDTH + 4)
    pipeline = StableDiffusionXLPipeline(
        vae(), text_encoder(), second, tokenizer(), tokenizer(), unet, scheduler(), add_watermarker=False
    )
    pipeline.save_pretrained(path)
    return path


def save_sd3(path: Path) -> Path:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH + 8,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
    )
    encoders = [text_encoder(CLIPTextModelWithProjection) for _ in range(2)]
    pipeline = StableDiffusion3Pipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(16, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        encoders[0],
        tokenizer(),
        encoders[1],
        tokenizer(),
        T5EncoderModel(T5Config(vocab_size=128, d_model=2 * WIDTH + 8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
        T5Tokenizer(model_max_length=LENGTH),
    )
    pipeline.save_pretrained(path)
    return path


def digit(index: int, size: tuple[int, int]) -> Image.Image:
    """A real handwritten digit, scaled up."""
    pixels = np.uint8(load_digits().images[index] * 15.9)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert("RGB")


def save_pairs(path: Path, count: int = 6) -> Path:
    """A folder of pairs: the digit that its caption names wins over another one; sizes differ."""
    for name in ("chosen", "rejected"):
        (path / name).mkdir(parents=True)
    labels = load_digits().target
    lines = []
    for i in range(count):
        digit(i, (72, 64)).save(path / "chosen" / f"{i}.png")
        digit(i + 1, (64, 80)).save(path / "rejected" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "caption": f"the digit {labels[i]}"}))
    (path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return path
