"""Inputs of linear_cross_entropy, and its maths with the roundings that are meant."""

from __future__ import annotations

import torch

from kernels.linear_cross_entropy.eager import shares_of
from kernels.planar import upcast
from support.padding import padded


def head_inputs(tokens, vocab, features, dtype=torch.float64, device="cpu", ignored=0.25):
    """x, weight, bias, targets, some of which do not count, and gradients of the losses; NaN between rows."""
    x, weight = torch.randn(tokens, features), torch.randn(vocab, features) * features**-0.5
    targets = torch.randint(vocab, (tokens,))
    targets[1:][torch.rand(max(0, tokens - 1)) < ignored] = -1
    grad = torch.rand(tokens) / max(1, tokens)
    x, weight = padded(x.to(device, dtype), 1, 3), padded(weight.to(device, dtype), 2, 1)
    wide = torch.promote_types(dtype, torch.float32)
    return [x, weight, torch.randn(vocab).to(device, dtype), targets.to(device), grad.to(device, wide)]


def results(function, x, weight, bias, targets, grad):
    """Losses and the gradients of x, weight and bias, as far as there is one."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    losses = function(*leaves[:2], targets, *leaves[2:])
    return [losses.detach(), *torch.autograd.grad(losses, leaves, grad.to(losses.dtype))]


def rounded(x, weight, bias, targets, grad):
    """What ``results`` returns, with all logits: the logits' gradient alone is rounded before the end."""
    matrix, wide = upcast(weight.flatten(1)), upcast(x)
    logits = wide @ matrix.mT
    if bias is not None:
        logits = logits + upcast(bias)
    lse = logits.logsumexp(-1)
    losses = (lse - logits.gather(1, targets[:, None].clamp(min=0))[:, 0]).where(targets >= 0, 0.0)
    shares, scale = shares_of(grad, targets)
    at_target = torch.nn.functional.one_hot(targets.clamp(min=0), len(weight))
    slope = ((logits - lse[:, None]).exp() - at_target) * shares[:, None]
    factor = upcast(slope.to(x.dtype))
    gradients = [((factor @ matrix) * scale).to(x.dtype)]
    gradients.append(((factor.mT @ wide) * scale).to(weight.dtype).view(weight.shape))
    if bias is not None:
        gradients.append((slope.sum(0) * scale).to(bias.dtype))
    return [losses, *gradients]
