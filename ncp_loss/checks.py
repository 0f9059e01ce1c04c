"""checks: a message for each bad argument: its name, what it must be and what it was."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# No check reads a value on an accelerator: that would make the host wait for the device.
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def bad(name: str, must_be: str, was: object, error: type[Exception] = ValueError) -> Exception:
    """The error for one argument, in the one form that every message of this library has."""
    return error(f"{name} must be {must_be}; it was {was}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """One of ``choices``, and of the type of one: 1 is not True, and an array is compared with nothing."""
    if not isinstance(value, tuple(map(type, choices))) or value not in choices:
        raise bad(name, "one of " + ", ".join(sorted(map(repr, choices))), _of(value))


def check_number(
    name: str, value: object, must_be: str = "a positive number", fits: Callable[[float], bool] = lambda x: x > 0
) -> float:
    """A finite real number for which ``fits`` holds: of Python, of NumPy, or a 0-dim tensor on the host; not a bool."""
    if isinstance(value, Tensor) and value.ndim == 0 and values_are_free(value):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise bad(name, must_be, _of(value), TypeError)
    if not (abs(value) <= sys.float_info.max and fits(value)):  # type: ignore[operator, arg-type]
        raise bad(name, must_be, repr(value))
    return float(value)


def check_no_reference(model_kwargs: Mapping[str, object]) -> None:
    for name in sorted({"ref_pred", "ref_error", "pairs"} & model_kwargs.keys()):
        raise bad(name, "given to ncp.errors(...), or a reference to ncp_dpo_loss(...)", "given elsewhere", TypeError)


def check_generator(value: object) -> None:
    if not isinstance(value, torch.Generator | None):
        raise bad("generator", "a torch.Generator or None", _of(value), TypeError)


def check_count(name: str, value: object, must_be: str, *others: str | None) -> None:
    """A positive int that fits into 64 bits, or one of ``others``."""
    counts = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= sys.maxsize
    if not counts and not (isinstance(value, str | None) and value in others):
        raise bad(name, must_be, _of(value))


def check_flag(name: str, value: object) -> None:
    check_choice(name, value, (False, True))


def check_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise bad(name, "a tensor", type(value).__name__, TypeError)
    if value.layout is not torch.strided or value.is_nested:
        raise bad(name, "a dense tensor", "nested" if value.is_nested else value.layout, TypeError)
    return value


def check_floating(name: str, value: object) -> Tensor:
    tensor = check_tensor(name, value)
    if not tensor.is_floating_point() or tensor.itemsize == 1:
        raise bad(name, "a floating-point tensor of 16 bits or more", tensor.dtype, TypeError)
    return tensor


def check_numbers(name: str, value: object) -> Tensor:
    tensor = check_tensor(name, value)
    if tensor.dtype not in _INTEGERS and (not tensor.is_floating_point() or tensor.itemsize == 1):
        must_be = "of int8 to int64, uint8 or a floating-point dtype of 16 bits or more"
        raise bad(name, must_be, tensor.dtype, TypeError)
    return tensor


def check_like(name: str, value: object, reference_name: str, reference: Tensor) -> Tensor:
    """A floating-point tensor with the shape and the device of ``reference``. Nothing is broadcast."""
    return check_shaped(name, check_floating(name, value), reference_name, reference)


def check_shaped(name: str, value: Tensor, reference_name: str, reference: Tensor) -> Tensor:
    """A tensor of any dtype with the shape and the device of ``reference``. Nothing is broadcast."""
    if value.shape != reference.shape:
        raise bad(name, f"shaped like {reference_name}, {_shape(reference)}", _shape(value))
    return check_device(name, value, reference_name, reference)


def check_device(name: str, value: Tensor, reference_name: str, reference: Tensor) -> Tensor:
    if value.device != reference.device:
        raise bad(name, f"on the device of {reference_name}, {reference.device}", f"on {value.device}")
    return value


def check_rows(name: str, value: object, latents: Tensor, *shape: int | str) -> Tensor:
    """A tensor with one row for each sample, each of ``shape`` if that is given. A name in it stands for any size."""
    tensor = check_tensor(name, value)
    if tensor.ndim == 0 or len(tensor) != len(latents):
        raise bad(name, f"one row per sample, {len(latents)}", _shape(tensor))
    sizes = [was if isinstance(want, str) else want for want, was in zip(shape, tensor.shape[1:], strict=False)]
    if shape and (tensor.ndim != 1 + len(shape) or list(tensor.shape[1:]) != sizes):
        raise bad(name, f"shaped (B, {', '.join(map(str, shape))})", _shape(tensor))
    return check_device(name, tensor, "noisy_latents", latents)


def check_errors(**errors: Tensor) -> None:
    """Per-sample errors: floating-point tensors (B,) of one length and on one device, with B of 1 or more."""
    first, reference = next(iter(errors.items()))
    if check_floating(first, reference).ndim != 1 or len(reference) == 0:
        raise bad(first, "one error per sample, shape (B,), of one or more", _shape(reference))
    for name, value in errors.items():
        check_like(name, value, first, reference)


def check_latents(
    name: str, latents: Tensor, channels: int | None, pairs: bool = False, **others: Tensor | None
) -> None:
    """Latents as the model takes them, and other tensors of the same shape.

    ``channels`` is None if the model's first layer is no convolution. Then two dimensions or more will do.
    """
    shape = check_floating(name, latents).shape
    if channels is not None and (len(shape) != 4 or shape[1] != channels):
        must_be = f"shaped (B, {channels}, H, W), as the model takes them (or pass `call`, which makes such of others)"
        raise bad(name, must_be, _shape(latents))
    if len(shape) < 2 or shape[0] == 0:
        raise bad(name, "a batch of one row or more", _shape(latents))
    if pairs and shape[0] % 2:
        raise bad(name, "an even batch: winners first, then their losers", _shape(latents))
    for other, value in others.items():
        if value is not None or other in ("target", "model_pred"):
            check_like(other, value, name, latents)


def expand_timesteps(timesteps: Tensor, latents: Tensor) -> Tensor:
    """One timestep for each sample: 0-dim or (B,) -> (B,)."""
    t = check_device("timesteps", check_numbers("timesteps", timesteps), "noisy_latents", latents)
    t = t.expand(len(latents)) if t.ndim == 0 else t
    if t.shape != (len(latents),):
        raise bad("timesteps", f"0-dimensional or of shape ({len(latents)},)", f"of shape {tuple(t.shape)}")
    return t


def check_timesteps(timesteps: Any, count: float, whole: bool = True, low: float = 0) -> Tensor:
    """Whole numbers in [low, count), or any numbers in [low, count]: a tensor, or what a tensor can be made of."""
    try:
        t = timesteps if isinstance(timesteps, Tensor) else torch.as_tensor(timesteps, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise bad("timesteps", "a tensor", type(timesteps).__name__, TypeError) from None
    t = check_numbers("timesteps", t)
    if values_are_free(t):
        least, most = t.min().item(), t.max().item()
        if not (least >= low and most <= count) or (whole and most == count):
            raise bad("timesteps", f"in [{low}, {count}{')' if whole else ']'}", f"in [{least}, {most}]")
        if whole and t.is_floating_point() and not torch.equal(t, t.round()):
            raise bad("timesteps", "whole numbers", t.tolist())
    return t


def check_pairs(shared: Mapping[str, Tensor | None]) -> None:
    """Tensors whose halves, of winners and of losers, are equal. NaN equals NaN. Only values on the host are read."""
    for name, value in shared.items():
        if value is not None and values_are_free(value):
            winners, losers = value.chunk(2)
            if not torch.allclose(winners, losers, rtol=0, atol=0, equal_nan=True):
                raise bad(name, "the same for both members of a pair (winners first, then losers)", "different")


def values_are_free(value: Tensor) -> bool:
    """Whether values can be read at no cost: the tensor is on the host, is no tracer's, and has elements."""
    readable = value.device.type == "cpu" and type(value) is Tensor and value.numel() > 0
    return readable and not torch.compiler.is_compiling()


def _of(value: object) -> str:
    """The value itself if it is short to print, or else the name of its type."""
    return repr(value) if isinstance(value, str | numbers.Number | None) else type(value).__name__


def _shape(value: Tensor) -> str:
    return f"shaped {tuple(value.shape)}"
