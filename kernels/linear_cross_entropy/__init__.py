"""Cross-entropy of each token under a linear head, without the (tokens x vocabulary) logits in memory.

N tokens of E features and V entries of the vocabulary. In Triton logits are made by tiles, used where they
are, and made again in the backward pass from the log-sum-exp of each token, the only thing kept beside the
inputs: 2 N V E FLOPs forward, 4 N V E for each of the two gradients. No logit goes to memory. The eager
implementation holds those of some tokens.

The gradients are those of two launches of one kernel, each of which makes all logits again: a program owns
rows of the gradient and passes over the other side, so that it needs no atomics and sums in one order. One
kernel for both would spare 2 N V E FLOPs, but its tiles would have to be added to one of the gradients in
memory by many programs.

So the backward pass in Triton does 8 N V E FLOPs where 4 suffice if logits are kept; what that spares are
passes over logits, which matter less the more features there are. It is for at most 512 features, as many as
a program can hold sums of; beyond, the gradients are those of the eager implementation. Up to how many
features the kernels are taken for losses alone (``losses``) and for those with gradients (``training``) is
pinned in the JSON under "dispatch", by architecture and bits of the dtype. Float32, whose products do without
matrix instructions there, is left to the library. These numbers follow from a count of FLOPs and bytes; no
card has measured them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.launch import target_name, use_triton
from kernels.linear_cross_entropy import eager, triton_code
from kernels.linear_cross_entropy.triton_code import PINNED
from kernels.operator import operator
from kernels.planar import precise
from kernels.triton_import import INTERPRETED

__all__ = ["linear_cross_entropy", "takes_triton"]

# Features whose multiples the compiler knows to be aligned for wide loads.
ALIGNED = 16


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """-log softmax(x W^T + b)[target] of each token, in nats.

    Args:
        x: (N, E), float32, bfloat16 or float16; float64 in the eager implementation.
        weight: (V, E), or (V, 2, E / 2) as a planar embedding holds it; of the same dtype.
        targets: (N,) int64, below V; the loss of a negative one is 0, and so are its gradients.
        bias: (V,), of any floating dtype.

    Returns:
        (N,), float32, or float64 where x is.

    Raises:
        TypeError: the dtypes differ, or that of the targets is not int64.
        ValueError: shapes that do not fit.
    """
    if x.dtype != weight.dtype or targets.dtype != torch.int64:
        raise TypeError(
            f"x and weight of one dtype and targets in int64 are needed, not {x.dtype}, {weight.dtype} and "
            f"{targets.dtype}"
        )
    fits = x.ndim == 2 and weight.ndim in (2, 3) and weight.shape[1:].numel() == x.shape[1]
    if not fits or targets.shape != x.shape[:1] or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = [None if t is None else tuple(t.shape) for t in (x, weight, targets, bias)]
        raise ValueError(
            f"x, weight, targets and bias of shapes {shapes} do not fit (N, E), (V, E), (N,) and (V,)"
        )
    return _linear_cross_entropy(x, weight, bias, targets)[0]


def takes_triton(x: Tensor, training: bool) -> bool:
    """Whether the Triton kernels are for the loss of x (N, E), with its gradients if ``training``."""
    if not use_triton(x) or (x.shape[1] % ALIGNED and not INTERPRETED):
        return False
    dispatch: Any = PINNED.table["dispatch"]
    widest = dispatch[target_name(x)][str(8 * x.element_size())]["training" if training else "losses"]
    return bool(x.shape[1] <= widest)


@operator
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor]:
    code = triton_code if use_triton(x) else eager
    return code.losses(x, weight, bias, targets)


@operator
def _linear_cross_entropy_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    of_x: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    code = triton_code if use_triton(x) and PINNED.covers("gradient", x, x.shape[1]) else eager
    return code.gradients(grad, x, weight, bias, targets, lse, of_x, of_weight)


@_linear_cross_entropy.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), dtype=precise(x)), x.new_empty(len(x), dtype=precise(x))


@_linear_cross_entropy_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Any,
    lse: Any,
    of_x: bool,
    of_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight = x.new_empty(x.shape if of_x else 0), weight.new_empty(weight.shape if of_w else 0)
    grad_bias = weight.new_empty(0) if bias is None else bias.new_empty(len(bias) if of_w else 0)
    return grad_x, grad_weight, grad_bias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, targets = inputs
    ctx.save_for_backward(x, weight, bias, targets, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    of_x, of_weight, of_bias, _ = ctx.needs_input_grad
    gradients = _linear_cross_entropy_backward(grad, *ctx.saved_tensors, of_x, of_weight or of_bias)
    needed = zip(gradients, (of_x, of_weight, of_bias), strict=True)
    return *(gradient if asked else None for gradient, asked in needed), None


_linear_cross_entropy.register_autograd(_differentiate, setup_context=_keep)
