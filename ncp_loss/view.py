"""view: a second module tree over a model's own weights, without its adapters, wrappers and hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from .checks import bad

M = TypeVar("M", bound=nn.Module)

_WRAPPED = ("base_layer", "original_module", "_orig_mod")  # a tuner's, a saved module's, a compiled module's own layer
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
        ValueError: an adapter is merged into the weights, so that the base model no longer exists, or cannot be left
            out: one that parametrizes a weight, or took it from its layer.

    >>> from torch import nn
    >>> layer = nn.Linear(2, 2).requires_grad_(False)
    >>> frozen_view(layer).weight is layer.weight
    True
    """
    if not isinstance(model, nn.Module):
        raise bad("model", "a torch.nn.Module", type(model).__name__, TypeError)
    view, _ = twin_of(model)
    own_trainable(dict(view.named_modules()))
    return view  # type: ignore[return-value]


class Link(NamedTuple):
    """Where the user's model holds a layer whose twin the view has."""

    path: str
    modules: dict[str, nn.Module | None]
    key: str
    twin: nn.Module
    adapted: bool


def twin_of(model: nn.Module) -> tuple[nn.Module, list[Link]]:
    """The twin of the model inside all wrappers, and where each of its layers came from."""
    links: list[Link] = []
    return _twin(_unwrapped(model), "", {}, links), links


class _Shared(NamedTuple):
    """A tensor of the user's model that the view computes with: where it lives, and its state at the first call.

    Not at construction: DDP, when it wraps a model, writes the first process's weights into those of the others.
    """

    path: str
    home: Mapping[str, Tensor | None]
    key: str
    tensor: Tensor
    version: int | None = None


class Watch:
    """Tells when the weights that a view shares are no longer the base model's, without reading a value of them."""

    def __init__(self, used: Mapping[str, nn.Module], shared: Mapping[str, nn.Module], links: list[Link]) -> None:
        self._shared = [
            _Shared(f"{name}.{key}", home, key, tensor)
            for name, module in shared.items()
            for home in (module._parameters, module._buffers)
            for key, tensor in home.items()
            if tensor is not None
        ]
        twins = {id(module) for module in used.values()}
        self._links = [link for link in links if id(link.twin) in twins]

    def check(self) -> None:
        """Raises where a shared tensor became trainable or changed, or an adapter was merged into one."""
        for i, (path, home, key, tensor, version) in enumerate(self._shared):
            now = home.get(key)
            if now is None or now.requires_grad:
                raise _moved(path, "was removed" if now is None else "became trainable")
            if _is_sharded(now):
                raise _moved(path, "was sharded over processes")
            if version is None or (now is not tensor and (now.device, now.dtype) != (tensor.device, tensor.dtype)):
                self._shared[i] = _Shared(path, home, key, now, now._version)  # model.to(...) replaces buffers
            elif now is not tensor or now._version != version:
                raise _moved(path, "was changed")
        for i, link in enumerate(self._links):
            layer = link.modules.get(link.key)
            adapted = layer is not None and _base_layer(layer, link.path) is not layer  # raises where one is merged
            if link.adapted and not adapted:
                raise _moved(link.path, "lost its adapter, which may have been merged into it")
            if adapted and not link.adapted:
                self._links[i] = link._replace(adapted=True)

    def __getstate__(self) -> list[_Shared]:
        return self._shared  # a copy watches the weights it holds; adapters, and what holds them, are not copied for it

    def __setstate__(self, state: list[_Shared]) -> None:
        self._links = []
        self._shared = [shared._replace(version=None) for shared in state]


def own_trainable(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Give each module with a trainable or a sharded weight whole tensors of its own; return those modules."""
    copies: dict[int, Tensor] = {}  # tied weights stay tied

    def own(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copy = tensor.detach().full_tensor() if _is_sharded(tensor) else tensor.detach().clone()  # type: ignore[attr-defined]
            copies[id(tensor)] = nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
        return copies[id(tensor)]

    owned = {}
    for name, module in modules.items():
        if any(p.requires_grad or _is_sharded(p) for p in module._parameters.values() if p is not None):
            for home in ("_parameters", "_buffers"):
                tensors = vars(module)[home]
                vars(module)[home] = {key: None if tensor is None else own(tensor) for key, tensor in tensors.items()}
            owned[name] = module
    return owned


def _is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2's parameters are between two passes of its own."""
    return hasattr(tensor, "full_tensor")


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, DeepSpeed's engine, torch.compile or PeftModel, in any nesting."""
    while True:
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif list(model._modules) == ["module"]:
            model = model._modules["module"]  # type: ignore[assignment]
        elif "base_model" in model._modules:  # PeftModel's and PeftMixedModel's tuner, which holds the model
            model = model._modules["base_model"].model  # type: ignore[assignment, union-attr]
        else:
            return model


def _base_layer(module: nn.Module, path: str) -> nn.Module:
    """The layer inside PEFT's tuner layers; one that has been merged into is no longer the base model's."""
    while True:
        if getattr(module, "merged", False) is True:
            raise ValueError(
                f"unet must have no merged adapter: one is merged into {path!r}, so the base weights are not there; "
                "unmerge it first (unmerge_adapter(), unfuse_lora())"
            )
        inner = next((module._modules[name] for name in _WRAPPED if name in module._modules), None)
        if inner is None:
            return module
        module = inner


def _twin(module: nn.Module, path: str, memo: dict[int, nn.Module], links: list[Link]) -> nn.Module:
    """The containers anew, parameters and buffers shared; no adapters, hooks or instance overrides."""
    module = _base_layer(module, path)
    if id(module) in memo:
        return memo[id(module)]
    _check_base(module, path)
    mro = type(module).__mro__
    of_fsdp = mro[1].__name__ == "FSDPModule"  # FSDP2 puts itself before the class of what it shards
    twin: nn.Module = object.__new__(mro[2] if of_fsdp else mro[0])
    memo[id(module)] = twin
    kept = [name for name in vars(module) if name not in _BOUND_TO_ORIGINAL and not name.startswith(_OF_FSDP)]
    state = {name: vars(module)[name] for name in kept}
    # The dictionaries of tensors are shared, not only the tensors, so that model.to(...) reaches the twin too.
    tensors = {name: state[name] for name in ("_parameters", "_buffers", "_non_persistent_buffers_set")}
    state |= vars(nn.Module()) | tensors | {"training": False}
    if "gradient_checkpointing" in state:
        state["gradient_checkpointing"] = False
        state.pop("_gradient_checkpointing_func", None)
    vars(twin).update(state)
    for name, child in module._modules.items():
        below = f"{path}.{name}".lstrip(".")
        twin._modules[name] = None
        if child is not None:
            twin._modules[name] = made = _twin(child, below, memo, links)
            links.append(Link(below, module._modules, name, made, _base_layer(child, below) is not child))
    return twin


def _check_base(module: nn.Module, path: str) -> None:
    """A layer is the base model's without what is left out of a view, or cannot be seen through."""
    weight, wrong = getattr(module, "weight", None), ""
    if "forward" in vars(module):  # an override, and left out
        if weight is None and isinstance(module, nn.Linear | _ConvNd):
            wrong = "has no weight of its own beside its overridden `forward`"
        elif isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize == 1:
            wrong = f"has a weight in {weight.dtype}, for which its `forward` is overridden"
    for chain in module.parametrizations.values() if is_parametrized(module) else ():  # type: ignore[operator]
        originals, trainable = set(chain.parameters(recurse=False)), {p for p in chain.parameters() if p.requires_grad}
        if trainable and not trainable & originals:
            wrong = "is parametrized by an adapter"
    if wrong:
        must_be = "the base model once adapters and overridden `forward`s are left out"
        hint = "PEFT's adapters can be, and weights quantised by torchao or bitsandbytes need no override"
        raise bad("unet", must_be, f"not: {path!r} {wrong} ({hint})")


def _moved(path: str, what: str) -> RuntimeError:
    return RuntimeError(
        f"unet's base weights must stay as they were when the loss was built, which shares them: {path} {what}. "
        "Build the loss again; where weights are trainable or sharded by then, it keeps a copy of the part it needs"
    )
