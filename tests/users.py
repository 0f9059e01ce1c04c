"""A small model in the hands of its users: adapters they add, what they train, what its blocks really return."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import models
import torch
from models import sd15
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

from ncp_loss import NoiseConditionedPerceptualLoss as NCP

AT = ("noisy_latents", "timesteps", "encoder_hidden_states")
RANKS = {"r": 2, "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]}
Build = Callable[[nn.Module], nn.Module]


def small(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """Two levels of `sd15`: where the layout makes no difference."""
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    config = {"block_out_channels": (8, 16), "norm_num_groups": 4, "down_block_types": down, "up_block_types": up}
    return sd15(seed, dtype, sample_size=8, **config)


def batch(unet: nn.Module, **options: Any) -> dict[str, Any]:
    return models.batch(unet, **{"height": unet.config.sample_size, "width": unet.config.sample_size} | options)


def same(unet: nn.Module) -> nn.Module:
    return unet


def add_lora(unet: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(**RANKS, init_lora_weights=False))
    return unet


def peft_lora(unet: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(unet, LoraConfig(**RANKS, init_lora_weights=False, **options))


def lora_and_biases(unet: nn.Module) -> nn.Module:
    return peft_lora(unet, bias="all")


def dora(unet: nn.Module) -> nn.Module:
    return peft_lora(unet, use_dora=True)


def loha(unet: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(unet, LoHaConfig(**RANKS, init_weights=False))


def full(unet: nn.Module) -> nn.Module:
    return unet.requires_grad_(True)


def attention_only(unet: nn.Module) -> nn.Module:
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("attn" in name)
    return unet


def features(ncp: NCP, arguments: dict[str, Any]) -> Tensor:
    (only,) = ncp.features(*[arguments[name] for name in AT]).values()
    return only


def block_output(unet: nn.Module, path: str, arguments: dict[str, Any], **model_kwargs: Any) -> Tensor:
    """What a block of a model really returns, by a hook on a deep copy that nobody else has touched."""
    caught = []
    pristine = copy.deepcopy(unet).requires_grad_(False).eval()
    block = pristine.get_submodule(path)
    block.register_forward_hook(lambda _, args, out: caught.append((out[0] if isinstance(out, tuple) else out).clone()))
    pristine(*[arguments[name] for name in AT], **copy.deepcopy(model_kwargs))
    return caught[0]
