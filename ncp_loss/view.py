"""view: a second module tree over a model's own weights, without its adapters, wrappers and hooks."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .base import Link, check_base, is_sharded, layers_inside, unwrapped
from .checks import bad
from .watch import Watch

M = TypeVar("M", bound=nn.Module)

# Attributes of an instance that redirect calls to the module for which they were made. accelerate's mixed-precision and
# offload wrappers, adapters that override `forward` on the instance and `module.compile()` put them there.
_BOUND_TO_ORIGINAL = (
    *("forward", "train", "eval"),
    *("_original_forward", "_old_forward", "_hf_hook", "_compiled_call_impl"),
)
_OF_FSDP = "__composable_api"  # how the names of FSDP2's attributes begin


def frozen_view(model: M) -> M:
    """The model without its adapters, sharing its weights: a reference model that takes no memory of its own.

    The view is a second tree of modules over the same parameters. Each of PEFT's tuner layers (LoRA, DoRA, LoHa, ...)
    is replaced by the layer that it wraps. Wrappers (DDP, ``torch.compile``, ``PeftModel``, accelerate) and hooks are
    left out. ``model`` itself is not changed. Adapters may be added to ``model`` before or after, and the view has none
    of them. If the reference is to have an adapter, merge it into the weights first (``merge_and_unload``).

    The view is in eval mode and without gradient checkpointing, and its flags are its own. A weight that is trainable,
    as in full fine-tuning, is copied, so that it stays the same while the model trains. Freeze it first to share it.
    ``view.to(dtype)`` converts shared weights in the model too. The view is a Module: if you make it an attribute of
    another Module, its weights appear in that one's state_dict.

    Args:
        model: any diffusers model, or a wrapper around one.

    Returns:
        A module of the unwrapped model's class. Call it like the model, under ``torch.no_grad()``.

    Raises:
        ValueError: an adapter is merged into the weights, has rewritten them (PiSSA, OLoRA, ...), or cannot be left
            out, since it parametrizes a weight or took it from its layer; or a hook makes or offloads weights.
        RuntimeError: when the view is called, if shared weights have changed or become trainable since its first call.

    >>> from torch import nn
    >>> layer = nn.Linear(2, 2).requires_grad_(False)
    >>> frozen_view(layer).weight is layer.weight
    True
    """
    if not isinstance(model, nn.Module):
        raise bad("model", "a torch.nn.Module", type(model).__name__, TypeError)
    view, links = twin_of(model, "model")
    modules = dict(view.named_modules())
    _, shared = own_trainable(modules)
    view.register_forward_pre_hook(Watch(modules, shared, links, "model"))
    return view  # type: ignore[return-value]


def twin_of(model: nn.Module, name: str = "unet") -> tuple[nn.Module, list[Link]]:
    """The twin of the model inside all wrappers, and for each of its layers the place from which it came.

    ``name`` is what messages call the model.
    """
    links: list[Link] = []
    memo: dict[int, nn.Module] = {}
    view = _twin("", {"": unwrapped(model)}, "", name, memo, links)
    _redirect(list(dict.fromkeys(memo.values())), memo)
    return view, links


def _redirect(modules: Collection[nn.Module], replaced: Mapping[int, Any]) -> None:
    """Let attributes of the modules that lead to what has been replaced lead to what stands in its place.

    These are lists and dictionaries of layers or weights, and methods and partials of layers that are kept. They would
    otherwise lead out of the view. ``replaced`` has layers or weights by the originals' ids.
    """
    own, memo = vars(nn.Module()).keys(), dict[int, Any]()  # what copy.deepcopy takes as copied already
    for module in modules:
        memo |= {id(x): x for x in (module, *module._parameters.values(), *module._buffers.values())}
    memo |= replaced
    for module in modules:
        for key, value in vars(module).items():
            if key not in own and _leads_to(value, replaced, set()):
                vars(module)[key] = copy.deepcopy(value, memo)


def _leads_to(value: Any, replaced: Mapping[int, Any], seen: set[int]) -> bool:
    """Whether an attribute, which may contain itself, holds something that has been replaced."""
    if isinstance(value, nn.Module | Tensor):
        return id(value) in replaced
    if isinstance(value, MethodType):
        inside: Iterable[Any] = (value.__self__,)
    elif isinstance(value, partial):
        inside = (value.func, *value.args, *value.keywords.values())
    else:
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    if id(value) in seen:
        return False
    seen.add(id(value))
    return any(_leads_to(item, replaced, seen) for item in inside if not isinstance(item, int | float | str))


def own_trainable(modules: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Give each module whose tensors would change, or are sharded, whole tensors of its own.

    Returns these modules, and the others, which share the user's tensors.

    Trainable weights change, and so do the buffers of batch and spectral norms when the model runs in train mode.
    """
    copies: dict[int, Tensor] = {}  # by the original's id, so that tied weights stay tied

    def own(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            whole = tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach().clone()  # type: ignore[attr-defined]
            copies[id(tensor)] = nn.Parameter(whole, requires_grad=False) if isinstance(tensor, nn.Parameter) else whole
        return copies[id(tensor)]

    owned = {}
    for name, module in modules.items():
        # torch's spectral norm is a parametrization, _SpectralNorm, which torch does not export.
        changes = any(p.requires_grad or is_sharded(p) for p in module._parameters.values() if p is not None)
        if changes or (module._buffers and (isinstance(module, _NormBase) or type(module).__name__ == "_SpectralNorm")):
            for home in ("_parameters", "_buffers"):
                tensors = vars(module)[home]
                vars(module)[home] = {key: None if tensor is None else own(tensor) for key, tensor in tensors.items()}
            owned[name] = module
    if copies:
        _redirect(modules.values(), copies)
    return owned, {name: module for name, module in modules.items() if name not in owned}


def _twin(
    path: str,
    modules: Mapping[str, nn.Module | None],
    key: str,
    name: str,
    memo: dict[int, nn.Module],
    links: list[Link],
) -> nn.Module:
    """A new module for the layer at ``modules[key]``, and for all below it, with the same parameters and buffers.

    Adapters, hooks and what overrides methods on the instance are left out. ``memo`` has the twins made so far, by the
    original's id, so that a layer which stands in two places has one twin.
    """
    outer = modules[key]
    assert outer is not None
    layers = layers_inside(outer, path, name)
    module = layers[-1]
    if id(module) in memo:
        links.append(Link(path, modules, key, memo[id(module)], layers, module, vars(module).get("processor")))
        return memo[id(module)]
    check_base(module, path, name)
    mro = type(module).__mro__
    of_fsdp = mro[1].__name__ == "FSDPModule"  # FSDP2 makes a class of its own of FSDPModule and the module's class
    twin: nn.Module = object.__new__(mro[2] if of_fsdp else mro[0])
    memo |= {id(layer): twin for layer in layers}
    links.append(Link(path, modules, key, twin, layers, module, vars(module).get("processor")))
    kept = [key for key in vars(module) if key not in _BOUND_TO_ORIGINAL and not key.startswith(_OF_FSDP)]
    state = {key: vars(module)[key] for key in kept}
    # The twin shares the dictionaries of tensors, not only the tensors. So what model.to(...) puts there, it has too.
    tensors = {key: state[key] for key in ("_parameters", "_buffers", "_non_persistent_buffers_set")}
    # vars(nn.Module()) has new, empty dictionaries for hooks and children.
    state |= vars(nn.Module()) | tensors | {"training": False}
    if "gradient_checkpointing" in state:
        state["gradient_checkpointing"] = False
        state.pop("_gradient_checkpointing_func", None)
    vars(twin).update(state)
    for inner, child in module._modules.items():
        below = f"{path}.{inner}".lstrip(".")
        twin._modules[inner] = None if child is None else _twin(below, module._modules, inner, name, memo, links)
    return twin
