"""base: finds the base model's layers inside wrappers and adapters, and refuses what is not the base model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from .checks import bad

# Under these names PEFT's tuners, PEFT's modules to save, torch.compile and torch's CheckpointWrapper keep the layer
# that they wrap. Other libraries' modules may have children of such names, which are no wrapped layers.
_WRAPPED = {
    "base_layer": "peft",
    "original_module": "peft",
    "_orig_mod": "torch",
    "_checkpoint_wrapped_module": "torch",
}
# PEFT's initialisations that write to the adapter only, and not to the base weights.
_KEEP_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")
# diffusers' hooks that convert or move weights.
_MOVERS = ("layerwise_casting", "group_offloading", "lazy_prefetch_group_offloading")
# A module of these packages with one child, called "module", is a wrapper.
_WRAPPERS = (
    *("torch", "deepspeed", "accelerate", "lightning", "pytorch_lightning", "fairscale", "colossalai", "apex"),
    *("megatron", "torch_xla", "timm", "mmengine", "composer", "bagua"),
)


class Link(NamedTuple):
    """A place in the user's model, what stands there, and the view's twin of it."""

    path: str
    modules: Mapping[str, nn.Module | None]  # the parent's children, among which the layer stands at `key`
    key: str
    twin: nn.Module
    layers: tuple[nn.Module, ...]  # the outermost wrapper first, the base model's layer last
    base: nn.Module  # the base model's layer when the view was made
    processor: Any  # its attention processor, if that is no module
    forward: Any = None  # an override of `forward` on the base layer's instance, as of LyCORIS and kohya's LoRA


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, DeepSpeed's engine, torch.compile or PeftModel, in any nesting."""
    while not isinstance(model, torch.jit.ScriptModule):  # layers_inside refuses it
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif list(model._modules) == ["module"] and written_by(model, *_WRAPPERS):
            model = model._modules["module"]  # type: ignore[assignment]
        elif "base_model" in model._modules and written_by(model, "peft"):  # the tuner, which holds the model
            model = model._modules["base_model"].model  # type: ignore[assignment, union-attr]
        else:
            break
    return model


def layers_inside(module: nn.Module, path: str, name: str) -> tuple[nn.Module, ...]:
    """The layer, and each layer that it wraps, outermost first. The last is the base model's.

    Raises:
        ValueError: an adapter is merged into the base weights, or its initialisation has rewritten them.
    """
    layers = [module]
    while True:
        if isinstance(module, torch.jit.ScriptModule):
            raise _not_the_base(f"{path!r} is a ScriptModule, whose code cannot be seen through", name)
        own = vars(module)
        if ("merged" in own or hasattr(type(module), "merged")) and getattr(module, "merged") is True:  # noqa: B009
            raise merged_into(path, name)
        if "peft_config" in own:
            _check_initialisation(own["peft_config"], name)
        found = [key for key, by in _WRAPPED.items() if key in module._modules and written_by(module, by)]
        inner = module._modules[found[0]] if found else None
        if inner is None:
            return tuple(layers)
        module = inner
        layers.append(module)


def written_by(module: nn.Module, *packages: str) -> bool:
    """Whether the module's class, or one that it inherits from, is one of these packages' and no plain torch layer."""
    names = (cls.__module__ for cls in type(module).__mro__)
    return any(name.split(".")[0] in packages and not name.startswith("torch.nn.modules.") for name in names)


def _check_initialisation(configs: Mapping[str, Any], name: str) -> None:
    """Refuse LoRA that starts from a part of the base weights (PiSSA, OLoRA, ...) and subtracts it from them."""
    for adapter, config in configs.items():
        by = getattr(config, "init_lora_weights", None)
        by = "KaSA" if getattr(config, "kasa_config", None) else by
        if isinstance(by, str) and by.lower() not in _KEEP_THE_BASE:
            hint = "initialise with True or 'gaussian', or hand over a copy.deepcopy of the model without it"
            raise _not_the_base(f"adapter {adapter!r}, initialised by {by!r}, has rewritten weights: {hint}", name)


def check_base(module: nn.Module, path: str, name: str) -> None:
    """Refuse a layer that is not the base model's once adapters, hooks and overrides are left out."""
    # Several things may be wrong. The message names the last one found.
    own, weight, wrong = vars(module), module._parameters.get("weight"), ""
    if "_fsdp_wrapped_module" in module._modules:
        wrong = "is flattened by FSDP1: shard with fully_shard (FSDP2), or hand over a copy.deepcopy made before"
    if "forward" in own:  # an override, which a view leaves out
        if weight is None and isinstance(module, nn.Linear | _ConvNd) and not is_parametrized(module):
            wrong = "has no weight of its own beside its overridden `forward`"
        elif weight is not None and weight.is_floating_point() and weight.itemsize == 1:
            wrong = f"has a weight in {weight.dtype}, for which its `forward` is overridden"
    for chain in module.parametrizations.values() if is_parametrized(module) else ():  # type: ignore[operator]
        originals, trainable = set(chain.parameters(recurse=False)), {p for p in chain.parameters() if p.requires_grad}
        if trainable and not trainable & originals:
            wrong = "is parametrized by an adapter"
    for key in [key for key, value in own.items() if isinstance(value, Tensor)]:
        if key in ("weight", "bias") or {f"{key}_{end}" for end in ("orig", "g", "v")} & module._parameters.keys():
            wrong = f"has a {key} made by a hook (old weight_norm, spectral_norm, prune), and hooks are left out"
    if any(isinstance(p, UninitializedParameter) for p in module._parameters.values()):
        wrong = "has weights that its first call will make (a lazy layer): call the model once before"
    elif any(isinstance(p, Tensor) and p.numel() == 0 for p in module._parameters.values()):
        wrong = "has an empty weight, which lives elsewhere until the model itself runs"
    hooks = (own.get("_hf_hook"), *getattr(own.get("_hf_hook"), "hooks", ()))
    if any(getattr(hook, "offload", False) is True for hook in hooks):
        wrong = "is offloaded by accelerate"
    if moved := [mover for mover in _MOVERS if mover in getattr(own.get("_diffusers_hook"), "hooks", ())]:
        wrong = f"has weights in the hands of diffusers' {moved[0]}"
    if getattr(module, "blocks_to_swap", None):  # kohya's, which counts passes, and would count the view's too
        wrong = "swaps blocks between devices (blocks_to_swap)"
    if any(hasattr(p, "ds_id") for p in module._parameters.values()):
        wrong = "is partitioned by DeepSpeed's ZeRO-3: take ZeRO-2, or hand over a copy.deepcopy made before initialize"
    if wrong:
        raise _not_the_base(f"{path!r} {wrong}", name)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process holds only a part of the tensor, under FSDP2 (a DTensor), ZeRO-3 or FSDP1."""
    return any(hasattr(tensor, mark) for mark in ("full_tensor", "ds_id", "_fsdp_flattened"))


def _not_the_base(what: str, name: str) -> Exception:
    must_be = "the base model once adapters, hooks and overridden `forward`s are left out"
    hint = "PEFT's adapters can be, and weights quantised by torchao or bitsandbytes need no override"
    return bad(name, must_be, f"not: {what} ({hint})")


def merged_into(path: str, name: str) -> ValueError:
    return ValueError(
        f"{name} must have no merged adapter: one is merged into {path!r}, so the base weights are not there; "
        "unmerge it first (unmerge_adapter(), unfuse_lora())"
    )
