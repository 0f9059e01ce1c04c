"""encoder: the frozen view, stopped at the layers asked for: from (latents, timesteps, conditioning) to features."""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from .checks import bad, check_floating, check_rows
from .view import own_trainable, twin_of
from .watch import Watch

Layers = str | Sequence[str] | Mapping[str, float]

# What runs one after another in a model's forward, whatever order it was registered in. Used only to tell which weights
# lie past a layer and need no copy: a name that is missing here costs memory, never correctness.
_ORDER = (
    *("resnets", "attentions", "downsamplers", "upsamplers"),
    *("down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out"),
    *("transformer_blocks", "single_transformer_blocks", "norm_out", "proj_out"),
)


class LastLayerReached(Exception):  # not an error: it ends a forward pass whose work is done
    """Raised inside the view's forward, and caught around it, when the last wanted layer has run."""


@dataclass
class _Pass:
    """The view's forward pass: how many layers are wanted of it, and those kept so far; None while it does not run."""

    wanted: int
    kept: dict[str, Tensor] | None = None


class _Tap:
    """A forward hook that keeps a layer's output, and ends the pass when every layer's is there."""

    def __init__(self, layer: str, forward: _Pass) -> None:
        self.layer, self.forward = layer, forward

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        kept, wanted = self.forward.kept, self.forward.wanted
        # A checkpoint runs the layer again in backward, and a model may use one twice: its first output counts.
        if kept is None or self.layer in kept:
            return
        features = self._image_stream(args, kwargs, output)
        # Where the pass goes on, the model may still add to its hidden states in place (a T2I-Adapter's residuals).
        kept[self.layer] = features.clone() if len(kept) + 1 < wanted else features
        # An exporter keeps a stack of the modules it is in, which an exception would leave unbalanced: run on there,
        # and let its dead-code elimination remove the rest.
        if len(kept) == wanted and not torch.compiler.is_exporting():
            raise LastLayerReached

    def _image_stream(self, args: Any, kwargs: Any, output: Any) -> Tensor:
        """The output, or that one of several which has the shape of the ``hidden_states`` that came in.

        A U-Net block returns its hidden states and what it keeps for skip connections, a tuple; a transformer block
        with two streams returns the text's and the image's, in an order of its own.
        """
        streams = [x for x in output if isinstance(x, Tensor)] if isinstance(output, tuple) else [output]
        if len(streams) > 1:
            image = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            streams = [x for x in streams if x.shape == image.shape]
        if len(streams) != 1:
            must_be = "a module that returns one tensor shaped like the hidden_states it is given"
            raise bad("layer", must_be, f"{self.layer!r}, whose text and image streams are of one shape")
        return streams[0]


class FrozenEncoder:
    """Features of the bare base model at ``layers``; nothing past the last of them runs.

    Not a Module, on purpose: the weights are the user's, and belong in no state_dict but theirs. Arguments are those of
    :class:`NoiseConditionedPerceptualLoss`, where ``model`` is called ``unet`` and ``layers`` is called ``layer``.
    """

    def __init__(
        self, model: nn.Module, layers: Layers, *, checkpoint: bool = False, call: Callable[..., Any] | None = None
    ) -> None:
        self.view, links = twin_of(model)
        self._call = call or _by_name
        if not isinstance(layers, str | Sequence | Mapping):
            raise bad("layer", "a module path, a sequence of them or a mapping to weights", repr(layers), TypeError)
        names = [layers] if isinstance(layers, str) else list(layers)
        self.weights = dict(layers) if isinstance(layers, Mapping) else dict.fromkeys(names, 1.0)
        if not self.weights or any(not weight > 0 for weight in self.weights.values()):
            raise bad("layer", "one module path or more, with positive weights", repr(layers))
        ends = {layer: _resolve(self.view, layer) for layer in self.weights}
        if len(set(ends.values())) < len(names):
            raise bad("layer", "different modules", repr(layers))

        modules = dict(self.view.named_modules())
        used = {name: modules[name] for name in modules if not all(_runs_after(name, end) for end in ends.values())}
        self._owned = own_trainable(used)
        shared = {name: module for name, module in used.items() if name not in self._owned}
        self._copied, self._shared = _first_weight(self._owned), _first_weight(shared)
        self._of_one_dtype = len({p.dtype for p in (self._copied, self._shared) if p is not None}) == 1
        self._watch = Watch(used, shared, links)
        self._pass = _Pass(len(ends))
        for layer, end in ends.items():
            modules[end].register_forward_hook(_Tap(layer, self._pass), with_kwargs=True)
        if checkpoint:
            blocks = [module for module in modules.values() if hasattr(module, "gradient_checkpointing")]
            if not blocks:
                raise bad("checkpoint", f"False: {type(self.view).__name__} has no gradient checkpointing", "True")
            function = partial(recompute, use_reentrant=False)
            for block in blocks:
                vars(block).update(gradient_checkpointing=True, _gradient_checkpointing_func=function)
        takes = inspect.signature(type(self.view).forward).parameters
        self._takes_text = "encoder_hidden_states" in takes and call is None
        self._reads_text = any(getattr(module, "has_cross_attention", False) for module in modules.values())

    def __call__(
        self,
        latents: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor | None,
        model_kwargs: dict[str, Any],
        given: torch.dtype,
    ) -> dict[str, Tensor]:
        """{layer: features}. Where latents are k batches stacked, the conditioning of one batch serves them all.

        Only here are latents cast to the dtype that the model computes in; ``given`` is what the trainer has them in.
        """
        if not torch.compiler.is_compiling():
            self._watch.check()
            self._check_own(latents)
        if encoder_hidden_states is not None or self._takes_text:
            model_kwargs = model_kwargs | {"encoder_hidden_states": encoder_hidden_states}
        batch, copies = len(timesteps), len(latents) // len(timesteps)
        dtype = None if _autocast_dtype(latents.device) else self.dtype
        conditioning = {k: _prepared(v, batch, copies, dtype, given, k) for k, v in model_kwargs.items()}
        latents = latents if dtype is None else latents.to(dtype)
        kept: dict[str, Tensor] = {}
        self._pass.kept = kept
        try:
            with contextlib.suppress(LastLayerReached):
                self._call(self.view, latents, timesteps.repeat(copies), **conditioning)
        finally:
            self._pass.kept = None
        if missing := self.weights.keys() - kept.keys():
            raise RuntimeError(f"the model's forward never called {sorted(missing)}; choose a layer that it calls")
        return {layer: kept[layer] for layer in self.weights}

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in without autocast: the dtype of its weights, but for those it keeps in float32."""
        kept: Any = getattr(self.view, "_keep_in_fp32_modules", None) or ()
        weights = ((name, p.dtype) for name, p in self.view.named_parameters() if p.is_floating_point())
        return next(dtype for name, dtype in weights if not any(part in name for part in kept))

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """What the model computes in now, autocast included."""
        return _autocast_dtype(device) or self.dtype

    @property
    def channels(self) -> int | None:
        """Of the latents, where the first layer is a 2-D convolution, which takes (B, C, H, W), and is given them."""
        conv = getattr(self.view, "conv_in", None)
        return conv.in_channels if isinstance(conv, nn.Conv2d) and self._call is _by_name else None

    def check_conditioning(self, latents: Tensor, text: Tensor | None, model_kwargs: Mapping[str, Any]) -> None:
        """What the model would stumble over deep inside, said at the door, unless a call of one's own decides that."""
        if self._call is not _by_name:
            return
        config: Any = getattr(self.view, "config", None)
        if text is not None:
            width = getattr(config, "cross_attention_dim", None)
            known = self._reads_text and isinstance(width, int) and getattr(config, "encoder_hid_dim", None) is None
            check_floating("encoder_hidden_states", text)
            check_rows("encoder_hidden_states", text, latents, *(("L", width) if known else ()))
        elif self._reads_text:
            raise bad("encoder_hidden_states", "given: the model attends to text", "None")
        if getattr(config, "addition_embed_type", None) == "text_time":
            added = model_kwargs.get("added_cond_kwargs") or {}
            if not {"text_embeds", "time_ids"} <= set(added):
                raise bad("added_cond_kwargs", "a dict with text_embeds and time_ids, as for SDXL", sorted(added))
            ids = check_rows("added_cond_kwargs['time_ids']", added["time_ids"], latents)
            width = config.projection_class_embeddings_input_dim - config.addition_time_embed_dim * ids[0].numel()
            check_rows("added_cond_kwargs['text_embeds']", added["text_embeds"], latents, width)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """What ``ncp.to(...)`` does: convert the encoder's own copies; what is the user's, the user moves."""
        for module in self._owned.values():
            nn.Module._apply(module, fn, recurse=False)

    def _check_own(self, latents: Tensor) -> None:
        """The user moves shared weights, ``ncp.to(...)`` moves copies: say so where one was left behind."""
        for weight, hint in ((self._copied, ": move its copies with ncp.to(device)"), (self._shared, "")):
            if weight is not None and weight.device != latents.device:
                raise bad("noisy_latents", f"on the encoder's device, {weight.device}{hint}", f"on {latents.device}")
        copied, shared = self._copied, self._shared
        if copied is not None and shared is not None and (copied.dtype == shared.dtype) != self._of_one_dtype:
            hint = "convert these with ncp.to(dtype)"
            must_be = f"in the dtype of the loss's copies of its trainable weights, {copied.dtype}: {hint}"
            raise bad("unet", must_be, shared.dtype)


def _first_weight(modules: Mapping[str, nn.Module]) -> Tensor | None:
    return next((p for module in modules.values() for p in module.parameters(recurse=False)), None)


def _by_name(model: nn.Module, latents: Tensor, timesteps: Tensor, **conditioning: Any) -> None:
    model(latents, timestep=timesteps, **conditioning)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    known = torch.amp.is_autocast_available(device.type)  # not so for "meta", on which costs are counted
    return torch.get_autocast_dtype(device.type) if known and torch.is_autocast_enabled(device.type) else None


def _runs_after(name: str, end: str) -> bool:
    """Whether module ``name`` runs only after module ``end`` has returned; False where that is not known."""
    a, b = name.split("."), end.split(".")
    while a and b and a[0] == b[0]:
        del a[0], b[0]
    if not a or not b:  # one holds the other
        return False
    x, y = a[0], b[0]
    if x.isdigit() and y.isdigit():
        return int(x) > int(y)
    if {x, y} == {"resnets", "attentions"}:  # a block alternates between the two
        return len(a) > 1 and len(b) > 1 and int(a[1]) > int(b[1])
    return x in _ORDER and y in _ORDER and _ORDER.index(x) > _ORDER.index(y)


def _resolve(view: nn.Module, layer: str) -> str:
    """The full path of a layer: negative indices counted, a list of blocks replaced by its last."""
    module, path = view, list[str]()
    for part in layer.split("."):
        children = [name for name, child in module._modules.items() if child is not None]
        if part.startswith("-") and part[1:].isdigit() and 0 < int(part[1:]) <= len(children):
            part = children[int(part)]
        if part not in children:
            near = difflib.get_close_matches(layer, [name for name, _ in view.named_modules() if name], n=5, cutoff=0.5)
            there = f"{'.'.join(path) or type(view).__name__} has {children}"
            raise bad("layer", f"a module path of the model, such as {sorted(near) or children} ({there})", repr(layer))
        module = module._modules[part]  # type: ignore[assignment]
        path.append(part)
    while isinstance(module, nn.ModuleList) and len(module):
        path.append(str(len(module) - 1))
        module = module[-1]
    return ".".join(path)


def _prepared(value: Any, batch: int, copies: int, dtype: torch.dtype | None, given: torch.dtype, name: str) -> Any:
    """Conditioning as the encoder takes it: floats in ``dtype``, the batch repeated, in fresh containers.

    What is wider, but not because all that the trainer gives is, stays as wide: class labels, rotary tables; ids always
    (SDXL's sizes, positions). bf16 has no room for a 1021.
    """
    if isinstance(value, Mapping):
        return {key: _prepared(item, batch, copies, dtype, given, key) for key, item in value.items()}
    if isinstance(value, list | tuple):
        # Image shapes and lengths of text come as one item for each sample; tensors in a list are batches, or tables.
        samples = isinstance(value, list) and len(value) == batch and not any(isinstance(x, Tensor) for x in value)
        return type(value)(
            _prepared(item, batch, copies, dtype, given, name) for item in value * (copies if samples else 1)
        )
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if dtype is not None and value.is_floating_point() and not name.endswith("ids"):
        follows = name == "encoder_hidden_states" or value.dtype == given or value.itemsize <= dtype.itemsize
        value = value.to(dtype) if follows else value
    if copies > 1 and value.ndim > 0 and len(value) == batch:
        value = value.repeat(copies, *[1] * (value.ndim - 1))
    return value
