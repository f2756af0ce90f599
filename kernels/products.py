"""Matrix products in half precision on processors that have no instructions for them.

There PyTorch sums them one number at a time and takes up to a hundred times as long as in float32. The
products here are then taken in float32 and rounded once, which is what the instructions do. To whoever
counts memory they are one operation in half precision, as a library's are: the copies in float32 last no
longer than the product.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.operator import opaque_operator

_SUPPORTED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


# Dynamo cannot look into the processor.
@torch.compiler.assume_constant_result
def _has_instructions(dtype: torch.dtype) -> bool:
    """What PyTorch asks on a CPU before it hands a product in half precision to oneDNN."""
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, _SUPPORTED[dtype])()


def _is_rounded(x: Tensor) -> bool:
    """Whether products of tensors like x are taken in float32."""
    return x.device.type == "cpu" and x.dtype in _SUPPORTED and not _has_instructions(x.dtype)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of matrices or as many of them, (..., M, K) and (..., K, N), in their dtype."""
    return rounded_product(left, right, None, 0.0) if _is_rounded(left) else left @ right


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b of x (..., in), W (out, in) and b (out,), in their dtype."""
    if not _is_rounded(x):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    return rounded_product(rows, weight.mT, bias, 1.0).view(*x.shape[:-1], len(weight))


def mm(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
    """left @ right of matrices in ``out``, as torch.mm."""
    if not _is_rounded(left):
        return torch.mm(left, right, out=out)
    rounded_product_into(left, right, None, 0.0, out)
    return out


def addmm(addend: Tensor, left: Tensor, right: Tensor, *, out: Tensor, beta: float = 1.0) -> Tensor:
    """beta addend + left @ right of matrices in ``out``, as torch.addmm; a beta of 0 reads no addend."""
    if not _is_rounded(left):
        return torch.addmm(addend, left, right, beta=beta, out=out)
    rounded_product_into(left, right, addend if beta else None, beta, out)
    return out


@opaque_operator
def rounded_product(left: Tensor, right: Tensor, addend: Tensor | None, beta: float) -> Tensor:
    """left @ right (+ beta addend) in float32, rounded to the dtype of left."""
    return _product(left, right, addend, beta).to(left.dtype)


@partial(opaque_operator, mutates_args=("out",))
def rounded_product_into(
    left: Tensor, right: Tensor, addend: Tensor | None, beta: float, out: Tensor
) -> None:
    """As ``rounded_product``, without gradients, in ``out``; addend may be ``out``."""
    out.copy_(_product(left, right, addend, beta))


def _product(left: Tensor, right: Tensor, addend: Tensor | None, beta: float) -> Tensor:
    # Autocast would take the copies back to half precision.
    with torch.autocast(left.device.type, enabled=False):
        product = left.float() @ right.float()
    return product if addend is None else product.add_(addend, alpha=beta)


@rounded_product.register_fake
def _(left: Tensor, right: Tensor, *_: Any) -> Tensor:
    return left.new_empty((left @ right).shape)


def _keep_factors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    left, right, addend, ctx.beta = inputs
    ctx.save_for_backward(left, right)
    ctx.addend_shape = None if addend is None else addend.shape


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    left, right = ctx.saved_tensors
    needed = ctx.needs_input_grad
    return (
        matmul(grad, right.mT) if needed[0] else None,
        matmul(left.mT, grad).sum_to_size(right.shape) if needed[1] else None,
        (ctx.beta * grad).sum_to_size(ctx.addend_shape) if needed[2] else None,
        None,
    )


rounded_product.register_autograd(_differentiate, setup_context=_keep_factors)
