"""Complex attention in plain PyTorch, for the tests of its eager and its Triton implementation."""

from __future__ import annotations

import math

import torch


def scores(q, k, score, causal):
    """Planes, the modulus or what stands for it, and logits, every score held."""
    (q_re, q_im), (k_re, k_im) = q.unbind(-2), k.unbind(-2)
    scale = 1 / math.sqrt(q.shape[-1])
    s_re = ((q_re * scale) @ k_re.mT) + ((q_im * scale) @ k_im.mT)
    s_im = ((q_im * scale) @ k_re.mT) - ((q_re * scale) @ k_im.mT)
    # The floor of a vanishing modulus, see the module.
    floor = 1e-3 if q.dtype == torch.float16 else 1e-6
    size = s_re if score == "real" else (s_re.square() + s_im.square() + floor**2).sqrt()
    logits = size
    if causal:
        future = torch.ones_like(logits, dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
        logits = logits.masked_fill(future, -math.inf)
    return s_re, s_im, size, logits


def plain(q, k, v, score, causal=True):
    """The maths on planes in the dtype of the operands.

    As in flash attention, weights are divided by their sum at the end, so that the mean slope of the backward
    pass is taken of the output, and they come of scores that are computed again, so that rounding leaves
    their sum off 1.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    v_re, v_im = v.unbind(-2)
    s_re, s_im, size, logits = scores(q, k, score, causal)
    again = scores(q, k, score, causal)[-1]
    largest = again.detach().amax(-1, keepdim=True)
    weight, total = (logits - largest).exp(), (again - largest).exp().sum(-1, keepdim=True).unsqueeze(-2)
    if score != "phase":
        return torch.stack((weight @ v_re, weight @ v_im), dim=-2) / total
    w_re, w_im = weight * s_re / size, weight * s_im / size
    return torch.stack((w_re @ v_re - w_im @ v_im, w_re @ v_im + w_im @ v_re), dim=-2) / total
