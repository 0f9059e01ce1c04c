"""layers: finds the layers whose output the features are, keeps what they return, and ends the pass at the last."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from .checks import bad, check_number
from .tensors import Features

Layers = str | Sequence[str] | Mapping[str, float]

# The order in which the modules of a diffusers model run, whatever order they were registered in. It shows which
# weights are used only after the last wanted layer, and need no copy. A name that is missing here costs memory. A model
# that runs in another order is refused by _out_of_order. Neither makes a wrong result.
_ORDER = (
    *("down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out"),
    *("transformer_blocks", "single_transformer_blocks", "norm_out", "proj_out"),
)
# Chunked feed-forward, slicing and tiling call the layers inside them with a part of a sample at a time.
_WHOLE = {"_chunk_size": None, "use_slicing": False, "use_tiling": False}
# torch before 2.7 does not distinguish an export from a compilation.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def wanted_layers(view: nn.Module, layers: Layers) -> tuple[dict[str, float], dict[str, str]]:
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


def split_by_order(view: nn.Module, ends: Mapping[str, str]) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
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


def _runs_after(name: str, end: str) -> bool:
    """Whether module ``name`` runs only after module ``end``, by the first two parts of their paths."""
    (a, i), (b, j) = ((parts[0], parts[1] if len(parts) > 1 else "") for parts in (name.split("."), end.split(".")))
    if a == b:  # blocks of one list run in the list's order
        return i.isdigit() and j.isdigit() and int(i) > int(j)
    return a in _ORDER and b in _ORDER and _ORDER.index(a) > _ORDER.index(b)


def see_samples_whole(view: nn.Module, ends: Mapping[str, str]) -> None:
    """Switch off, in each module around or at a wanted layer, what would call the layer with a part of a sample."""
    for name, module in view.named_modules(remove_duplicate=False):
        if not name or any(f"{end}.".startswith(f"{name}.") for end in ends.values()):
            vars(module).update({key: value for key, value in _WHOLE.items() if key in vars(module)})


class LastLayerReached(Exception):  # no error, so its name does not say Error
    """Ends the view's forward pass when the last wanted layer has run. It is caught around that pass."""


@dataclass
class Pass:
    """The state of the view's forward pass, which the hooks on its layers share."""

    wanted: int  # how many layers are wanted
    kept: Features | None = None  # the features kept so far; None while no pass runs
    runs_on: bool = False  # whether the pass runs on after the last wanted layer, to see if a layer is called again
    called_again: str = ""  # such a layer
    # A list with one token, which only one thread can take. A lock could not be copied or pickled.
    token: list[None] = field(default_factory=lambda: [None])


class _Tap:
    """A forward hook that keeps a layer's output, and ends the pass when the outputs of all wanted layers are kept."""

    def __init__(self, layer: str, state: Pass, module: nn.Module) -> None:
        self.layer, self.state = layer, state
        self.image_index: int | None = None  # which of several outputs was the image's, once that was clear
        names = list(inspect.signature(type(module).forward).parameters)
        self.position = names.index("hidden_states") - 1 if "hidden_states" in names else None

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        kept, wanted = self.state.kept, self.state.wanted
        if kept is None:  # no pass runs: a checkpoint runs the layer again in backward
            return
        if self.layer in kept:  # the first output counts
            if self.state.runs_on:
                self.state.called_again = self.layer
            return
        features = self._image_stream(args, kwargs, output)
        if features is None:
            self.state.kept = None  # _several_streams runs the module once more, in which no tap may act
            raise self._several_streams(module, args, kwargs, output)
        # If the pass goes on, the model may still change this tensor in place, as it adds a T2I-Adapter's residuals.
        goes_on = len(kept) + 1 < wanted or self.state.runs_on
        kept[self.layer] = features.clone() if goes_on else features
        # An exporter keeps a stack of the modules that it is in, and an exception would leave this unbalanced. So the
        # pass runs on there, and the exporter removes the rest as dead code.
        if not goes_on and not is_exporting():
            raise LastLayerReached

    def _image_stream(self, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        """The output, or the one of several outputs that has the shape of the image's input; None if that is unclear.

        A U-Net block returns its hidden states and a tuple for skip connections. A transformer block with two streams
        returns the text's and the image's, in either order. The image's input is ``hidden_states``, by name or
        position, or else the only input tensor of three dimensions or more. Where text and image have equal shapes,
        the image's output is the one that it was in an earlier call.
        """
        outputs = output if isinstance(output, tuple) else (output,)
        if len(outputs) > 1 and isinstance(outputs[0], Tensor) and isinstance(outputs[1], tuple):
            return outputs[0]  # a U-Net block's, some of which return another tensor after the skip connections
        places = [i for i, x in enumerate(outputs) if isinstance(x, Tensor)]
        if len(places) > 1:
            by_position = args[self.position] if self.position is not None and self.position < len(args) else None
            image = kwargs.get("hidden_states", by_position)
            inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 2]
            images = inputs if image is None else [image]
            places = [i for i in places if len(images) == 1 and outputs[i].shape == images[0].shape]
            if len(places) == 1:
                self.image_index = places[0]
            elif self.image_index in places:
                places = [self.image_index]
        # A U-Net block returns its hidden states before the tuple of skip connections. A tensor after it is not they.
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


def tapped(view: nn.Module, ends: Mapping[str, str], later: Mapping[str, nn.Module]) -> Pass:
    """Put a tap on each wanted layer, and a guard on each module that should not run; the pass that they serve."""
    state = Pass(len(ends))
    for layer, end in ends.items():
        module = view.get_submodule(end)
        module.register_forward_hook(_Tap(layer, state, module), with_kwargs=True)
    for name, module in later.items():
        module.register_forward_pre_hook(partial(_out_of_order, name=name, state=state))
    return state


def _out_of_order(module: nn.Module, args: Any, name: str, state: Pass) -> None:
    """A pre-hook that refuses a module which should run later only: its weights are neither copied nor watched."""
    if state.kept is not None and len(state.kept) < state.wanted:
        must_be = f"a module that has run when {name!r} begins, as in diffusers' models of such names"
        raise bad("layer", must_be, "one that runs later")


def one_row_a_sample(layer: str, features: Tensor, batch: int) -> Tensor:
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
