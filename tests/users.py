"""A small model in the hands of its users: adapters they add, what they train, what its blocks really return."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

from ncp_loss import NoiseConditionedPerceptualLoss as NCP

AT = ("noisy_latents", "timesteps", "encoder_hidden_states")
RANKS = {"r": 2, "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]}
Build = Callable[[nn.Module], nn.Module]


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


def storages(*modules: nn.Module) -> dict[int, int]:
    """Bytes by address of every parameter and buffer."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


class Seen:
    """All of a model that its owner could notice: each module's attributes, each tensor's state and values."""

    def __init__(self, model: nn.Module) -> None:
        self.alive: list[Any] = []  # so that no id is given out twice
        self.attributes = {
            (name, key): self._identity(value)
            for name, module in model.named_modules()
            for key, value in vars(module).items()
        }
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self.tensors = {
            name: (id(t), t._version, t.requires_grad, t.dtype, t.device, t.data_ptr(), t.grad is None, t.stride())
            for name, t in tensors.items()
        }
        self.values = {name: t.detach().clone() for name, t in tensors.items()}
        self.generator = torch.get_rng_state()

    def _identity(self, value: Any) -> Any:
        self.alive.append(value)
        if isinstance(value, dict):
            return id(value), [(key, id(item)) for key, item in value.items()]
        return (id(value), list(map(id, value))) if isinstance(value, list | tuple | set) else id(value)

    def assert_same(self, model: nn.Module) -> None:
        now = Seen(model)
        assert now.attributes == self.attributes
        assert now.tensors == self.tensors
        assert all(torch.equal(value, self.values[name]) for name, value in now.values.items())
        assert torch.equal(now.generator, self.generator)
