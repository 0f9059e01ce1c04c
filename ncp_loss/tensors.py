"""tensors: small helpers for batches that any file may use: shapes, dtypes, and a few samples at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from .checks import bad

Features = dict[str, Tensor]  # by layer, one row for each sample
F = TypeVar("F", bound=Callable[..., Any])


def per_sample(coefficient: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), so that one number per sample multiplies a batch shaped like ``like``."""
    return coefficient.reshape(-1, *[1] * (like.ndim - 1))


def at_least_float32(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: the widest of the tensors' own, and no narrower than float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on the one kind of device that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def constant_to_compilers(function: F) -> F:
    """Have ``torch.compile`` call ``function`` while it traces, and take the result as a constant.

    This is what ``torch.compiler.assume_constant_result`` does, which imports the compiler with the library.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def chunks_of(batch: int, size: int, groups: int) -> Iterator[Callable[[Any], Any]]:
    """Functions that each take the next few samples from a tensor or a mapping of tensors, until all are taken.

    In a batch of two groups, winners and losers, a chunk holds whole pairs, and at least one.
    """
    per_group = max(size // groups, 1)
    for first in range(0, batch // groups, per_group):
        yield partial(_rows_of, rows=slice(first, first + per_group), groups=groups, batch=batch)


def joined(parts: Sequence[Any], groups: int) -> Any:
    """The chunks' results, put together in the order of the batch; None where there are none."""
    return None if parts[0] is None else torch.cat([x.unflatten(0, (groups, -1)) for x in parts], 1).flatten(0, 1)


def _rows_of(value: Any, rows: slice, groups: int, batch: int, name: str = "") -> Any:
    """Some samples of ``value``. What does not have the batch first could only be split by a guess, and is refused."""
    if isinstance(value, Mapping):
        return {k: _rows_of(v, rows, groups, batch, f"{name}[{k!r}]" if name else k) for k, v in value.items()}
    if isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch:
        return value.unflatten(0, (groups, -1))[:, rows].flatten(0, 1)
    if value is None or isinstance(value, bool | int | float | str) or (isinstance(value, Tensor) and value.ndim == 0):
        return value
    was = f"shaped {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise bad(name, f"a tensor with the batch first, {batch} rows, where chunk_size is set", was)
