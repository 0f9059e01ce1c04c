"""watch: raises an error when weights that a view shares with the user's model are no longer the base model's."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from .base import Link, check_base, is_sharded, layers_inside, merged_into
from .checks import bad


@dataclass
class _Weight:
    """A tensor of the user's model with which the view computes, and how it was when last looked at."""

    path: str
    home: Mapping[str, Tensor | None]  # the module's dictionary, in which the tensor stands at `key`
    key: str
    tensor: Tensor
    kind: Any = None  # device and dtype
    state: Any = None  # version and address; None before the first call, and in a copy
    sums: Tensor | None = None  # weighted sums of its rows at the first call
    last: Tensor | None = None  # the same when last looked at
    coarsest: float = 0.0  # the rounding of the coarsest dtype that it has had
    exact: bool = False  # whether rounding, as of a merge that was undone, would explain no difference now
    writes: int = 0  # calls in a row before which the same values were written
    rewritten: bool = False  # whether something keeps doing that, so that its version means nothing

    @property
    def now(self) -> Tensor:
        tensor = self.home[self.key]
        assert tensor is not None  # see Watch._differs
        return tensor

    def forget(self) -> None:
        """Have the values compared at the next call, if they can be, since another layer holds them now."""
        if self.sums is not None:
            self.state, self.exact = None, True


class Watch:
    """Raises an error when the weights that a view shares are no longer the base model's.

    Each call compares what can be compared without reading a value: which tensors and layers are there, and each
    tensor's version and address. If one of these differs, values decide, since weights that are loaded again, moved to
    another device or restored after a merge have not changed. Weighted sums of each tensor's rows are compared with
    those at the first call. Those at construction would be too early: DDP, when it wraps a model, writes the first
    process's weights into those of the others.
    """

    def __init__(
        self, used: Mapping[str, nn.Module], shared: Mapping[str, nn.Module], links: list[Link], name: str = "unet"
    ) -> None:
        twins = {id(module) for module in used.values()}
        self.name, self.layer_replaced = name, False
        self.processor_replaced = False  # whether the view has taken over a new processor; the encoder resets it
        self._links = [link for link in links if id(link.twin) in twins]
        self._parents = {id(link.modules) for link in self._links}
        self._merges: list[tuple[str, list[Any]]] = []
        self._of_module = {id(module): list(_weights(path, module)) for path, module in shared.items()}
        for link in self._links:
            self._recheck(link, link.layers)
        self._listen()

    def __call__(self, *_: Any) -> None:
        """Check, as a forward pre-hook of the view. A compiled call checks nothing."""
        if not torch.compiler.is_compiling():
            self.check()

    def check(self) -> None:
        """Raise if a shared tensor became trainable or changed, or if an adapter was merged into one."""
        for path, merged in self._merges:
            if merged:
                raise merged_into(path, self.name)
        # Adapters come and go around a layer. A place that holds other layers than before has its weights compared.
        for i, link in enumerate(self._links):
            layer = link.modules.get(link.key)
            layers = () if layer is None else layers_inside(layer, link.path, self.name)
            forward, processor = (vars(layers[-1]).get(key) if layers else None for key in ("forward", "processor"))
            if processor is not link.processor and vars(link.twin).get("processor") is link.processor:
                vars(link.twin)["processor"] = processor  # unless the view was given one of its own
                self.processor_replaced = True
            if layers != link.layers or forward != link.forward or processor is not link.processor:
                self._recheck(link, layers)
                self._links[i] = link._replace(layers=layers, forward=forward, processor=processor)
            if id(link.twin) in self._of_module:  # a layer with copied weights may do as it likes
                self._check_there(link, layers[-1] if layers else None)
        if self.layer_replaced:  # a layer was replaced, perhaps for an adapter that was added, merged and removed again
            for weight in self._weights():
                weight.forget()
        looked = [weight for weight in self._weights() if self._differs(weight)]
        for weight in looked:
            if is_sharded(weight.now):
                raise self._changed(weight.path, "was sharded over processes")
        if looked:
            self._check_layers()  # before anything is noted, so that it raises at the next call too
        for weight in looked:
            self._compare(weight)
        self.layer_replaced = False

    def _check_there(self, link: Link, now: nn.Module | None) -> None:
        """Raise if a layer is gone, or another one than when the view was made, or has new layers inside."""
        if now is None:
            raise self._changed(link.path, "was removed")
        if now is not link.base and not (now._parameters and _same_objects(now._parameters, link.base._parameters)):
            raise self._changed(link.path, "was replaced by another layer")
        # Which layers diffusers' forward passes use depends on which there are, such as an IP-Adapter's.
        new = now._modules.keys() - link.twin._modules.keys() if self.layer_replaced else ()
        if new and type(now).__module__.startswith("diffusers."):
            raise self._changed(link.path, f"got new layers, {sorted(new)}")

    def note_replaced(self, parent: nn.Module) -> None:
        """Note that a layer of ``parent`` has been replaced."""
        self.layer_replaced |= id(parent._modules) in self._parents

    def _weights(self) -> Iterator[_Weight]:
        return (weight for weights in self._of_module.values() for weight in weights)

    def _differs(self, weight: _Weight) -> bool:
        """Whether another tensor stands there, or the same one has been written to or moved."""
        now = weight.home.get(weight.key)
        if now is None or now.requires_grad:
            raise self._changed(weight.path, "was removed" if now is None else "became trainable")
        differs = now is not weight.tensor or _state(now, weight.rewritten) != weight.state
        weight.writes = weight.writes if differs else 0
        return differs

    def _recheck(self, link: Link, layers: tuple[nn.Module, ...]) -> None:
        """Have the weights' values compared, since other layers wrap them now, and note which are rewritten."""
        weights = self._of_module.get(id(link.twin), [])
        lost = set(link.layers[:-1]) - set(layers)
        for weight in weights:
            if lost and weight.sums is None:
                raise self._changed(weight.path, "lost its adapter, which may have been merged into it")
            weight.forget()
            # PEFT's target_parameters parametrizes the weight while the model runs, and so writes to it in each pass.
            weight.rewritten = any(vars(layer).get("parameter_name") == weight.key for layer in layers[:-1])

    def _compare(self, weight: _Weight) -> None:
        """Compare the values of a weight with those at the first call, and remember its state as it is now."""
        now = weight.now
        # Nothing was kept before the first call. In a copy the state is lost, but the sums are not.
        first, is_parameter = weight.sums is None and weight.state is None, isinstance(now, nn.Parameter)
        sums, kind = _row_sums(now), (now.device, now.dtype)
        weight.coarsest = max(weight.coarsest, _rounding(now.dtype))
        if not first and not _same(weight, sums, kind):
            hint = "" if is_parameter else " (where the model's own forward does that, hand over copy.deepcopy(model))"
            raise self._changed(weight.path, "was changed" + hint)
        if not first and now is weight.tensor and not is_parameter:
            weight.writes += 1
            weight.rewritten |= weight.writes > 2  # as DDP writes the first process's buffers at every step
        weight.sums, weight.last = sums if weight.sums is None else weight.sums, weight.last if sums is None else sums
        weight.tensor, weight.kind, weight.exact = now, kind, False
        weight.state = _state(now, weight.rewritten)

    def _check_layers(self) -> None:
        """Check again what construction checked, since something has changed."""
        for link in self._links:
            if link.layers:
                check_base(link.layers[-1], link.path, self.name)
        first: tuple[str, torch.device] | None = None
        for weight in self._weights():
            if isinstance(now := weight.now, nn.Parameter):
                first = first or (weight.path, now.device)
                if now.device != first[1]:
                    a, b = (f"{path} on {device}" for path, device in (first, (weight.path, now.device)))
                    raise bad(self.name, "on one device, not offloaded in part", f"{a}, {b}")

    def _changed(self, path: str, what: str) -> RuntimeError:
        of_loss = self.name == "unet"
        sharing, again = ("the loss", "Build the loss") if of_loss else ("the view", "Call frozen_view")
        return RuntimeError(
            f"{self.name}'s base weights must stay as they were at the first call of {sharing}, which shares them: "
            f"{path or 'the model'} {what}. {again} again; where weights are trainable or sharded by then, it keeps a "
            "copy of the part it needs"
        )

    def _listen(self) -> None:
        _hear_of_replaced_layers()
        _WATCHES.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """The state for a copy. The copy watches its own weights.

        It has no links, which would take the user's whole model along. Of the model's adapters it keeps only the lists
        of those that are merged, to refuse a copy into which one is merged.
        """
        layers = [(link.path, layer) for link in self._links for layer in link.layers]
        merges = [
            (path, merged) for path, layer in layers if (merged := vars(layer).get("merged_adapters")) is not None
        ]
        return vars(self) | {"_links": [], "_parents": set(), "_merges": self._merges + merges}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for weight in self._weights():
            weight.state = None
        self._listen()


_WATCHES: weakref.WeakSet[Watch] = weakref.WeakSet()


@functools.cache
def _hear_of_replaced_layers() -> None:
    """Notify every watch, from now on, when a layer is put in the place of another.

    An adapter that is added, merged and unloaded between two calls leaves every layer as it was, but not the weights.
    PEFT writes to these through ``.data``, which changes no version. Only the replacement of layers shows it.
    """

    def note(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        for watch in tuple(_WATCHES):
            watch.note_replaced(parent)

    register_module_module_registration_hook(note)


def _weights(path: str, module: nn.Module) -> Iterator[_Weight]:
    """The parameters, and the buffers that a state_dict holds. Others are computed, as tables of positions are."""
    for home in (module._parameters, module._buffers):
        for key, tensor in home.items():
            if tensor is not None and key not in module._non_persistent_buffers_set:
                yield _Weight(f"{path}.{key}".lstrip("."), home, key, tensor)


def _has_values(tensor: Tensor) -> bool:
    """Whether the tensor is a plain one, whose values can be read: not packed by a quantiser, fake, or on "meta"."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta


def _state(tensor: Tensor, rewritten: bool) -> tuple[int, int]:
    """The version, which counts writes, and the address. Both are on the host, and cost nothing to read."""
    version = 0 if rewritten or tensor.is_inference() else tensor._version
    return version, tensor.data_ptr() if _has_values(tensor) else 0


def _same_objects(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(ours[key] is theirs[key] for key in ours)


@torch.no_grad()
def _row_sums(tensor: Tensor) -> Tensor | None:
    """Weighted sums of a tensor's rows and its norm, in float32 or better, on its device; None if it has no values.

    They take about a thousandth of the tensor's memory, and computing them does not make the host wait. Equal weights
    would not tell columns that change places. The norm is the scale of rounding where the sums happen to be small.
    """
    if not _has_values(tensor):
        return None
    sums = tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32, copy=tensor.ndim < 2)
    if tensor.ndim > 1:
        rows = sums.flatten(1)
        places = torch.arange(rows.shape[1], device=rows.device, dtype=rows.dtype)
        sums = torch.cat([(rows * places.cos()).sum(1), rows.norm().view(1)])
    return sums if _has_values(sums) else None


def _rounding(dtype: torch.dtype) -> float:
    """What rounding to a dtype may change of a value, relative to it; the checksums' own rounding at least."""
    return max(torch.finfo(dtype).eps / 2 if dtype.is_floating_point else 0, 1e-6)


@torch.no_grad()
def _same(weight: _Weight, sums: Tensor | None, kind: tuple[torch.device, torch.dtype]) -> bool:
    """Whether the values are those of the last look, but for rounding. The host waits for the answer.

    Rounding happens in a cast, and where a merge was undone. A merge whose adapter was unloaded differs by no more in
    half precision, and so no rounding is allowed for once the layers around a weight have changed.
    """
    if weight.sums is None or weight.last is None or sums is None:
        # There are no values to compare. A move or a cast explains the change; without one the tensor was written to.
        return bool(weight.kind != kind)
    cast = kind[1] != weight.kind[1]
    lately = max(_rounding(kind[1]), _rounding(weight.kind[1])) if cast or not weight.exact else 1e-6
    near = [_near(sums, weight.last, lately), _near(sums, weight.sums, weight.coarsest)]  # roundings add up
    return bool(near[0] & near[1])


def _near(sums: Tensor, then: Tensor, share: float) -> Tensor:
    then = then.to(sums)
    return (sums - then).norm() <= share * then.norm() if then.shape == sums.shape else torch.tensor(False)
