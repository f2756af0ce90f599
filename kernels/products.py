"""Matrix products in half precision on processors that have no instructions for them.

There PyTorch sums them one number at a time and takes up to a hundred times as long as in float32. The
products here are then taken in float32 and rounded once, which is what the instructions do. All that is kept
for the backward pass stays in half precision.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which to multiply tensors like x."""
    return torch.float32 if x.device.type == "cpu" and not _has_instructions(x.dtype) else x.dtype


@functools.cache
def _has_instructions(dtype: torch.dtype) -> bool:
    """What PyTorch asks on a CPU before it hands a product to oneDNN."""
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return dtype not in asked or bool(
        torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, asked[dtype])()
    )


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of matrices or as many of them, (..., M, K) and (..., K, N), in their dtype."""
    if product_dtype(left) == left.dtype:
        return left @ right
    return _RoundedProduct.apply(left, right)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b of x (..., in), W (out, in) and b (out,), in their dtype."""
    dtype = product_dtype(x)
    if dtype == x.dtype:
        return F.linear(x, weight, bias)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


def multiply_into(out: Tensor, left: Tensor, right: Tensor, beta: float = 0.0) -> None:
    """out = beta out + left @ right of matrices; where beta is 0 it does not matter what was in out."""
    dtype = product_dtype(left)
    if dtype == left.dtype:
        torch.addmm(out, left, right, beta=beta, out=out)
    else:
        out.copy_(torch.addmm(out.to(dtype), left.to(dtype), right.to(dtype), beta=beta))


class _RoundedProduct(torch.autograd.Function):
    """The product in float32, rounded."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return (left.float() @ right.float()).to(left.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        return (
            matmul(grad, right.mT) if ctx.needs_input_grad[0] else None,
            matmul(left.mT, grad) if ctx.needs_input_grad[1] else None,
        )
