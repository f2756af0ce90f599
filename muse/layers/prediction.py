"""How well the states of a Koopman operator predict what comes next: an auxiliary loss, and its figures.

Of an operator's states g_t and observables u_t = W_in z_t, before their convolution and less their means
over all tokens, each channel has the share of the next observable's variance that a multiple of the state
explains,

    R^2 = |sum g_t* u_(t+1)|^2 / (sum |g_t|^2 sum |u_(t+1)|^2)

less what as many samples of noise would have, so that the share of white noise is 0 on average. No gradient
goes through u_(t+1): what is learned is to predict it, not to be easy to predict.

That alone would let every channel become a copy of the one that is most predictable. What prevents it is the
share of distinct channels among K, of which m copies of one count as one:

    1/K sum_i 1 / sum_j |c_ij|^2        c_ij the correlation of u_i and u_j

A channel that becomes a copy gains at most 1/K in the mean of R^2, and costs that much here. Neither share
depends on the scale, so that nothing is gained by observables that vanish, nor by constant ones, whose means
are taken away. The loss is (1 - mean R^2) + (1 - share of distinct channels), between 0 and 2.

Targets without gradients: Grill et al., "Bootstrap Your Own Latent" (2020); a term against redundant
features: Zbontar et al., "Barlow Twins" (2021). Sums are over the tokens of a rank's micro-batch, so unlike
the cross-entropy the auxiliary loss depends on how many ranks and micro-batches share its windows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.planar import conjugate, multiply, upcast

# Of a variance that may be 0.
TINY = 1e-30


def predictable_shares(states: Tensor, observables: Tensor) -> Tensor:
    """Share of each channel's variance (K,) that the state of the token before explains, at least float32.

    Args:
        states: g, planar (B, S, 2, K).
        observables: u, likewise; without gradients. B (S - 1) must be at least 3.
    """
    known, wanted = _centred(states[:, :-1]), _centred(observables[:, 1:].detach())
    count = known.shape[0] * known.shape[1]
    product = multiply(conjugate(known), wanted).sum((0, 1)).square().sum(0)
    explained = product / (_power(known) * _power(wanted)).clamp(min=TINY)
    # A mean and a multiple were fitted.
    return 1 - (1 - explained) * (count - 1) / (count - 2)


def distinct_share(observables: Tensor) -> Tensor:
    """Share of channels that are no copy of others: 1 where none correlate, 1/K where all are one.

    Args:
        observables: u, planar (B, S, 2, K).
    """
    re, im = _centred(observables).flatten(0, 1).unbind(1)
    along, across = re.T @ re + im.T @ im, re.T @ im - im.T @ re
    power = along.diagonal()
    correlation = (along.square() + across.square()) / (power[:, None] * power).clamp(min=TINY)
    # At least itself, but for a channel that is 0.
    return (1 / correlation.sum(1).clamp(min=1)).mean()


def shares_of(states: Tensor, observables: Tensor) -> Tensor | None:
    """Mean predictable share, and share of distinct channels, (2,); None where there are too few tokens."""
    if states.shape[0] * (states.shape[1] - 1) < 3:
        return None
    with torch.autocast(states.device.type, enabled=False):
        predictable = predictable_shares(states, observables).mean()
        return torch.stack((predictable, distinct_share(observables)))


def _centred(z: Tensor) -> Tensor:
    z = upcast(z)
    return z - z.mean((0, 1))


def _power(z: Tensor) -> Tensor:
    return z.square().sum((0, 1, 2))
