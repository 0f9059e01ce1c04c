"""checks: what a bad argument is told: its name, what it must be and what it was. No value is read on an accelerator."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def bad(name: str, must_be: str, was: object, error: type[Exception] = ValueError) -> Exception:
    """The error for one argument, in the one form that every message of this library has."""
    return error(f"{name} must be {must_be}; it was {was}")


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    if value not in tuple(choices):
        raise bad(name, "one of " + ", ".join(sorted(map(repr, choices))), repr(value))


def check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise bad(name, "a positive number", repr(value))


def check_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise bad(name, "a tensor", type(value).__name__, TypeError)
    return value


def check_floating(name: str, value: object) -> Tensor:
    if not check_tensor(name, value).is_floating_point():
        raise bad(name, "a floating-point tensor", value.dtype, TypeError)  # type: ignore[attr-defined]
    return value  # type: ignore[return-value]


def check_like(name: str, value: object, reference_name: str, reference: Tensor) -> None:
    """Same shape, nothing broadcast, and same device."""
    shape = check_floating(name, value).shape  # type: ignore[union-attr]
    if shape != reference.shape:
        raise bad(name, f"shaped like {reference_name}, {_shape(reference)}", _shape(value))
    check_device(name, value, reference_name, reference)


def check_device(name: str, value: Tensor, reference_name: str, reference: Tensor) -> None:
    if value.device != reference.device:
        raise bad(name, f"on {reference_name}'s device, {reference.device}", f"on {value.device}")


def check_batch(name: str, value: object, batch: int) -> None:
    """One row per sample."""
    if check_tensor(name, value).ndim == 0 or len(value) != batch:  # type: ignore[arg-type]
        raise bad(name, f"one row per sample, {batch}", _shape(value))  # type: ignore[arg-type]


def check_errors(**errors: Tensor) -> None:
    """Per-sample errors: each (B,), floating point, of one length and on one device."""
    first, reference = next(iter(errors.items()))
    if check_floating(first, reference).ndim != 1:
        raise bad(first, "one error per sample, shape (B,)", _shape(reference))
    for name, value in errors.items():
        check_like(name, value, first, reference)


def check_latents(noisy_latents: Tensor, target: Tensor, shape: tuple[int | None, ...] | None, **predictions: Tensor) -> None:
    """One shape for all, that of noisy_latents; ``shape`` is what the model takes, None where any size will do."""
    actual = tuple(check_floating("noisy_latents", noisy_latents).shape)
    if shape is not None:
        if len(actual) != len(shape):
            raise bad("noisy_latents", f"{len(shape)}-dimensional, {_pattern(shape)}", _shape(noisy_latents))
        if any(want not in (None, was) for want, was in zip(shape, actual, strict=True)):
            raise bad("noisy_latents", f"shaped {_pattern(shape)}, as the model takes them", _shape(noisy_latents))
    for name, value in {"target": target, **predictions}.items():
        check_like(name, value, "noisy_latents", noisy_latents)


def check_timesteps(timesteps: Tensor, count: int) -> None:
    """Whole numbers in [0, count)."""
    if values_are_free(timesteps):
        low, high = timesteps.min().item(), timesteps.max().item()
        if low < 0 or high >= count:
            raise bad("timesteps", f"in [0, {count})", f"in [{low}, {high}]")
        if timesteps.is_floating_point() and not torch.equal(timesteps, timesteps.round()):
            raise bad("timesteps", "whole numbers", timesteps.tolist())


def check_pairs(name: str, value: Tensor | None) -> None:
    """The two halves of ``value`` agree, winner for loser; looked at only where looking is free."""
    if value is None or value.ndim == 0 or not values_are_free(value):
        return
    winners, losers = value.chunk(2)
    if not torch.equal(winners, losers):
        raise bad(name, "the same for both members of a pair (winners first, then losers)", "different")


def values_are_free(value: Tensor) -> bool:
    """Whether reading values costs no synchronisation: a real tensor on the host, outside a trace."""
    return value.device.type == "cpu" and type(value) is Tensor and value.numel() > 0 and not torch.compiler.is_compiling()


def _shape(value: Tensor) -> str:
    return f"shaped {tuple(value.shape)}"


def _pattern(shape: tuple[int | None, ...]) -> str:
    names = "BCHW" if len(shape) == 4 else "BCFHW"
    return "(" + ", ".join(str(size or name) for size, name in zip(shape, names, strict=True)) + ")"
