"""encoder: from (latents, timesteps, conditioning) to features: the frozen view's forward pass, ended at a layer."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as recompute

from .checks import bad
from .conditioning import Conditioning, fresh_containers, prepared
from .layers import (
    Layers,
    is_exporting,
    one_row_a_sample,
    see_samples_whole,
    split_by_order,
    tapped,
    wanted_layers,
)
from .tensors import Features, constant_to_compilers, per_sample
from .view import own_trainable, twin_of
from .watch import Watch

Encode = Callable[[Tensor], Features]
PullBack = Callable[..., Tensor]  # from cotangents by layer to the latents' cotangent

# In the names of torch's operations, and in those of custom kernels.
_PRODUCTS = re.compile(r"mm\b|\blinear\b|conv|attention|attn")
# In the names of diffusers' files of U-Nets whose first convolution gets the frames of videos.
_OF_VIDEOS = re.compile(r"^diffusers\..*(3d|motion|spatio_temporal|i2vgen)")


class FrozenEncoder:
    """The base model's features at ``layers``. Nothing past the last of them runs.

    The encoder is no Module: its weights are the user's, and belong in no other state_dict. The arguments are those of
    :class:`NoiseConditionedPerceptualLoss`, where ``model`` is called ``unet`` and ``layers`` is called ``layer``.
    """

    # The dtype of the features that were returned last without autocast, and the coarsest dtype of a product inside a
    # model of unknown code; and the weights' dtype at that time.
    _feature_dtype: torch.dtype | None = None
    _feature_dtype_of: torch.dtype | None = None
    _product_dtype: torch.dtype | None = None
    _product_dtype_of: torch.dtype | None = None
    _reached = False  # whether a graph has shown that the features depend on the latents

    def __init__(
        self, model: nn.Module, layers: Layers, *, checkpoint: bool = False, call: Callable[..., Any] | None = None
    ) -> None:
        # A second tree of modules over the user's weights. From here on only this tree is given hooks and flags.
        self.view, links = twin_of(model)
        self.weights, ends = wanted_layers(self.view, layers)
        self._used, later = split_by_order(self.view, ends)
        # Weights that would change while the model trains are copied. The others are shared, and watched.
        self._owned, self._shared = own_trainable(self._used)
        self._watch = Watch(self._used, self._shared, links)
        self._pass = tapped(self.view, ends, later)
        see_samples_whole(self.view, ends)
        if checkpoint:
            _recompute_blocks(self.view)
        self._call = call or _by_name
        if call is not None:
            self.view.register_forward_pre_hook(fresh_containers, with_kwargs=True)
        self._look_at_code()
        self.conditioned = Conditioning(self.view, by_name=call is None)
        self._rows: dict[str, int] = {}  # by layer, how many rows of its output belong to a sample

    def __call__(
        self, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any], trainer_dtype: torch.dtype
    ) -> Features:
        """The features by layer, with one row for each sample.

        ``trainer_dtype`` is that in which the trainer holds the latents. Here alone they are cast to the model's dtype.
        """
        amp = _autocast_dtype(latents.device)
        dtype = None if amp else self._dtype_of_latents(trainer_dtype)  # autocast casts what it needs itself
        known = torch.compiler.is_compiling() or amp or self._all_diffusers
        products = None if known or self._product_dtype_of == self.dtype else _Products()
        conditioning = {k: prepared(v, dtype, trainer_dtype, len(latents), k) for k, v in conditioning.items()}
        kept: Features = {}
        try:
            self._pass.token.pop()
        except IndexError:
            raise RuntimeError("ncp must be used once at a time: another call of it has not returned yet") from None
        # Of modules of other code one pass of each size runs to its end, to see if a layer gets samples in pieces.
        unseen = not torch.compiler.is_compiling() and not self._of_diffusers and latents.shape not in self._sizes_seen
        self._pass.kept, self._pass.runs_on, self._pass.called_again = kept, unseen, ""
        try:
            with products or contextlib.nullcontext():
                self._call(self.view, latents if dtype is None else latents.to(dtype), timesteps, **conditioning)
        except Exception:  # LastLayerReached, what the model made of it, or what happened past the layers
            if len(kept) < len(self.weights):
                raise
        finally:
            self._pass.kept = None
            self._pass.token.append(None)
        # The forward may have ended without the exception, by its own end.
        if missing := self.weights.keys() - kept.keys():
            hint = "" if self._call is _by_name else ", and let `call` run the model that it is given"
            raise RuntimeError(
                f"the model's forward never called {sorted(missing)}; choose a layer that it calls{hint}"
            )
        features = {layer: one_row_a_sample(layer, kept[layer], len(latents)) for layer in self.weights}
        if not torch.compiler.is_compiling():
            if self._pass.called_again:
                raise bad("layer", "a module that the model calls once in a pass", repr(self._pass.called_again))
            self._sizes_seen.add(latents.shape)
            self._rows = {layer: len(kept[layer]) // len(latents) for layer in self.weights}
            if not amp:
                self._note_dtypes({f.dtype for f in features.values()}, products)
        return features

    def _note_dtypes(self, dtypes: set[torch.dtype], products: _Products | None) -> None:
        """Note in which dtype the model computes. Of several the coarsest counts, since its rounding is the largest."""
        if self._all_diffusers:
            dtypes.add(self.dtype)  # norms that are kept in float32 hide the dtype of the products before them
        if products:
            self._product_dtype, self._product_dtype_of = _coarsest({*products.dtypes, *dtypes}), self.dtype
        self._feature_dtype, self._feature_dtype_of = _coarsest({*dtypes, self._product_dtype}), self.dtype

    def checked_features(self, encode: Encode, latents: Tensor) -> Features:
        """The features, without a graph. The first call refuses a layer whose output does not depend on the latents.

        That call has a graph, which shows it. Nothing is kept for a backward pass.
        """
        if torch.compiler.is_compiling():
            return encode(latents) if is_exporting() else linearized(encode, latents)[0]
        if self._reached or torch.is_inference_mode_enabled():
            return encode(latents)
        return self.linearized(encode, latents, keep=False)[0]

    def linearized(self, encode: Encode, latents: Tensor, keep: bool = True) -> tuple[Features, PullBack]:
        """As :func:`linearized`, which the first time follows the graph back to the latents."""
        if torch.compiler.is_compiling():  # a compiler would compile again when the attribute changes
            return linearized(encode, latents)
        found = linearized(encode, latents, keep, follow=not self._reached)
        self._reached = True
        return found

    def check_apart(self, graph: Features, pull_back: PullBack) -> None:
        """Refuse features of a sample that depend on other samples. Backward passes in the first training step show it.

        Such features have no error per sample, and their rows may be grouped under the wrong sample.
        """
        batch = len(next(iter(graph.values())))
        if torch.compiler.is_compiling() or batch == 1:
            return
        # As many tokens as samples: then (tokens, samples, width) looks like (samples, tokens, width).
        unclear = any(f.ndim > 2 and f.shape[1] == batch for f in graph.values())
        layout = unclear, self._rows
        if layout in self._rows_checked or (self._all_diffusers and not unclear):
            return
        last = torch.arange(batch, device="cpu") == batch - 1
        for some in (last, ~last):  # their features must have no slope in the other samples' latents
            cotangents = {}
            for layer, f in graph.items():
                wave = torch.arange(f[0].numel(), device=f.device, dtype=torch.float32).cos().view_as(f[0]).to(f.dtype)
                cotangents[layer] = per_sample(some.to(wave), f) * wave
            slope = pull_back(cotangents, retain_graph=True)
            if type(slope) is not Tensor or slope.is_meta or not (largest := slope.abs().amax()).isfinite():
                return
            if slope[~some].abs().amax() > 1e-5 * largest:
                must_be = "a module whose output for each sample depends on this sample alone, with its rows together"
                raise bad("layer", must_be, f"{list(graph)}, whose output for some samples depends on others too")
        self._rows_checked.append(layout)

    def _look_at_code(self) -> None:
        """See whose code it is. In diffusers' samples do not mix, and products are in the weights' dtype.

        What has been checked of earlier code does not count any more.
        """
        self._of_diffusers = all(map(_is_diffusers, self.view.modules()))
        self._all_diffusers = self._of_diffusers and self._call is _by_name
        self._sizes_seen: set[torch.Size] = set()  # the latents' sizes at which each layer was seen to be called once
        # How many rows of each layer's output belong to a sample, where these have been shown to be one sample's.
        self._rows_checked: list[tuple[bool, dict[str, int]]] = []
        self._product_dtype_of = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights, leaving out those that it always keeps in float32."""
        kept: Any = getattr(self.view, "_keep_in_fp32_modules", None) or ()
        weights = ((name, p.dtype) for name, p in self._parameters() if p.is_floating_point())
        of_weights = (dtype for name, dtype in weights if not any(part in name for part in kept))
        of_buffers = (b.dtype for b in self.view.buffers() if b.is_floating_point())
        return next(chain(of_weights, of_buffers), torch.float32)

    def _dtype_of_latents(self, trainer_dtype: torch.dtype) -> torch.dtype:
        """The weights' dtype; the trainer's where this is narrower and some of the weights have it."""
        dtype = self.dtype
        narrower = trainer_dtype.itemsize < dtype.itemsize
        return trainer_dtype if narrower and any(p.dtype == trainer_dtype for _, p in self._parameters()) else dtype

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights of the modules that run, by path."""
        for path, module in self._used.items():
            yield from ((f"{path}.{key}", p) for key, p in module._parameters.items() if p is not None)

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype that the model computes in now: autocast's, or else its last features' or its weights'."""
        return _autocast_dtype(device) or _last_feature_dtype(self) or self.dtype

    @property
    def channels(self) -> int | None:
        """The latents' number of channels, if they go straight into a 2-D convolution; None if that is not known."""
        conv = getattr(self.view, "conv_in", None)
        of_videos = any(_OF_VIDEOS.search(cls.__module__) for cls in type(self.view).__mro__)
        return conv.in_channels if isinstance(conv, nn.Conv2d) and self._call is _by_name and not of_videos else None

    def check_weights(self, latents: Tensor) -> None:
        """Raise if the weights are no longer the base model's, or are not where the latents are."""
        if torch.compiler.is_compiling():  # a compiler could not trace these checks of the user's own modules
            return
        self._watch.check()
        if self._watch.processor_replaced:
            self._watch.processor_replaced = False
            self._look_at_code()
        # The user moves shared weights, and ``ncp.to(...)`` moves the copies.
        for modules, hint in ((self._owned, ": move its copies with ncp.to(device)"), (self._shared, "")):
            weight = next((p for module in modules.values() for p in module.parameters(recurse=False)), None)
            if weight is not None and weight.device != latents.device:
                raise bad("noisy_latents", f"on the encoder's device, {weight.device}{hint}", f"on {latents.device}")

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Convert the encoder's own copies, as ``ncp.to(...)`` asks. Shared weights are moved by the user alone."""
        for module in self._owned.values():
            nn.Module._apply(module, fn, recurse=False)


@constant_to_compilers  # a compiler would watch the attribute, and compile again when an eager call changes it
def _last_feature_dtype(encoder: FrozenEncoder) -> torch.dtype | None:
    """The features' dtype as it was last seen, unless the weights have been converted since."""
    return encoder._feature_dtype if encoder._feature_dtype_of == encoder.dtype else None


def _recompute_blocks(view: nn.Module) -> None:
    blocks = [module for module in view.modules() if hasattr(module, "gradient_checkpointing")]
    if not blocks:
        raise bad("checkpoint", f"False: {type(view).__name__} has no gradient checkpointing", "True")
    for block in blocks:
        vars(block).update(gradient_checkpointing=True, _gradient_checkpointing_func=_recomputed)


def _recomputed(block: Callable[..., Any], *args: Any) -> Any:
    """Run a block whose activations are recomputed in backward, except under a compiler, which plans memory itself."""
    return block(*args) if torch.compiler.is_compiling() else recompute(block, *args, use_reentrant=False)


def _is_diffusers(module: nn.Module) -> bool:
    """Whether diffusers or torch wrote the module, and its attention processor if it has one."""
    parts = (module, vars(module).get("processor"))
    return all(type(x).__module__.startswith(("diffusers.models.", "torch.nn.")) for x in parts if x is not None)


def _by_name(model: nn.Module, latents: Tensor, timesteps: Tensor, /, **conditioning: Any) -> None:
    model(latents, timestep=timesteps, **conditioning)


class _Products(TorchDispatchMode):
    """Notes the dtypes in which matrix products, convolutions and attention are computed."""

    supports_higher_order_operators = True  # such as flex_attention

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple) else out
        if isinstance(first, Tensor) and first.is_floating_point() and _PRODUCTS.search(str(function)):
            self.dtypes.add(first.dtype)
        return out


def _coarsest(dtypes: set[torch.dtype | None]) -> torch.dtype:
    return max((dtype for dtype in dtypes if dtype), key=lambda dtype: torch.finfo(dtype).eps)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """autocast's dtype on the device; None while it is off, or where there is none, as on "meta"."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.get_autocast_dtype(device.type) if known and torch.is_autocast_enabled(device.type) else None


def linearized(encode: Encode, latents: Tensor, keep: bool = True, follow: bool = False) -> tuple[Features, PullBack]:
    """The features at ``latents``, and a function from a cotangent of the features to that of the latents.

    A call of the function frees the encoder's activations, unless ``retain_graph`` is set. Without ``keep`` they are
    not kept at all, and it cannot be called. Compilers can trace ``torch.func.vjp`` but not ``torch.autograd.grad``.
    Only the latter can recompute activations (``checkpoint=True``), so each has its case.
    """
    if torch.compiler.is_compiling():
        features, vjp, *_ = torch.func.vjp(partial(_dependent, encode), latents)
        return features, lambda cotangents: cast(Tensor, vjp(cotangents)[0])
    # What autograd would save for a backward pass is replaced by 0.
    nothing = torch.autograd.graph.saved_tensors_hooks(lambda _: 0, lambda _: latents)
    with torch.enable_grad(), contextlib.nullcontext() if keep else nothing:
        leaf = latents.detach().requires_grad_()
        # torch's FLOP counter hooks a module's inputs, but no leaf.
        graph = _dependent(encode, leaf.view_as(leaf), follow)

    def pull_back(cotangents: Features, retain_graph: bool = False) -> Tensor:
        # The casts of the forward pass have derivatives of their own. With autocast on, the backward pass would round
        # the cotangents once more.
        device, amp = latents.device, _autocast_dtype(latents.device)
        with torch.autocast(device.type, enabled=False) if amp else contextlib.nullcontext():
            values = [cotangents[layer] for layer in graph]
            return torch.autograd.grad(list(graph.values()), leaf, values, retain_graph=retain_graph)[0]

    return {layer: f.detach() for layer, f in graph.items()}, pull_back


def _dependent(encode: Encode, latents: Tensor, follow: bool = False) -> Features:
    """The features. Where gradients are recorded, ``requires_grad`` shows whether the latents reach them.

    So it does where something else does that trains, as text may; ``follow`` tells these apart.
    """
    features = encode(latents)
    for layer, f in features.items():
        if not f.requires_grad or (follow and not _leads_to(latents.grad_fn, f.grad_fn)):
            raise bad("layer", "a module whose output depends on the latents", f"{layer!r}, whose output does not")
    return features


def _leads_to(goal: Any, node: Any) -> bool:
    """Whether the graph of ``node`` has ``goal`` in it."""
    seen, open_nodes = set(), [node]
    while open_nodes:
        if (node := open_nodes.pop()) is not None and node not in seen:
            seen.add(node)
            open_nodes += [behind for behind, _ in node.next_functions]
    return goal in seen
