"""What a network computes in: dtypes, autocast, and TF32, which a CPU has to imitate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ncp_loss.difference import Estimator, choose


class Compute(NamedTuple):
    """The dtype of the weights, and what surrounds a forward pass."""

    label: str
    weights: torch.dtype
    autocast: torch.dtype | None = None
    tf32: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """What matrix products are computed in."""
        return self.autocast or self.weights

    def forward(self, device: torch.device) -> AbstractContextManager[Any]:
        """For the forward pass; on a GPU, ``flags`` does TF32."""
        if self.autocast:
            return _autocast(device, self.autocast)
        return ImitatedTF32() if self.tf32 and device.type == "cpu" else nullcontext()

    @contextlib.contextmanager
    def flags(self) -> Iterator[None]:
        """TF32 on a GPU, forward and backward: on or off for as long as this lasts."""
        backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
        before = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = "tf32" if self.tf32 else "ieee"
        try:
            yield
        finally:
            for backend, value in zip(backends, before, strict=True):
                backend.fp32_precision = value

    def estimator(self, difference: str, device: torch.device) -> Estimator:
        """What the library takes for this type; where TF32 is imitated, what it would take on a GPU."""
        with self.flags():
            return choose(difference, self.dtype, torch.device("cuda") if self.tf32 else device)


COMPUTES = {
    "float64": Compute("float64", torch.float64),
    "float32": Compute("float32", torch.float32),
    "tf32": Compute("TF32", torch.float32, tf32=True),
    "float16": Compute("float16", torch.float16),
    "bfloat16": Compute("bfloat16", torch.bfloat16),
    "autocast-bf16": Compute("fp32 weights\nunder bf16\nautocast", torch.float32, torch.bfloat16),
    "bf16-fp16": Compute("bf16 weights\nunder fp16\nautocast", torch.bfloat16, torch.float16),
}


def _autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    stack = contextlib.ExitStack()
    stack.enter_context(torch.autocast(device.type, dtype))
    if device.type == "cpu":
        stack.enter_context(FullNorms())
    return stack


class FullNorms(TorchFunctionMode):
    """Norms and softmax take and return float32, as under CUDA's autocast; the CPU's leaves them in half precision."""

    _FULL = frozenset({F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax})

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self._FULL:
            return func(*args, **(kwargs or {}))
        full = [x.float() if isinstance(x, Tensor) else x for x in args]
        return func(*full, **{k: x.float() if isinstance(x, Tensor) else x for k, x in (kwargs or {}).items()})


class ImitatedTF32(TorchFunctionMode):
    """Float32 in which what enters a matrix product has a mantissa of 10 bits, rounded to nearest; sums stay float32.

    Covers linear layers, convolutions, matrix products and attention (written out as two products and a softmax), in
    forward and in backward (the gradient that enters the two products of a backward pass is rounded, and so are the
    saved operands). Everything else is float32, as on a GPU.
    """

    _PRODUCTS = frozenset({F.linear, F.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm})

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return _product(func, *args, **kwargs) if func in self._PRODUCTS else func(*args, **kwargs)


def _product(func: Callable[..., Tensor], a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _RoundGradient.apply(func(_Round.apply(a), _Round.apply(b), *args, **kwargs))  # type: ignore[no-any-return]


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    scores = _product(torch.matmul, query, key.transpose(-1, -2)) / query.shape[-1] ** 0.5
    if attn_mask is not None:
        scores = scores + attn_mask
    return _product(torch.matmul, scores.softmax(-1), value)


def _tf32(x: Tensor) -> Tensor:
    """To 11 significant bits, rounded to nearest (Veltkamp's splitting)."""
    high = x * (2.0**13 + 1)
    return high - (high - x)


class _Round(torch.autograd.Function):
    """Rounds what enters a product; its gradient passes."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _tf32(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _RoundGradient(torch.autograd.Function):
    """Passes a product's value; rounds the gradient, which enters the products of the backward pass."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _tf32(gradient)
