"""view: a second module tree over a model's own weights, without its adapters, wrappers and hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .checks import bad
from .watch import Link, Watch, check_base, is_sharded, layers_inside

M = TypeVar("M", bound=nn.Module)

# Instance state that redirects a call to the module it was made for: accelerate's mixed-precision and offload wrappers,
# adapters that override `forward` on the instance, `module.compile()`.
_BOUND_TO_ORIGINAL = (
    *("forward", "train", "eval"),
    *("_original_forward", "_old_forward", "_hf_hook", "_compiled_call_impl"),
)
_OF_FSDP = "__composable_api"  # what FSDP2 keeps on an instance, each name with a number of its own


def frozen_view(model: M) -> M:
    """The model without its adapters, sharing its weights: a reference model at no cost.

    A second module tree over the same parameters. PEFT's tuner layers (LoRA, DoRA, LoHa, ...) are replaced by the layer
    they wrap, wrappers (DDP, ``torch.compile``, ``PeftModel``, accelerate) and hooks are left out, and nothing of
    ``model`` is touched or toggled. Adapters may be added to ``model`` before or after. The view has none of them;
    where the reference is to have one, merge it into the weights first (``merge_and_unload``). The view is in eval
    mode, without gradient checkpointing, and has flags of its own. A weight that is trainable, as in full fine-tuning,
    is copied, so that the view stays where it is while the model trains; freeze first to share. What is shared is one
    weight: ``view.to(dtype)`` converts it in both. Being a Module, as an attribute of another the view would enter
    that one's state_dict.

    Args:
        model: any diffusers model, or a wrapper around one.

    Returns:
        A module of the unwrapped model's class, to be called like it, under ``torch.no_grad()``.

    Raises:
        ValueError: an adapter is merged into the weights, has rewritten them (PiSSA, OLoRA, ...), or cannot be left
            out: one that parametrizes a weight, or took it from its layer; a hook makes weights, or offloads them.
        RuntimeError: when called, if shared weights have changed, or become trainable, since the view's first call.

    >>> from torch import nn
    >>> layer = nn.Linear(2, 2).requires_grad_(False)
    >>> frozen_view(layer).weight is layer.weight
    True
    """
    if not isinstance(model, nn.Module):
        raise bad("model", "a torch.nn.Module", type(model).__name__, TypeError)
    view, links = twin_of(model, "model")
    modules = dict(view.named_modules())
    owned = own_trainable(modules)
    shared = {name: module for name, module in modules.items() if name not in owned}
    view.register_forward_pre_hook(Watch(modules, shared, links, "model"))
    return view  # type: ignore[return-value]


def twin_of(model: nn.Module, name: str = "unet") -> tuple[nn.Module, list[Link]]:
    """The twin of the model inside all wrappers, and where each of its layers came from; ``name`` is the argument's."""
    links: list[Link] = []
    return _twin("", {"": _unwrapped(model)}, "", name, {}, links), links


def own_trainable(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Give each module that would change, or is sharded, whole tensors of its own; return those modules.

    Weights change where they are trainable, the buffers of batch and spectral norms whenever the model runs to train.
    """
    copies: dict[int, Tensor] = {}  # tied weights stay tied

    def own(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copy = tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach().clone()  # type: ignore[attr-defined]
            copies[id(tensor)] = nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
        return copies[id(tensor)]

    owned = {}
    for name, module in modules.items():
        changes = any(p.requires_grad or is_sharded(p) for p in module._parameters.values() if p is not None)
        if changes or (module._buffers and (isinstance(module, _NormBase) or type(module).__name__ == "_SpectralNorm")):
            for home in ("_parameters", "_buffers"):
                tensors = vars(module)[home]
                vars(module)[home] = {key: None if tensor is None else own(tensor) for key, tensor in tensors.items()}
            owned[name] = module
    return owned


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, DeepSpeed's engine, torch.compile or PeftModel, in any nesting."""
    while not isinstance(model, torch.jit.ScriptModule):  # which is refused
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif list(model._modules) == ["module"]:
            model = model._modules["module"]  # type: ignore[assignment]
        elif "base_model" in model._modules:  # PeftModel's and PeftMixedModel's tuner, which holds the model
            model = model._modules["base_model"].model  # type: ignore[assignment, union-attr]
        else:
            break
    return model


def _twin(
    path: str,
    modules: Mapping[str, nn.Module | None],
    key: str,
    name: str,
    memo: dict[int, nn.Module],
    links: list[Link],
) -> nn.Module:
    """The layer at ``modules[key]`` anew, parameters and buffers shared; no adapters, hooks or instance overrides."""
    outer = modules[key]
    assert outer is not None
    layers = layers_inside(outer, path, name)
    module = layers[-1]
    if id(module) in memo:
        links.append(Link(path, modules, key, memo[id(module)], layers))
        return memo[id(module)]
    check_base(module, path, name)
    mro = type(module).__mro__
    of_fsdp = mro[1].__name__ == "FSDPModule"  # FSDP2 puts itself before the class of what it shards
    twin: nn.Module = object.__new__(mro[2] if of_fsdp else mro[0])
    memo[id(module)] = twin
    links.append(Link(path, modules, key, twin, layers))
    kept = [key for key in vars(module) if key not in _BOUND_TO_ORIGINAL and not key.startswith(_OF_FSDP)]
    state = {key: vars(module)[key] for key in kept}
    # The dictionaries of tensors are shared, not only the tensors, so that model.to(...) reaches the twin too.
    tensors = {key: state[key] for key in ("_parameters", "_buffers", "_non_persistent_buffers_set")}
    state |= vars(nn.Module()) | tensors | {"training": False}
    if "gradient_checkpointing" in state:
        state["gradient_checkpointing"] = False
        state.pop("_gradient_checkpointing_func", None)
    vars(twin).update(state)
    for key, child in module._modules.items():
        below = f"{path}.{key}".lstrip(".")
        twin._modules[key] = None if child is None else _twin(below, module._modules, key, name, memo, links)
    return twin
