"""The scan in PyTorch: the tiles of a sequence side by side, token after token, and then what they hand on.

A sequence of S tokens takes 2 TILE + S / TILE small steps instead of S.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.complex_scan.tiles import TILE, entries_like, frame, tile_count
from kernels.planar import conjugate, multiply, precise


def _tiled(x: Tensor, tiles: int, dtype: torch.dtype) -> Tensor:
    """x (B, S, ...) as (TILE, B, tiles, ...), zeros behind its end."""
    padding = tiles * TILE - x.shape[1]
    if padding:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding))
    return x.unflatten(1, (tiles, TILE)).movedim(2, 0).to(dtype).contiguous()


def _joined(x: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The inverse of ``_tiled``."""
    return x.movedim(0, 2).flatten(1, 2)[:, :length].to(dtype).contiguous()


def _recur(x: Tensor, decay: Tensor, start: Tensor | None = None) -> Tensor:
    """x_j += decay_j x_(j-1) along the first axis, in place; before it is ``start``."""
    if start is not None:
        x[0].addcmul_(decay[0], start)
    for j in range(1, x.shape[0]):
        x[j].addcmul_(decay[j], x[j - 1])
    return x


def _inputs(u: Tensor, log_decay: Tensor, angle: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In tiles: P (TILE, 1, 1, 2, K), |lambda|, sqrt(1 - |lambda|^2) (each with a plane axis), conj(P) u."""
    dtype, tiles = precise(u), tile_count(u)
    turn = frame(angle, dtype)[:, None, None]
    logs = _tiled(log_decay, tiles, dtype).unsqueeze(-2)
    return (
        turn,
        logs.exp(),
        (-torch.expm1(2 * logs)).sqrt_(),
        multiply(_tiled(u, tiles, dtype), conjugate(turn)),
    )


def scan(u: Tensor, log_decay: Tensor, angle: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As ``complex_scan``, and the state before each tile."""
    length, last = u.shape[1], (u.shape[1] - 1) % TILE
    turn, decay, scale, turned = _inputs(u, log_decay, angle)
    turned.mul_(scale)
    entries = entries_like(u)
    entries[:, 0] = state
    if entries.shape[1] > 1:
        ends, kept = _recur(turned.clone(), decay)[-1], decay.prod(0)
        for tile in range(entries.shape[1] - 1):
            end = torch.addcmul(ends[:, tile], kept[:, tile], entries[:, tile])
            entries[:, tile + 1] = multiply(end, turn[-1, 0])
    g = multiply(_recur(turned, decay, entries), turn)
    return _joined(g, length, u.dtype), g[last, :, -1].clone(), entries


def scan_backward(
    grad: Tensor, grad_final: Tensor, u: Tensor, log_decay: Tensor, angle: Tensor, entries: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, log_decay, angle and the first state."""
    length, last, tiles = u.shape[1], (u.shape[1] - 1) % TILE, entries.shape[1]
    turn, decay, scale, turned = _inputs(u, log_decay, angle)
    back = conjugate(turn)
    states = _recur(scale * turned, decay, entries)
    before = torch.cat((entries[None], states[:-1]))

    # The adjoint recurrence runs backwards: of h_j it is that of h_(j+1) times decay_(j+1).
    adjoint = multiply(_tiled(grad, tiles, decay.dtype), back)
    adjoint[last, :, -1] += multiply(grad_final, back[last, 0])
    reverse, later = adjoint.flip(0), torch.cat((decay[:1], decay[1:].flip(0)))
    if tiles > 1:
        starts, kept = decay[0] * _recur(reverse.clone(), later)[-1], decay.prod(0)
        passed = None
        for tile in range(tiles - 1, 0, -1):
            # Of the state before this tile, which is that after the tile before.
            own = starts[:, tile]
            if passed is not None:
                own = torch.addcmul(own, kept[:, tile], passed)
            passed = multiply(own, back[-1, 0])
            reverse[0, :, tile - 1] += passed
    adjoint = _recur(reverse, later).flip(0)

    by_scale = (adjoint * turned).sum(-2, keepdim=True)
    by_decay = (adjoint * before).sum(-2, keepdim=True)
    # Where nothing decays nothing comes in, and the slope of the scale has no bound.
    slope = decay.square() / scale.clamp_min(torch.finfo(scale.dtype).eps)
    d_log = (decay * by_decay - slope * by_scale).squeeze(-2)
    re, im = before.unbind(-2)
    d_angle = (decay.squeeze(-2) * (adjoint[..., 1, :] * re - adjoint[..., 0, :] * im)).sum((0, 1, 2))
    du = multiply(adjoint, turn).mul_(scale)
    return (
        _joined(du, length, u.dtype),
        _joined(d_log, length, log_decay.dtype),
        d_angle.to(angle.dtype),
        (decay[0, :, 0] * adjoint[0, :, 0]),
    )
