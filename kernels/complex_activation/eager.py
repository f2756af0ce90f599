"""The activations in PyTorch.

With r = |z| and d = Re(conj(z) y) for a gradient y, a gate h(r) z has the gradient h y + h'(r) d z / r.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.chunks import chunk_length, chunks, like, planes, read, to_write, write
from kernels.planar import MODULUS_FLOOR, modulus_floor, precise

# The kinds of activation, and how many parameters a channel each of them has.
ACTIVATIONS = {"mod_relu": 1, "mod_swish": 2, "split_gelu": 0, "cardioid": 0, "z_relu": 0}

threshold_backward = torch.ops.aten.threshold_backward
sigmoid_backward = torch.ops.aten.sigmoid_backward
gelu_backward = torch.ops.aten.gelu_backward


def activation(z: Tensor, kind: str, offset: Tensor | None, slope: Tensor | None) -> Tensor:
    """The eager implementation of an activation, see ``complex_activation``."""
    if kind == "split_gelu":
        return F.gelu(z).contiguous()
    out = like(z)
    x, results = planes(z), planes(out)
    if kind == "z_relu":
        _first_quadrant(x, x, results)
        return out
    parameters = _parameters(z, offset, slope)
    for rows, (a, b) in chunks(x, 2):
        part = read(x[:, rows], a)
        _, gate = _gate(part, kind, parameters, activation_floor(z, kind), b)
        y = to_write(results[:, rows], a)
        torch.mul(part, gate, out=y)
        write(results[:, rows], y)
    return out


def _parameters(z: Tensor, *parameters: Tensor | None) -> list[Tensor]:
    return [p.to(precise(z)) for p in parameters if p is not None]


def activation_floor(z: Tensor, kind: str) -> float:
    """The floor of the modulus: only mod_relu divides by it."""
    return modulus_floor(z.dtype) if kind == "mod_relu" else MODULUS_FLOOR


def _gate(
    x: Tensor, kind: str, parameters: list[Tensor], floor: float, buffer: Tensor
) -> tuple[Tensor, Tensor]:
    """|z| and the real factor of z (2, T, D), both (T, D) in the buffer."""
    re, im = x
    size, gate = _halves(buffer)
    torch.mul(re, re, out=size).addcmul_(im, im).add_(floor**2).sqrt_()
    if kind == "mod_relu":
        return size, torch.add(size, parameters[0], out=gate).relu_().div_(size)
    if kind == "mod_swish":
        return size, torch.addcmul(parameters[0], size, parameters[1], out=gate).sigmoid_()
    return size, torch.div(re, size, out=gate).add_(1).mul_(0.5)


def _halves(buffer: Tensor) -> Tensor:
    """A buffer (2, T, D) of tokens, one plane after the other: faster where no planar tensor is held."""
    return buffer.transpose(0, 1).view(buffer.shape)


def _first_quadrant(values: Tensor, x: Tensor, out: Tensor) -> None:
    """Write ``values`` (2, T, D) where both planes of x are positive, else 0, into ``out``."""
    step = chunk_length(x, x.shape[0] * x.shape[2])
    for start in range(0, x.shape[1], step):
        rows = slice(start, start + step)
        least = torch.minimum(*x[:, rows])
        threshold_backward.grad_input(values[:, rows], least, 0, grad_input=out[:, rows])


def activation_backward(
    grad: Tensor, z: Tensor, kind: str, offset: Tensor | None, slope: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of z and, as rows, of the parameters."""
    sums = torch.zeros(ACTIVATIONS[kind], z.shape[-1], dtype=precise(z), device=z.device)
    if kind == "split_gelu":
        return gelu_backward(grad, z).contiguous(), sums
    grad_z = like(z)
    x, grad_y, results = planes(z), planes(grad), planes(grad_z)
    if kind == "z_relu":
        _first_quadrant(grad_y, x, results)
        return grad_z, sums
    parameters = _parameters(z, offset, slope)
    for rows, (a, b, c, d) in chunks(x, 4):
        part, y = read(x[:, rows], a), read(grad_y[:, rows], b)
        size, gate = _gate(part, kind, parameters, activation_floor(z, kind), c)
        dot, turn = _halves(d)
        torch.mul(part[0], y[0], out=dot).addcmul_(part[1], y[1])
        dz = to_write(results[:, rows], b)
        if kind == "mod_relu":
            dot.div_(size)
            threshold_backward.grad_input(dot, gate, 0, grad_input=dot)
            sums[0] += dot.sum(0)
            # Divided one by one: |z|^3 could underflow.
            torch.mul(dot, parameters[0], out=turn).div_(size).div_(size)
            torch.mul(y, gate, out=dz).addcmul_(part, turn, value=-1)
        elif kind == "mod_swish":
            sigmoid_backward.grad_input(dot, gate, grad_input=dot)
            sums[0] += dot.sum(0)
            sums[1] += torch.mul(dot, size, out=turn).sum(0)
            torch.mul(dot, parameters[1], out=turn).div_(size)
            torch.mul(y, gate, out=dz).addcmul_(part, turn)
        else:
            # The gate turns with arg z: d / (2 r) times (sin^2, -sin cos).
            dot.div_(size).mul_(0.5)
            torch.mul(y, gate, out=dz)
            cos = torch.div(part[0], size, out=turn)
            dz[0].add_(dot)
            dot.mul_(cos)
            dz[0].addcmul_(dot, cos, value=-1)
            dz[1].addcmul_(dot, torch.div(part[1], size, out=turn), value=-1)
        write(results[:, rows], dz)
    return grad_z, sums
