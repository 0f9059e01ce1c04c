"""encoder: from (latents, timesteps, conditioning) to features: the frozen view's forward pass, ended at a layer."""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
import re
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint as recompute

from .checks import bad, check_floating, check_number, check_numbers, check_rows
from .tensors import Features, constant_to_compilers, per_sample
from .view import own_trainable, twin_of
from .watch import Link, Watch

Layers = str | Sequence[str] | Mapping[str, float]
Encode = Callable[[Tensor], Features]
PullBack = Callable[..., Tensor]  # from cotangents by layer to the latents' cotangent

# The order in which the modules of a diffusers model run, whatever order they were registered in. It shows which
# weights are used only after the last wanted layer, and need no copy. A name that is missing here costs memory. A model
# that runs in another order is refused by _out_of_order. Neither makes a wrong result.
_ORDER = (
    *("down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out"),
    *("transformer_blocks", "single_transformer_blocks", "norm_out", "proj_out"),
)

# In the names of torch's operations, and in those of custom kernels.
_PRODUCTS = re.compile(r"mm\b|\blinear\b|conv|attention|attn")

# Chunked feed-forward, slicing and tiling call the layers inside them with a part of a sample at a time.
_WHOLE = {"_chunk_size": None, "use_slicing": False, "use_tiling": False}


# torch before 2.7 does not distinguish an export from a compilation.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class LastLayerReached(Exception):  # no error, so its name does not say Error
    """Ends the view's forward pass when the last wanted layer has run. It is caught around that pass."""


@dataclass
class _Pass:
    """The state of the view's forward pass, which the hooks on its layers share."""

    wanted: int  # how many layers are wanted
    kept: Features | None = None  # the features kept so far; None while no pass runs
    # A list with one token, which only one thread can take. A lock could not be copied or pickled.
    free: list[None] = field(default_factory=lambda: [None])


class _Tap:
    """A forward hook that keeps a layer's output, and ends the pass when the outputs of all wanted layers are kept."""

    def __init__(self, layer: str, forward: _Pass, module: nn.Module) -> None:
        self.layer, self.forward = layer, forward
        self.image: int | None = None  # which of several outputs was the image's, once that was clear
        names = list(inspect.signature(type(module).forward).parameters)
        self.position = names.index("hidden_states") - 1 if "hidden_states" in names else None

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        kept, wanted = self.forward.kept, self.forward.wanted
        # The first output counts. A checkpoint runs the layer again in backward, and a model may use a layer twice.
        if kept is None or self.layer in kept:
            return
        features = self._image_stream(args, kwargs, output)
        if features is None:
            self.forward.kept = None  # _several_streams runs the module once more, in which no tap may act
            raise self._several_streams(module, args, kwargs, output)
        # If the pass goes on, the model may still change this tensor in place, as it adds a T2I-Adapter's residuals.
        kept[self.layer] = features.clone() if len(kept) + 1 < wanted else features
        # An exporter keeps a stack of the modules that it is in, and an exception would leave this unbalanced. So the
        # pass runs on there, and the exporter removes the rest as dead code.
        if len(kept) == wanted and not _is_exporting():
            raise LastLayerReached

    def _image_stream(self, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        """The output, or the one of several outputs that has the shape of the image's input; None if that is unclear.

        A U-Net block returns its hidden states and a tuple for skip connections. A transformer block with two streams
        returns the text's and the image's, in either order. The image's input is ``hidden_states``, by name or
        position, or else the only input tensor of three dimensions or more. Where text and image have equal shapes,
        the image's output is the one that it was in an earlier call.
        """
        outputs = output if isinstance(output, tuple) else (output,)
        places = [i for i, x in enumerate(outputs) if isinstance(x, Tensor)]
        if len(places) > 1:
            by_position = args[self.position] if self.position is not None and self.position < len(args) else None
            image = kwargs.get("hidden_states", by_position)
            inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 2]
            images = inputs if image is None else [image]
            places = [i for i in places if len(images) == 1 and outputs[i].shape == images[0].shape]
            if len(places) == 1:
                self.image = places[0]
            elif self.image in places:
                places = [self.image]
        # What stands behind a tuple is no U-Net block's hidden states, which come before the skip connections.
        clear = len(places) == 1 and not any(isinstance(x, tuple | list) for x in outputs[: places[0]])
        return cast(Tensor, outputs[places[0]]) if clear else None

    def _several_streams(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Exception:
        """The error for a module whose output is unclear. It names modules inside that return one tensor."""
        single: list[str] = []

        def note(_: Any, given: Any, out: Any, name: str) -> None:
            if isinstance(out, Tensor) and out.ndim > 2:
                single[:] = [inner for inner in single if not inner.startswith(f"{name}.")] + [name]

        inside = [(name, inner) for name, inner in module.named_modules(prefix=self.layer) if inner is not module]
        hooks = [inner.register_forward_hook(partial(note, name=name)) for name, inner in inside]
        try:
            module.forward(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        parts = output if isinstance(output, tuple) else ()
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in parts]
        instead = f", as inside it {', '.join(map(repr, single[-8:]))}" if single else ""
        must_be = f"a module that returns one tensor, or one shaped like the hidden_states it is given{instead}"
        return bad("layer", must_be, f"{self.layer!r}, which returned a {type(output).__name__} {shapes or ''}")


class FrozenEncoder:
    """The base model's features at ``layers``. Nothing past the last of them runs.

    The encoder is no Module: its weights are the user's, and belong in no other state_dict. The arguments are those of
    :class:`NoiseConditionedPerceptualLoss`, where ``model`` is called ``unet`` and ``layers`` is called ``layer``.
    """

    _seen: torch.dtype | None = None  # the dtype of the features that were returned last
    _inner: torch.dtype | None = None  # the coarsest dtype of a product inside a model of unknown code,
    _inner_of: torch.dtype | None = None  # when its weights had this dtype
    _reached = False  # whether a pass without gradients has shown that the features depend on the latents
    _apart = False  # whether a backward pass has shown that a sample's features depend on this sample alone

    def __init__(
        self, model: nn.Module, layers: Layers, *, checkpoint: bool = False, call: Callable[..., Any] | None = None
    ) -> None:
        # A second tree of modules over the user's weights. From here on only this tree is given hooks and flags.
        self.view, links = twin_of(model)
        self.weights, ends = _wanted(self.view, layers)
        used, later = _split_by_order(self.view, ends)
        self._share_or_own(used, links)
        self._pass = _tapped(self.view, ends, later)
        _see_samples_whole(self.view, ends)
        if checkpoint:
            _recompute_blocks(self.view)
        self._call = call or _by_name
        if call is not None:
            self.view.register_forward_pre_hook(_fresh_containers, with_kwargs=True)
        self._known = self._is_known()
        self._signature = inspect.signature(type(self.view).forward)
        self._takes_text = "encoder_hidden_states" in self._signature.parameters and call is None
        self._reads_text = any(getattr(module, "has_cross_attention", False) for module in self.view.modules())

    def _share_or_own(self, used: Mapping[str, nn.Module], links: list[Link]) -> None:
        """Copy the weights that would change while the model trains, and watch that the others do not."""
        self._owned = own_trainable(used)
        shared = {name: module for name, module in used.items() if name not in self._owned}
        self._watch = Watch(used, shared, links)
        self._copied, self._shared = _first_weight(self._owned), _first_weight(shared)

    def __call__(
        self, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any], trainer_dtype: torch.dtype
    ) -> Features:
        """The features by layer, with one row for each sample.

        ``trainer_dtype`` is that in which the trainer holds the latents. Here alone they are cast to the model's dtype.
        """
        amp = _autocast_dtype(latents.device)
        dtype = None if amp else self._dtype_of_latents(trainer_dtype)  # autocast casts what it needs itself
        seen_inside = torch.compiler.is_compiling() or amp or self._known or self._inner_of == self.dtype
        products = None if seen_inside else _Products()
        conditioning = {k: _prepared(v, dtype, trainer_dtype, len(latents), k) for k, v in conditioning.items()}
        kept: Features = {}
        try:
            self._pass.free.pop()
        except IndexError:
            raise RuntimeError("ncp must be used once at a time: another call of it has not returned yet") from None
        self._pass.kept = kept
        try:
            with contextlib.suppress(LastLayerReached), products or contextlib.nullcontext():
                self._call(self.view, latents if dtype is None else latents.to(dtype), timesteps, **conditioning)
        finally:
            self._pass.kept = None
            self._pass.free.append(None)
        # The forward may have ended without the exception, by its own end.
        if missing := self.weights.keys() - kept.keys():
            hint = "" if self._call is _by_name else ", and let `call` run the model that it is given"
            raise RuntimeError(
                f"the model's forward never called {sorted(missing)}; choose a layer that it calls{hint}"
            )
        features = {layer: _one_row_a_sample(layer, kept[layer], len(latents)) for layer in self.weights}
        if not torch.compiler.is_compiling():
            # With several dtypes the coarsest counts, since its rounding is the largest.
            seen = {f.dtype for f in features.values()}
            if products:
                self._inner, self._inner_of = _coarsest({*products.dtypes, *seen}), self.dtype
            self._seen = _coarsest({*seen, self._inner})
        return features

    def reached(self, encode: Encode, latents: Tensor) -> Features:
        """The features, without a graph. The first call refuses a layer that the latents do not reach.

        That call has a graph, which shows it. Nothing is kept for a backward pass.
        """
        if torch.compiler.is_compiling():
            return encode(latents) if _is_exporting() else linearized(encode, latents)[0]
        if self._reached or torch.is_inference_mode_enabled():
            return encode(latents)
        graph, _ = linearized(encode, latents, keep=False)
        self._reached = True
        return {layer: f.detach() for layer, f in graph.items()}

    def check_apart(self, graph: Features, pull_back: PullBack) -> None:
        """Refuse features of a sample that depend on other samples. Backward passes in the first training step show it.

        Such features have no error per sample, and their rows may be grouped under the wrong sample.
        """
        batch = len(next(iter(graph.values())))
        if torch.compiler.is_compiling() or self._known or self._apart or batch == 1:
            return
        last = torch.arange(batch) == batch - 1
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
        self._apart = True

    def _is_known(self) -> bool:
        """Whether all code is diffusers'. There rows do not mix, and features have the dtype that computes them."""
        return self._call is _by_name and all(map(_is_diffusers, self.view.modules()))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights, leaving out those that it always keeps in float32."""
        kept: Any = getattr(self.view, "_keep_in_fp32_modules", None) or ()
        weights = ((name, p.dtype) for name, p in self.view.named_parameters() if p.is_floating_point())
        of_weights = (dtype for name, dtype in weights if not any(part in name for part in kept))
        of_buffers = (b.dtype for b in self.view.buffers() if b.is_floating_point())
        return next(chain(of_weights, of_buffers), torch.float32)

    def _dtype_of_latents(self, trainer_dtype: torch.dtype) -> torch.dtype:
        """The weights' dtype; the trainer's where this is narrower and some of the weights have it."""
        dtype = self.dtype
        narrower = trainer_dtype.itemsize < dtype.itemsize
        return trainer_dtype if narrower and any(p.dtype == trainer_dtype for p in self.view.parameters()) else dtype

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype that the model computes in now: autocast's, or else its last features' or its weights'."""
        return _autocast_dtype(device) or _seen(self) or self.dtype

    @property
    def channels(self) -> int | None:
        """The latents' number of channels, if they go straight into a 2-D convolution; None if that is not known."""
        conv = getattr(self.view, "conv_in", None)
        return conv.in_channels if isinstance(conv, nn.Conv2d) and self._call is _by_name else None

    def conditioned(self, latents: Tensor, text: Tensor | None, model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The model's keyword arguments, checked: bad ones are refused here, before the model would fail on them."""
        if not torch.compiler.is_compiling():  # a compiler could not trace these checks of the user's own modules
            self._watch.check()
            if self._watch.followed:
                self._known, self._apart, self._watch.followed = self._is_known(), False, False
            self._check_own(latents)
        texts = {"encoder_hidden_states": text} if text is not None or self._takes_text else {}
        conditioning = {**model_kwargs, **texts}
        if self._call is _by_name:
            self._check_conditioning(latents, text, model_kwargs)
            if not torch.compiler.is_compiling():
                self._check_call(conditioning)
        return conditioning

    def _check_call(self, conditioning: Mapping[str, Any]) -> None:
        try:
            self._signature.bind(self.view, None, timestep=None, **conditioning)
        except TypeError as error:
            model, takes = f"{type(self.view).__name__}.forward", self._signature.parameters.keys()
            unknown = conditioning.keys() - takes - {"encoder_hidden_states"}
            if unknown and "timestep" in takes:  # a misspelled argument of the loss ends up here too
                raise bad(min(unknown), f"an argument of the loss or of {model}", "neither", TypeError) from None
            names = ", ".join(["timestep", *conditioning])
            must_be = "given, a function that calls the model as its trainer does (docs, recipes/own-models)"
            was = f"None, and {model}, called with latents, {names}: {error}"
            raise bad("call", must_be, was, TypeError) from None

    def _check_conditioning(self, latents: Tensor, text: Tensor | None, model_kwargs: Mapping[str, Any]) -> None:
        config: Any = getattr(self.view, "config", None)
        if text is not None:
            # The width is known where the text goes straight into cross-attention, with no projection before it.
            width = getattr(config, "cross_attention_dim", None)
            known = self._reads_text and isinstance(width, int) and getattr(config, "encoder_hid_dim", None) is None
            check_floating("encoder_hidden_states", text)
            check_rows("encoder_hidden_states", text, latents, *(("L", width) if known else ()))
        elif self._reads_text and not _self_sufficient(config):
            raise bad("encoder_hidden_states", "given: the model attends to text", "None")
        if getattr(config, "addition_embed_type", None) == "text_time":
            added = model_kwargs.get("added_cond_kwargs")
            if not isinstance(added, Mapping) or not {"text_embeds", "time_ids"} <= set(added):
                was = sorted(map(str, added)) if isinstance(added, Mapping) else type(added).__name__
                raise bad("added_cond_kwargs", "a dict with text_embeds and time_ids, as for SDXL", was)
            names = {key: f"added_cond_kwargs[{key!r}]" for key in ("time_ids", "text_embeds")}
            ids = check_rows(names["time_ids"], check_numbers(names["time_ids"], added["time_ids"]), latents)
            # SDXL projects the pooled text together with embeddings of the time ids, whose width is known.
            width = config.projection_class_embeddings_input_dim - config.addition_time_embed_dim * ids[0].numel()
            text_embeds = check_floating(names["text_embeds"], added["text_embeds"])
            check_rows(names["text_embeds"], text_embeds, latents, width)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Convert the encoder's own copies, as ``ncp.to(...)`` asks. Shared weights are moved by the user alone."""
        for module in self._owned.values():
            nn.Module._apply(module, fn, recurse=False)

    def _check_own(self, latents: Tensor) -> None:
        """Refuse weights that were left behind: the user moves shared ones, and ``ncp.to(...)`` moves the copies."""
        for weight, hint in ((self._copied, ": move its copies with ncp.to(device)"), (self._shared, "")):
            if weight is not None and weight.device != latents.device:
                raise bad("noisy_latents", f"on the encoder's device, {weight.device}{hint}", f"on {latents.device}")


@constant_to_compilers  # a compiler would watch the attribute, and compile again when an eager call changes it
def _seen(encoder: FrozenEncoder) -> torch.dtype | None:
    return encoder._seen


def _wanted(view: nn.Module, layers: Layers) -> tuple[dict[str, float], dict[str, str]]:
    """By layer, as it was asked for: its weight, and the full path of its module."""
    if not isinstance(layers, str | Sequence | Mapping):
        must_be = "a module path, a sequence of them or a mapping to weights"
        raise bad("layer", must_be, type(layers).__name__, TypeError)
    names = [layers] if isinstance(layers, str) else list(layers)
    if not names or not all(isinstance(layer, str) for layer in names):
        raise bad("layer", "one module path or more, with positive weights", repr(layers))
    given = layers if isinstance(layers, Mapping) else dict.fromkeys(names, 1.0)
    weights = {name: check_number(f"layer[{name!r}]", given[name], "a positive weight") for name in given}
    ends = {layer: _resolve(view, layer) for layer in weights}
    if len({view.get_submodule(end) for end in ends.values()}) < len(names):
        raise bad("layer", "different modules", repr(layers))
    return weights, ends


def _split_by_order(view: nn.Module, ends: Mapping[str, str]) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The modules that may run before all of ``ends`` have returned, and those that run only later.

    Only of diffusers' models is the order known. A module under two names runs where either of them stands.
    """
    modules = list(view.named_modules(remove_duplicate=False))
    known = type(view).__module__.startswith("diffusers.")
    # A name is past if it runs after every wanted layer. A module runs if one of its names is not past.
    past = {name for name, _ in modules if known and all(_runs_after(name, end) for end in ends.values())}
    runs = {module: name for name, module in modules if name not in past}
    used = {name: module for module, name in runs.items()}
    return used, {name: module for name, module in modules if module not in runs}


def _tapped(view: nn.Module, ends: Mapping[str, str], later: Mapping[str, nn.Module]) -> _Pass:
    """Put a tap on each wanted layer, and a guard on each module that should not run; the pass that they serve."""
    forward = _Pass(len(ends))
    for layer, end in ends.items():
        module = view.get_submodule(end)
        module.register_forward_hook(_Tap(layer, forward, module), with_kwargs=True)
    for name, module in later.items():
        module.register_forward_pre_hook(partial(_out_of_order, name=name, forward=forward))
    return forward


def _see_samples_whole(view: nn.Module, ends: Mapping[str, str]) -> None:
    """Switch off, in each module around or at a wanted layer, what would call the layer with a part of a sample."""
    for name, module in view.named_modules(remove_duplicate=False):
        if not name or any(f"{end}.".startswith(f"{name}.") for end in ends.values()):
            vars(module).update({key: value for key, value in _WHOLE.items() if key in vars(module)})


def _recompute_blocks(view: nn.Module) -> None:
    blocks = [module for module in view.modules() if hasattr(module, "gradient_checkpointing")]
    if not blocks:
        raise bad("checkpoint", f"False: {type(view).__name__} has no gradient checkpointing", "True")
    for block in blocks:
        vars(block).update(gradient_checkpointing=True, _gradient_checkpointing_func=_recomputed)


def _recomputed(block: Callable[..., Any], *args: Any) -> Any:
    """Run a block whose activations are recomputed in backward, except under a compiler, which plans memory itself."""
    return block(*args) if torch.compiler.is_compiling() else recompute(block, *args, use_reentrant=False)


def _self_sufficient(config: Any) -> bool:
    """Whether a U-Net's cross-attention needs no text: it attends to images (Kandinsky 2.2) or to itself (AudioLDM)."""
    widths, channels = getattr(config, "cross_attention_dim", None), getattr(config, "block_out_channels", None)
    images = getattr(config, "encoder_hid_dim_type", None) == "image_proj"
    return images or (isinstance(widths, list | tuple) and list(widths) == list(channels or ()))


def _first_weight(modules: Mapping[str, nn.Module]) -> Tensor | None:
    return next((p for module in modules.values() for p in module.parameters(recurse=False)), None)


def _by_name(model: nn.Module, latents: Tensor, timesteps: Tensor, /, **conditioning: Any) -> None:
    model(latents, timestep=timesteps, **conditioning)


def _is_diffusers(module: nn.Module) -> bool:
    """Whether diffusers or torch wrote the module, and its attention processor if it has one."""
    parts = (module, vars(module).get("processor"))
    return all(type(x).__module__.startswith(("diffusers.models.", "torch.nn.")) for x in parts if x is not None)


def _fresh_containers(_: nn.Module, args: Any, kwargs: Any) -> Any:
    """New lists and dicts at each point, since a model may empty the one that it gets, as diffusers' U-Net does."""
    return tree_map(lambda x: x, (args, kwargs))


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


def _runs_after(name: str, end: str) -> bool:
    """Whether module ``name`` runs only after module ``end``, by the first two parts of their paths."""
    (a, i), (b, j) = ((parts[0], parts[1] if len(parts) > 1 else "") for parts in (name.split("."), end.split(".")))
    if a == b:  # blocks of one list run in the list's order
        return i.isdigit() and j.isdigit() and int(i) > int(j)
    return a in _ORDER and b in _ORDER and _ORDER.index(a) > _ORDER.index(b)


def _out_of_order(module: nn.Module, args: Any, name: str, forward: _Pass) -> None:
    """A pre-hook that refuses a module which should run later only: its weights are neither copied nor watched."""
    if forward.kept is not None and len(forward.kept) < forward.wanted:
        must_be = f"a module that has run when {name!r} begins, as in diffusers' models of such names"
        raise bad("layer", must_be, "one that runs later")


def _resolve(view: nn.Module, layer: str) -> str:
    """The full path of a layer. Negative indices count from the end, and a list of blocks stands for its last block."""
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


def linearized(encode: Encode, latents: Tensor, keep: bool = True) -> tuple[Features, PullBack]:
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
        graph = _dependent(encode, leaf.view_as(leaf))  # torch's FLOP counter hooks a module's inputs, but no leaf

    def pull_back(cotangents: Features, retain_graph: bool = False) -> Tensor:
        # The casts of the forward pass have derivatives of their own. With autocast on, the backward pass would round
        # the cotangents once more.
        device, amp = latents.device, _autocast_dtype(latents.device)
        with torch.autocast(device.type, enabled=False) if amp else contextlib.nullcontext():
            values = [cotangents[layer] for layer in graph]
            return torch.autograd.grad(list(graph.values()), leaf, values, retain_graph=retain_graph)[0]

    return {layer: f.detach() for layer, f in graph.items()}, pull_back


def _dependent(encode: Encode, latents: Tensor) -> Features:
    """The features. Where gradients are recorded, ``requires_grad`` shows whether the latents reach them."""
    features = encode(latents)
    for layer, f in features.items():
        if not f.requires_grad:
            raise bad("layer", "a module whose output depends on the latents", f"{layer!r}, whose output does not")
    return features


def _one_row_a_sample(layer: str, features: Tensor, batch: int) -> Tensor:
    """(rows, ...) -> (B, ...): a sample's rows, such as the frames of a video, follow one another.

    Features with tokens first, (L, B, D), look the same if L is a multiple of B. So a second dimension of B is refused.
    """
    rows = len(features) if features.ndim else 0
    if not features.is_floating_point():
        raise bad("layer", "a module whose output is floating-point", f"{layer!r}, in {features.dtype}", TypeError)
    if rows == batch:
        return features
    if rows == 0 or rows % batch or (batch > 1 and features.ndim > 1 and features.shape[1] == batch):
        must_be = f"a module whose output has the batch first, {batch} rows or a multiple"
        raise bad("layer", must_be, f"{layer!r}, whose output is shaped {tuple(features.shape)}")
    return features.reshape(batch, rows // batch, *features.shape[1:])


def _prepared(value: Any, dtype: torch.dtype | None, trainer_dtype: torch.dtype, batch: int, name: str) -> Any:
    """Conditioning as the encoder takes it: detached, with floats in ``dtype``, in new containers.

    The text follows the model's dtype, and so does what has the latents' dtype or is no wider than the model's. Class
    labels or rotary tables that the trainer keeps wider stay as they are. Ids, sizes and a number for each sample, such
    as a second time, are never narrowed, since bf16 cannot hold a number such as 1021.
    """
    again = partial(_prepared, dtype=dtype, trainer_dtype=trainer_dtype, batch=batch)
    if isinstance(value, dict | UserDict):
        new = copy.copy(value)  # of its own class, which may have attributes
        new.update({key: again(item, name=str(key)) for key, item in value.items()})
        return new
    if isinstance(value, Mapping):
        return {key: again(item, name=str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [again(item, name=name) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if dtype is not None and value.is_floating_point() and not name.endswith("ids"):
        number = name.endswith(("size", "coords", "resolution")) or value.shape == (batch,)
        wide = value.dtype == trainer_dtype and not number
        follows = name == "encoder_hidden_states" or wide or value.itemsize <= dtype.itemsize
        value = value.to(dtype) if follows else value
    return value
