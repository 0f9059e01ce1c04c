"""encoder: a frozen view of the user's own model, stopped at the layers asked for: (latents, timesteps, text) -> features."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from .checks import bad, check_batch

Layers = str | Sequence[str] | Mapping[str, float]
M = TypeVar("M", bound=nn.Module)

# What runs one after another in a model's forward, whatever order it was registered in. Used only to tell which weights
# lie past a layer and need no copy: a name that is missing here costs memory, never correctness.
_ORDER = ("resnets", "attentions", "downsamplers", "upsamplers")
_ORDER += ("down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out")
_ORDER += ("transformer_blocks", "single_transformer_blocks", "norm_out", "proj_out")

# Instance state that redirects a call to the module it was made for: accelerate's mixed-precision and offload wrappers,
# adapters that override `forward` on the instance, `module.compile()`.
_BOUND_TO_ORIGINAL = ("forward", "_original_forward", "_old_forward", "_hf_hook", "_compiled_call_impl")


def frozen_view(model: M) -> M:
    """The model without its adapters, sharing its weights: a reference model at no cost.

    A second module tree over the same parameters. PEFT's tuner layers (LoRA, DoRA, LoHa, ...) are replaced by the layer
    they wrap, wrappers (DDP, ``torch.compile``, ``PeftModel``, accelerate) and hooks are left out, and nothing of
    ``model`` is touched or toggled. Adapters may be added to ``model`` before or after. The view is in eval mode,
    without gradient checkpointing, and has flags of its own. A weight that is trainable, as in full fine-tuning, is
    copied, so that the view stays where it is while the model trains; freeze first to share.

    Args:
        model: any diffusers model, or a wrapper around one.

    Returns:
        A module of the unwrapped model's class, to be called like it, under ``torch.no_grad()``.

    Raises:
        ValueError: an adapter is merged into the weights, so that the base model no longer exists.

    >>> layer = torch.nn.Linear(2, 2).requires_grad_(False)
    >>> frozen_view(layer).weight is layer.weight
    True
    """
    view = _twin(_unwrapped(model), {})
    _own_trainable(view, {name for name, _ in view.named_modules()})
    return view  # type: ignore[return-value]


class LastLayerReached(Exception):  # noqa: N818  # not an error: it ends a forward pass whose work is done
    """Raised inside the view's forward, and caught around it, when the last wanted layer has run."""


class _Tap:
    """A forward hook that keeps a layer's output, and ends the pass when every layer's is there."""

    def __init__(self, layer: str, kept: dict[str, Tensor], wanted: int) -> None:
        self.layer, self.kept, self.wanted = layer, kept, wanted

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        # A U-Net block returns its hidden states first, then what it keeps for skip connections.
        self.kept[self.layer] = output[0] if isinstance(output, tuple) else output
        # An exporter keeps a stack of the modules it is in, which an exception would leave unbalanced: run on there,
        # and let its dead-code elimination remove the rest.
        if len(self.kept) == self.wanted and not torch.compiler.is_exporting():
            raise LastLayerReached


class _Shared(NamedTuple):
    """A tensor of the user's model that the encoder computes with: where it lives, and its state when the loss was built."""

    path: str
    home: dict[str, Tensor | None]
    key: str
    tensor: Tensor
    version: int


class FrozenEncoder:
    """Features of the bare base model at ``layers``, for (latents, timesteps, text); nothing past the last of them runs.

    Not a Module, on purpose: the weights are the user's, and belong in no state_dict but theirs.

    Args:
        model: the user's model, in whatever wrapper.
        layers: module paths as in ``model.get_submodule``; a negative index counts from the end, and a list of blocks
            stands for its last one. A mapping gives each layer's weight in the error, 1 otherwise.
        checkpoint: recompute each block's activations in backward.
    """

    def __init__(self, model: nn.Module, layers: Layers, *, checkpoint: bool = False) -> None:
        links: list[_Link] = []
        self.view = _twin(_unwrapped(model), {}, links)
        names = (layers,) if isinstance(layers, str) else layers
        self.weights = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
        if not self.weights or any(not weight > 0 for weight in self.weights.values()):
            raise bad("layer", "one module path or more, with positive weights", repr(layers))
        self.paths = {layer: _resolve(self.view, layer) for layer in self.weights}
        if len(set(self.paths.values())) < len(self.paths):
            raise bad("layer", "different modules", repr(self.paths))

        ends = self.paths.values()
        used = {name for name, _ in self.view.named_modules() if not all(_runs_after(name, end) for end in ends)}
        self._owned = _own_trainable(self.view, used)
        self._shared = _shared_tensors(self.view, used, self._owned)
        twins = {id(module) for name, module in self.view.named_modules() if name in used}
        self._links = [link for link in links if id(link.twin) in twins]

        self._kept: dict[str, Tensor] = {}
        for layer, path in self.paths.items():
            self.view.get_submodule(path).register_forward_hook(_Tap(layer, self._kept, len(self.paths)))
        if checkpoint:
            blocks = [module for module in self.view.modules() if hasattr(module, "gradient_checkpointing")]
            if not blocks:
                raise bad("checkpoint", f"False: {type(self.view).__name__} has no gradient checkpointing", "True")
            for block in blocks:
                block.gradient_checkpointing, block._gradient_checkpointing_func = True, _recompute  # type: ignore[assignment]
        self._takes_text = "encoder_hidden_states" in inspect.signature(type(self.view).forward).parameters

    def __call__(
        self, latents: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor | None = None, **model_kwargs: Any
    ) -> dict[str, Tensor]:
        """{layer: features}. Where latents are k batches stacked, the conditioning of one batch serves them all.

        Only here are latents cast to the dtype that the model computes in.
        """
        if not torch.compiler.is_compiling():
            self._check_unmoved(latents)
        if self._takes_text:
            model_kwargs["encoder_hidden_states"] = encoder_hidden_states
        batch, copies = len(timesteps), len(latents) // len(timesteps)
        dtype = None if torch.is_autocast_enabled(latents.device.type) else self.dtype
        conditioning = {k: _prepared(v, batch, copies, dtype, k) for k, v in model_kwargs.items()}
        self._kept.clear()
        try:
            self.view(_prepared(latents, 0, 1, dtype), timestep=timesteps.repeat(copies), **conditioning)
        except LastLayerReached:
            pass
        missing = self.weights.keys() - self._kept.keys()
        if missing:
            raise RuntimeError(f"the model's forward never called {sorted(missing)}; choose a layer that it calls")
        features = {layer: self._kept[layer] for layer in self.weights}
        self._kept.clear()
        return features

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights: what the model computes in without autocast."""
        return next(p.dtype for p in self.view.parameters() if p.is_floating_point())

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """What the model computes in now, autocast included."""
        return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.dtype

    @property
    def input_shape(self) -> tuple[int | None, ...] | None:
        """What the first convolution says of the latents: (B, C, H, W) with None for any size; None if there is none."""
        conv = getattr(self.view, "conv_in", None)
        if not isinstance(conv, nn.Conv2d):
            return None
        return (None, conv.in_channels, None, None)

    def check_conditioning(self, batch: int, encoder_hidden_states: Tensor | None, model_kwargs: Mapping[str, Any]) -> None:
        """What the model would stumble over deep inside, said at the door."""
        if encoder_hidden_states is not None:
            check_batch("encoder_hidden_states", encoder_hidden_states, batch)
        elif any(getattr(module, "has_cross_attention", False) for module in self.view.modules()):
            raise bad("encoder_hidden_states", "given: the model attends to text", "None")
        config = getattr(self.view, "config", None)
        if getattr(config, "addition_embed_type", None) == "text_time":
            added = model_kwargs.get("added_cond_kwargs") or {}
            for key in ("text_embeds", "time_ids"):
                if key not in added:
                    raise bad("added_cond_kwargs", "a dict with text_embeds and time_ids, as SDXL takes them", sorted(added))
                check_batch(f"added_cond_kwargs[{key!r}]", added[key], batch)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """What ``ncp.to(...)`` does: convert the encoder's own copies; what is the user's, the user moves."""
        for module in self._owned:
            nn.Module._apply(module, fn, recurse=False)

    def _check_unmoved(self, latents: Tensor) -> None:
        """Shared weights are the base model only while nobody changes them: say so, rather than drift."""
        for i, (path, home, key, tensor, version) in enumerate(self._shared):
            now = home.get(key)
            if now is None or now.requires_grad:
                raise _moved(path, "became trainable" if now is not None else "was removed")
            if now is not tensor and (now.device, now.dtype) != (tensor.device, tensor.dtype):
                self._shared[i] = _Shared(path, home, key, now, now._version)  # model.to(...) replaces buffers
            elif now is not tensor or now._version != version:
                raise _moved(path, "was changed")
        for modules, key, layer, _ in self._links:
            if modules.get(key) is not layer:
                _base_layer(modules[key], key)  # raises where an adapter is merged
        where = next(self.view.parameters()).device
        if where != latents.device:
            hint = "; move its copy with ncp.to(device)" if self._owned else ""
            raise bad("noisy_latents", f"on the encoder's device, {where}{hint}", f"on {latents.device}")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_links": []}  # a copy holds its own weights, not the user's adapters

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._shared = [shared._replace(version=shared.tensor._version) for shared in self._shared]


class _Link(NamedTuple):
    """Where the user's model holds a layer that the encoder sees through to."""

    modules: dict[str, nn.Module | None]
    key: str
    layer: nn.Module
    twin: nn.Module


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, DeepSpeed's engine, torch.compile or PeftModel, in any nesting."""
    while True:
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif list(model._modules) == ["module"]:
            model = model._modules["module"]  # type: ignore[assignment]
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
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
        for inner in ("base_layer", "original_module", "_orig_mod"):
            if inner in module._modules:
                module = module._modules[inner]  # type: ignore[assignment]
                break
        else:
            return module


def _twin(module: nn.Module, memo: dict[int, nn.Module], links: list[_Link] | None = None, path: str = "") -> nn.Module:
    """A second tree of containers over the same parameters and buffers, without adapters, hooks or instance overrides."""
    module = _base_layer(module, path)
    if id(module) in memo:
        return memo[id(module)]
    twin = memo[id(module)] = object.__new__(type(module))
    state = {name: value for name, value in vars(module).items() if name not in _BOUND_TO_ORIGINAL}
    # The dictionaries of tensors are shared, not only the tensors, so that model.to(...) reaches the twin too.
    tensors = {name: state[name] for name in ("_parameters", "_buffers", "_non_persistent_buffers_set")}
    state |= vars(nn.Module()) | tensors | {"training": False}
    if "gradient_checkpointing" in state:
        state["gradient_checkpointing"] = False
        state.pop("_gradient_checkpointing_func", None)
    vars(twin).update(state)
    for name, child in module._modules.items():
        below = f"{path}.{name}".lstrip(".")
        twin._modules[name] = None if child is None else _twin(child, memo, links, below)
        if child is not None and links is not None:
            links.append(_Link(module._modules, name, child, twin._modules[name]))  # type: ignore[arg-type]
    return twin


def _own_trainable(view: nn.Module, used: Container[str]) -> list[nn.Module]:
    """Gives each used module with a trainable weight tensors of its own; returns those modules."""
    copies: dict[int, Tensor] = {}  # tied weights stay tied

    def own(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copy = tensor.detach().clone()
            copies[id(tensor)] = nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
        return copies[id(tensor)]

    owned = []
    for name, module in view.named_modules():
        if name in used and any(p is not None and p.requires_grad for p in module._parameters.values()):
            for home in ("_parameters", "_buffers"):
                tensors = vars(module)[home]
                vars(module)[home] = {key: None if tensor is None else own(tensor) for key, tensor in tensors.items()}
            owned.append(module)
    return owned


def _shared_tensors(view: nn.Module, used: Container[str], owned: list[nn.Module]) -> list[_Shared]:
    own = {id(module) for module in owned}
    return [
        _Shared(f"{name}.{key}", home, key, tensor, tensor._version)
        for name, module in view.named_modules()
        if name in used and id(module) not in own
        for home in (module._parameters, module._buffers)
        for key, tensor in home.items()
        if tensor is not None
    ]


def _runs_after(name: str, end: str) -> bool:
    """Whether module ``name`` runs only after module ``end`` has returned; False where that is not known."""
    a, b = name.split("."), end.split(".")
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if common is None:  # one holds the other
        return False
    x, y = a[common], b[common]
    if x.isdigit() and y.isdigit():
        return int(x) > int(y)
    if {x, y} == {"resnets", "attentions"}:  # a block alternates between the two
        return len(a) > common + 1 and len(b) > common + 1 and int(a[common + 1]) > int(b[common + 1])
    return x in _ORDER and y in _ORDER and _ORDER.index(x) > _ORDER.index(y)


def _resolve(view: nn.Module, layer: str) -> str:
    """The full path of a layer: negative indices counted, a list of blocks replaced by its last."""
    module, path = view, []
    for part in layer.split("."):
        children = [name for name, child in module._modules.items() if child is not None]
        if part.startswith("-") and part[1:].isdigit() and 0 < int(part[1:]) <= len(children):
            part = children[int(part)]
        if part not in children:
            near = difflib.get_close_matches(layer, [name for name, _ in view.named_modules() if name], n=5, cutoff=0.5)
            where = ".".join(path) or type(view).__name__
            raise bad("layer", f"a module path of the model, such as {sorted(near) or children} ({where} has {children})", repr(layer))
        module = module._modules[part]  # type: ignore[assignment]
        path.append(part)
    while isinstance(module, nn.ModuleList) and len(module):
        path.append(str(len(module) - 1))
        module = module[-1]
    return ".".join(path)


def _prepared(value: Any, batch: int, copies: int, dtype: torch.dtype | None, name: str = "") -> Any:
    """Conditioning as the encoder takes it: floats in ``dtype``, the batch repeated, in fresh containers.

    Ids (SDXL's sizes, positions) keep their dtype: bf16 has no room for a 1021.
    """
    if isinstance(value, Mapping):
        return {key: _prepared(item, batch, copies, dtype, key) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_prepared(item, batch, copies, dtype, name) for item in value)
    if not isinstance(value, Tensor):
        return value
    if dtype is not None and value.is_floating_point() and not name.endswith("ids"):
        value = value.to(dtype)
    if copies > 1 and value.ndim > 0 and len(value) == batch:
        value = value.repeat(copies, *[1] * (value.ndim - 1))
    return value


def _recompute(module: Callable[..., Any], *args: Any) -> Any:
    return recompute(module, *args, use_reentrant=False)


def _moved(path: str, what: str) -> RuntimeError:
    return RuntimeError(
        f"unet's base weights must stay as they were when the loss was built, since the loss shares them: {path} {what}. "
        "Build the loss again; where weights are trainable by then, it keeps a copy of the part it needs"
    )
