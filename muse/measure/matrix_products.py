"""The matrix products of what runs: counted by shape, replayed as bare calls, and the rate of a large one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.complex_attention import complex_attention_backward, complex_attention_forward
from kernels.products import matmul
from muse.measure.timing import seconds_of

aten = torch.ops.aten
COMPLEX_ATTENTION = (complex_attention_forward._opoverload, complex_attention_backward._opoverload)
# Real products that make one of the scores, and one of the weights.
COMPLEX_PARTS = {"real": (1, 1), "magnitude": (2, 1), "phase": (2, 2)}
# Side of the square product whose rate counts as the peak.
PEAK_SIDE = {"cpu": 1024, "cuda": 8192}
PEAK_RUNS = 20
# Position of the first of the two matrices among the arguments.
PRODUCTS = {
    aten.mm: 0,
    aten.bmm: 0,
    aten.addmm: 1,
    aten.addmm_: 1,
    aten.baddbmm: 1,
    torch.ops.muse.rounded_product: 0,
    torch.ops.muse.rounded_product_into: 0,
}


@dataclass(frozen=True)
class Product:
    """A matrix product: shape, strides and dtype of both factors."""

    left: tuple[tuple[int, ...], tuple[int, ...]]
    right: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: torch.dtype

    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * math.prod(self.left[0]) * self.right[0][-1]

    def factors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Random factors of these shapes and strides."""
        left, right = (
            torch.empty_strided(shape, stride, dtype=self.dtype, device=device).normal_()
            for shape, stride in (self.left, self.right)
        )
        return left, right


@dataclass(frozen=True)
class AttentionCall:
    """A causal attention with its backward pass: shapes (B, H, S, d) of queries and keys, and dtype."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    dtype: torch.dtype

    def function(self, device: torch.device) -> Callable[[], None]:
        """Forward and backward of a bare SDPA call on random inputs of these shapes."""
        q, k, v = (
            torch.randn(shape, device=device).to(self.dtype).requires_grad_()
            for shape in (self.query, self.key, self.key)
        )
        grad = torch.randn_like(q)

        def call() -> None:
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=self.query[1] != self.key[1]
            )
            torch.autograd.grad(out, (q, k, v), grad)

        return call


class ProductRecorder(TorchDispatchMode):
    """Counts the matrix products of everything that runs inside.

    Fused causal attention counts as the products it is made of, two forward and five backward, each over
    half of the keys: what a causal mask leaves of them. Its calls are kept too, to be timed as SDPA.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()
        self.attention_products: Counter[Product] = Counter()
        self.attention_calls: Counter[AttentionCall] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet = func.overloadpacket
        if packet in PRODUCTS:
            first = PRODUCTS[packet]
            left, right = args[first], args[first + 1]
            self.products[_product(left, right)] += 1
        elif "_scaled_dot_product" in packet.__name__:
            backward = "backward" in packet.__name__
            query, key = (args[1], args[2]) if backward else (args[0], args[1])
            self._add_attention(query, key, backward, "real")
        elif func in COMPLEX_ATTENTION:
            backward = func == COMPLEX_ATTENTION[1]
            query, key = (args[1], args[2]) if backward else (args[0], args[1])
            score = next(arg for arg in args if isinstance(arg, str))
            self._add_attention(query.flatten(-2), key.flatten(-2), backward, score)
        return func(*args, **(kwargs or {}))

    def _add_attention(self, query: Tensor, key: Tensor, backward: bool, score: str) -> None:
        batch, heads, length, width = query.shape
        seen = max(1, key.shape[2] // 2)
        scores = _dense((batch * heads, length, width), (batch * heads, width, seen), query.dtype)
        values = _dense((batch * heads, length, seen), (batch * heads, seen, width), query.dtype)
        keys = _dense((batch * heads, seen, length), (batch * heads, length, width), query.dtype)
        # Forward: q k^T and p v. Backward: q k^T again, do v^T, ds k, ds^T q, p^T do. The parts of complex
        # scores and weights make some of them two.
        of_scores, of_weights = COMPLEX_PARTS[score]
        if backward:
            counts = [(scores, of_scores + of_weights), (values, of_scores), (keys, of_scores + of_weights)]
            self.attention_calls[AttentionCall(tuple(query.shape), tuple(key.shape), query.dtype)] += 1
        else:
            counts = [(scores, of_scores), (values, of_weights)]
        # Two of them are the same where half of the keys are as many as a head's channels.
        for product, count in counts:
            self.attention_products[product] += count


def _product(left: Tensor, right: Tensor) -> Product:
    return Product((tuple(left.shape), left.stride()), (tuple(right.shape), right.stride()), left.dtype)


def _dense(left: tuple[int, ...], right: tuple[int, ...], dtype: torch.dtype) -> Product:
    def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[1] * shape[2], shape[2], 1

    return Product((left, strides(left)), (right, strides(right)), dtype)


def replayed(products: Counter[Product], device: torch.device) -> Callable[[], None]:
    """Bare calls of the products on random factors."""
    replays = [(*product.factors(device), count) for product, count in products.items()]

    def replay() -> None:
        for left, right, count in replays:
            for _ in range(count):
                matmul(left, right)

    return replay


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs a second of a large square product, the best of several."""
    side = PEAK_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def product() -> None:
        matmul(left, right)

    return 2 * side**3 / min(seconds_of(product, device) for _ in range(PEAK_RUNS))
