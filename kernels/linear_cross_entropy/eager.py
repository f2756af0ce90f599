"""Losses and gradients of a linear head in PyTorch, by chunks of tokens whose logits are held in float32."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.planar import precise, upcast
from kernels.products import linear, matmul

# Logits held at a time; with fewer, what is read and written of the weight's gradient at each chunk counts.
CHUNK_ELEMENTS = 2**24


def _chunks(x: Tensor, vocab: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, vocab))
    return (slice(start, start + step) for start in range(0, len(x), step))


def losses(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and log-sum-exp of each token."""
    losses = torch.empty(len(x), dtype=precise(x), device=x.device)
    lse, at = torch.empty_like(losses), targets.clamp(min=0)
    for rows in _chunks(x, len(weight)):
        logits = _logits(x[rows], weight.flatten(1), bias)
        # One pass over the logits on a CPU, where their log-sum-exp takes several.
        losses[rows] = F.cross_entropy(logits, at[rows], reduction="none")
        lse[rows] = losses[rows] + logits.gather(1, at[rows, None])[:, 0]
    return losses.where(targets >= 0, 0.0), lse


def _logits(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    logits = upcast(linear(x, matrix))
    return logits if bias is None else logits.add_(bias)


def gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    of_x: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the weight and of the bias; empty where not asked for."""
    matrix = weight.flatten(1)
    shares, scale = shares_of(grad, targets)
    grad_x = torch.empty_like(x) if of_x else x.new_empty(0)
    # Sums over chunks, so not in the dtype of the weight.
    sums = torch.zeros(matrix.shape if of_weight else 0, dtype=precise(x), device=x.device)
    sums_of_bias = torch.zeros(len(weight) if of_weight and bias is not None else 0).to(sums)
    for rows in _chunks(x, len(weight)):
        slope = _logits(x[rows], matrix, bias).sub_(lse[rows, None]).exp_()
        slope[torch.arange(len(slope), device=x.device), targets[rows].clamp(min=0)] -= 1
        slope.mul_(shares[rows, None])
        rounded = slope.to(x.dtype)
        if of_x:
            grad_x[rows] = upcast(matmul(rounded, matrix)) * scale
        if of_weight:
            sums += matmul(rounded.mT, x[rows])
        if len(sums_of_bias):
            sums_of_bias += slope.sum(0)
    grad_weight = sums.mul_(scale).to(weight.dtype)
    grad_bias = sums_of_bias.mul_(scale).to(weight.dtype if bias is None else bias.dtype)
    return grad_x, grad_weight.view_as(weight) if of_weight else grad_weight, grad_bias


def shares_of(grad: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of each loss as a share of the largest one, 0 for negative targets, and the largest one.

    With these shares the gradients of logits are between -1 and 1, which float16 holds whatever the number
    of tokens in a mean; the scale comes to what is summed of them.
    """
    counted = grad.where(targets >= 0, 0.0)
    scale = counted.new_zeros(()) if not len(grad) else counted.abs().amax()
    return counted / scale.clamp(min=torch.finfo(scale.dtype).tiny), scale
