"""fused: the two passes of error.py as Triton kernels, which read features once and keep no float32 copy of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import bad

BLOCK = 1024  # elements that a program holds at a time: 8 for each of 128 threads, 16 bytes of bf16
ROUNDS = 8  # blocks that a program adds up


@triton.jit
def square_kernel(plus, minus, partial, size, HAS_MINUS: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    """partial[b, j]: the j-th part of sum |plus_b - minus_b|^2, the first of two stages; no atomics."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    wide: tl.constexpr = tl.float64 if plus.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([BLOCK], wide)
    start = part * ROUNDS * BLOCK
    for first in range(start, tl.minimum(start + ROUNDS * BLOCK, size), BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(plus + row * size + at, mask=at < size, other=0.0).to(wide)
        if HAS_MINUS:
            x -= tl.load(minus + row * size + at, mask=at < size, other=0.0).to(wide)
        total += x * x
    tl.store(partial + row * tl.num_programs(0) + part, tl.sum(total))


@triton.jit
def difference_kernel(plus, minus, slope, out, size, HAS_MINUS: tl.constexpr, BLOCK: tl.constexpr):
    """out_b = slope_b * (plus_b - minus_b)."""
    row = tl.program_id(1).to(tl.int64)
    wide: tl.constexpr = tl.float64 if plus.dtype.element_ty == tl.float64 else tl.float32
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(plus + row * size + at, mask=at < size, other=0.0).to(wide)
    if HAS_MINUS:
        x -= tl.load(minus + row * size + at, mask=at < size, other=0.0).to(wide)
    x *= tl.load(slope + row).to(wide)
    tl.store(out + row * size + at, x.to(out.dtype.element_ty), mask=at < size)


@torch.library.custom_op("ncp_loss::mean_square", mutates_args=())
def mean_square(plus: Tensor, minus: Tensor | None) -> Tensor:
    """``mean |plus_b - minus_b|^2``: (B, ...) -> (B,), accumulated in float32 at least, the same on every run."""
    plus, minus = _dense(plus, minus)
    size = plus[0].numel()
    parts = triton.cdiv(size, BLOCK * ROUNDS)
    partial = plus.new_empty(len(plus), parts, dtype=_wide(plus))
    square_kernel[(parts, len(plus))](plus, minus, partial, size, minus is not None, BLOCK=BLOCK, ROUNDS=ROUNDS)
    return partial.sum(1).div_(size)


@mean_square.register_fake
def _(plus: Tensor, minus: Tensor | None) -> Tensor:
    return plus.new_empty(len(plus), dtype=_wide(plus))


@torch.library.custom_op("ncp_loss::scaled_difference", mutates_args=())
def scaled_difference(plus: Tensor, minus: Tensor | None, slope: Tensor) -> Tensor:
    """``slope_b (plus_b - minus_b)`` in the features' dtype: (B, ...), (B, ...), (B,) -> (B, ...)."""
    plus, minus = _dense(plus, minus)
    out, size = torch.empty_like(plus), plus[0].numel()
    grid = (triton.cdiv(size, BLOCK), len(plus))
    difference_kernel[grid](plus, minus, slope.contiguous(), out, size, minus is not None, BLOCK=BLOCK)
    return out


@scaled_difference.register_fake
def _(plus: Tensor, minus: Tensor | None, slope: Tensor) -> Tensor:
    return torch.empty_like(_dense(plus, minus)[0])


def _dense(plus: Tensor, minus: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both in one order in memory, whichever, a sample after the other: the kernels see rows of numbers."""
    if plus.device.type == "cpu" and isinstance(square_kernel, triton.JITFunction):
        raise bad("impl", "'auto' or 'eager' on a CPU", "'triton'")
    both = [plus] if minus is None else [plus, minus]
    orders = [torch.contiguous_format, *({4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(plus.ndim, []))]
    if not any(all(x.is_contiguous(memory_format=order) for x in both) for order in orders):
        both = [x.contiguous() for x in both]
    return both[0], None if minus is None else both[1]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
