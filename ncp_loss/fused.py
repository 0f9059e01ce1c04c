"""fused: the two passes of error.py as Triton kernels, which read each feature once and make no float32 copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import bad

BLOCK = 1024  # elements that a program holds at a time: 8 for each of 128 threads, which is 16 bytes of bf16
ROUNDS = 8  # blocks whose sums a program adds up


@triton.jit
def _loaded(feature, row, at, size, wide: tl.constexpr):
    return tl.load(feature + row * size + at, mask=at < size, other=0.0).to(wide)


@triton.jit
def _coefficient(coefficients, point, wide: tl.constexpr):
    """The coefficient of a point in this program's row. ``coefficients`` is (points, rows)."""
    return tl.load(coefficients + point * tl.num_programs(1) + tl.program_id(1)).to(wide)


@triton.jit
def _combination(x0, x1, x2, x3, coefficients, POINTS: tl.constexpr, wide: tl.constexpr):
    total = _coefficient(coefficients, 0, wide) * x0 + _coefficient(coefficients, 1, wide) * x1
    if POINTS > 2:
        total += _coefficient(coefficients, 2, wide) * x2
    if POINTS > 3:
        total += _coefficient(coefficients, 3, wide) * x3
    return total


@triton.jit
def _fours(x):
    """Sums of four neighbours, which one thread holds. Accumulators then take a quarter of the registers."""
    return tl.sum(tl.reshape(x, [x.shape[0] // 4, 4]), 1)


@triton.jit
def sums_kernel(
    f0, f1, f2, f3, coefficients, partial, size, POINTS: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr
):
    """The first of two stages of :func:`sums`: partial[:, row, part] is a part of each sum. No atomics are used."""
    part, rows = tl.program_id(0), tl.num_programs(1)
    row = tl.program_id(1).to(tl.int64)
    wide: tl.constexpr = tl.float64 if f0.dtype.element_ty == tl.float64 else tl.float32
    model = tl.zeros([BLOCK // 4], wide)
    reference, excess = model, model
    start = part * ROUNDS * BLOCK
    for first in range(start, tl.minimum(start + ROUNDS * BLOCK, size), BLOCK):
        at = first + tl.arange(0, BLOCK)
        x0, x1 = _loaded(f0, row, at, size, wide), _loaded(f1, row, at, size, wide)
        x2 = _loaded(f2, row, at, size, wide) if POINTS > 2 else x0
        x3 = _loaded(f3, row, at, size, wide) if POINTS > 3 else x0
        w = _combination(x0, x1, x2, x3, coefficients, POINTS, wide)
        u = _combination(x0, x1, x2, x3, coefficients + POINTS * rows, POINTS, wide)
        model += _fours(w * w)
        reference += _fours((w - u) * (w - u))
        excess += _fours(u * (2 * w - u))
    place, apart = partial + row * tl.num_programs(0) + part, rows * tl.num_programs(0)
    tl.store(place, tl.sum(model))
    tl.store(place + apart, tl.sum(reference))
    tl.store(place + 2 * apart, tl.sum(excess))


@triton.jit
def combined_kernel(f0, f1, f2, f3, coefficients, out, size, POINTS: tl.constexpr, BLOCK: tl.constexpr):
    """out[row] = sum_i coefficients[i, row] f_i[row]."""
    row = tl.program_id(1).to(tl.int64)
    wide: tl.constexpr = tl.float64 if f0.dtype.element_ty == tl.float64 else tl.float32
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x0, x1 = _loaded(f0, row, at, size, wide), _loaded(f1, row, at, size, wide)
    x2 = _loaded(f2, row, at, size, wide) if POINTS > 2 else x0
    x3 = _loaded(f3, row, at, size, wide) if POINTS > 3 else x0
    total = _combination(x0, x1, x2, x3, coefficients, POINTS, wide)
    tl.store(out + row * size + at, total.to(out.dtype.element_ty), mask=at < size)


@torch.library.custom_op("ncp_loss::sums", mutates_args=())
def sums(features: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """The means of ``|w|^2``, ``|w - u|^2`` and ``u (2 w - u)`` over each sample.

    w and u are the features combined with ``coefficients[0]`` and ``coefficients[1]``. Sums are accumulated in float32
    or better, and are the same on every run.

    Args:
        features: the features at 2 to 4 points, (B, ...) each.
        coefficients: (2, points, B).

    Returns:
        (3, B).

    Raises:
        ValueError: the features are on a CPU, outside Triton's interpreter.
    """
    features, (_, points, rows) = _dense(features), coefficients.shape
    size = features[0][0].numel()
    parts = triton.cdiv(size, BLOCK * ROUNDS)
    partial = coefficients.new_empty(3, rows, parts)
    sums_kernel[(parts, rows)](*_four(features), coefficients.contiguous(), partial, size, points, BLOCK, ROUNDS)
    return partial.sum(-1).div_(size)


@sums.register_fake
def _(features: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    return coefficients.new_empty(3, coefficients.shape[2])


@torch.library.custom_op("ncp_loss::combined", mutates_args=())
def combined(features: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """``sum_i coefficients_i features_i`` in the features' dtype: 2 to 4 of (B, ...) and (points, B) -> (B, ...)."""
    features = _dense(features)
    out, size = torch.empty_like(features[0]), features[0][0].numel()
    grid = (triton.cdiv(size, BLOCK), len(features[0]))
    combined_kernel[grid](*_four(features), coefficients.contiguous(), out, size, len(features), BLOCK)
    return out


@combined.register_fake
def _(features: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    return torch.empty_like(_dense(features)[0])


def _four(features: Sequence[Tensor]) -> list[Tensor]:
    """Four features, as the kernels take. Those past the number of points are not read."""
    return [*features, *[features[0]] * (4 - len(features))]


def _dense(features: Sequence[Tensor]) -> Sequence[Tensor]:
    """The features in one order in memory, each sample's elements together, since the kernels see rows of numbers."""
    first = features[0]
    if first.device.type == "cpu" and isinstance(sums_kernel, triton.JITFunction):
        raise bad("impl", "'eager' on a CPU", "'triton'")
    orders = [torch.contiguous_format, *({4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(first.ndim, []))]
    if any(all(x.is_contiguous(memory_format=order) for x in features) for order in orders):
        return features
    return [x.contiguous() for x in features]
