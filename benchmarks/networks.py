"""What benchmarks measure on: random networks laid out like Stable Diffusion's, and a trained one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from examples.digits import CLASSES, condition, load_unet, new_scheduler, real_digits

TEXT, POOLED, IDS = 32, 16, 6  # widths of the text states and the pooled text; SDXL's sizes and crops


class Batch(NamedTuple):
    """Arguments of ``ncp.errors``, float32 where they are floats, and what distinguishes the rows."""

    arguments: dict[str, Any]
    timesteps: list[int]
    rms: list[float]  # of the prediction's error; for a trained network, of its own


class Network(NamedTuple):
    label: str
    make: Callable[[int, bool], UNet2DConditionModel]  # (seed, tiny)
    batch: Callable[[UNet2DConditionModel, list[int], list[float], int], Batch]  # (unet, timesteps, rms, seed)


def sd15(seed: int = 0, tiny: bool = False, **overrides: Any) -> UNet2DConditionModel:
    """SD 1.5's layout, random weights: four levels, attention in all but the last."""
    config = {
        "sample_size": 16,
        "block_out_channels": (8, 8, 16, 16) if tiny else (32, 64, 128, 128),
        "layers_per_block": 1 if tiny else 2,
        "norm_num_groups": 8,
        "cross_attention_dim": TEXT,
        "attention_head_dim": 4,
    }
    return _random(seed, config | overrides)


def sdxl(seed: int = 0, tiny: bool = False, **overrides: Any) -> UNet2DConditionModel:
    """SDXL's layout, random weights: three levels, deep transformers below, pooled text and sizes."""
    config = {
        "sample_size": 16,
        "block_out_channels": (8, 8, 16) if tiny else (32, 64, 128),
        "layers_per_block": 1 if tiny else 2,
        "norm_num_groups": 8,
        "cross_attention_dim": TEXT,
        "attention_head_dim": (2, 4, 8),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2) if tiny else (1, 2, 6),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": POOLED + IDS * 8,
    }
    return _random(seed, config | overrides)


def digits(seed: int = 0, tiny: bool = False) -> UNet2DConditionModel:
    """The trained digits model of the examples; there is one."""
    return representable(load_unet())


@torch.no_grad()
def representable(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The network with its weights rounded to what bf16 and fp16 both hold: the same function in every precision."""
    for weight in unet.parameters():
        weight.copy_(rounded(weight))
    return unet.requires_grad_(False).eval()


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().half().to(x.dtype)


def random_batch(unet: UNet2DConditionModel, timesteps: list[int], rms: list[float], seed: int) -> Batch:
    """A row for each timestep and error size: normal latents, truth, errors and conditioning."""
    rows = [(t, size) for size in rms for t in timesteps]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(len(rows), *shape, generator=generator)

    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    target, sizes = normal(*shape), torch.tensor([size for _, size in rows]).reshape(-1, 1, 1, 1)
    arguments: dict[str, Any] = {
        "model_pred": target + sizes * normal(*shape),
        "ref_pred": target + sizes * normal(*shape),
        "target": target,
        "noisy_latents": normal(*shape),
        "timesteps": torch.tensor([t for t, _ in rows]),
        "encoder_hidden_states": rounded(normal(5, TEXT)),
        "variance_noise": normal(*shape),
    }
    if unet.config.addition_embed_type == "text_time":
        ids = torch.tensor([1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]).expand(len(rows), IDS)
        arguments["added_cond_kwargs"] = {"text_embeds": rounded(normal(POOLED)), "time_ids": ids}
    return Batch(arguments, [t for t, _ in rows], [size for _, size in rows])


@torch.no_grad()
def digits_batch(unet: UNet2DConditionModel, timesteps: list[int], rms: list[float], seed: int) -> Batch:
    """Noised real digits and what the network itself predicts: thrice the rows of a random network's batch."""
    (images, labels), _ = real_digits()
    generator = torch.Generator().manual_seed(seed)
    t = torch.tensor(timesteps).repeat(3 * len(rms))
    rows = torch.randint(len(images), t.shape, generator=generator)
    noise, z = (torch.randn(images[rows].shape, generator=generator) for _ in range(2))
    noisy, text = new_scheduler().add_noise(images[rows], noise, t), condition(labels[rows])
    prediction = unet(noisy, t, text).sample
    error = (prediction - noise).square().mean((1, 2, 3)).sqrt()
    arguments = {
        "model_pred": prediction,
        # For a reference, what the network predicts for another digit.
        "ref_pred": unet(noisy, t, condition((labels[rows] + 1) % CLASSES)).sample,
        "target": noise,
        "noisy_latents": noisy,
        "timesteps": t,
        "encoder_hidden_states": text,
        "variance_noise": z,
    }
    return Batch(arguments, t.tolist(), error.tolist())


NETWORKS = {
    "sd15": Network("SD 1.5 layout, random", sd15, random_batch),
    "sdxl": Network("SDXL layout, random", sdxl, random_batch),
    "digits": Network("digits, trained", digits, digits_batch),
}


def converted(arguments: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Arguments moved to ``device``, floats among them converted."""
    if isinstance(arguments, dict):
        return {key: converted(value, device, dtype) for key, value in arguments.items()}
    return arguments.to(device, dtype if arguments.is_floating_point() else None)


def _random(seed: int, config: dict[str, Any]) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return representable(UNet2DConditionModel(**config))
