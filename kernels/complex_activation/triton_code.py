"""The activations in Triton, bound by memory.

Traffic is given for T tokens of D channels and e bytes an element, so that one tensor is 2 T D e bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.complex_activation.eager import ACTIVATIONS, activation_floor
from kernels.launch import contiguous, pinned_beside
from kernels.tiles import by_tiles
from kernels.triton_import import jit, tl

PINNED = pinned_beside(__file__)


@jit
def _modulus(re, im, floor):
    return tl.sqrt(re * re + im * im + floor * floor)


@jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@jit
def _normal_cdf(x):
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476))


@jit
def _mod_relu_gate(size, offset):
    # Other divisions of a GPU give x / x only about 1, and the identity without an offset only about z.
    return tl.div_rn(tl.maximum(size + offset, 0.0), size)


@jit
def activated(re, im, offset, slope, floor, KIND: tl.constexpr):
    """The activation of float32 tiles; kinds without the parameters do not look at them."""
    if KIND == "split_gelu":
        re *= _normal_cdf(re)
        im *= _normal_cdf(im)
    elif KIND == "z_relu":
        inside = (re > 0) & (im > 0)
        re = tl.where(inside, re, 0.0)
        im = tl.where(inside, im, 0.0)
    else:
        size = _modulus(re, im, floor)
        if KIND == "cardioid":
            gate = 0.5 * (1 + re / size)
        elif KIND == "mod_relu":
            gate = _mod_relu_gate(size, offset)
        else:
            gate = _sigmoid(slope * size + offset)
        re *= gate
        im *= gate
    return re, im


@jit
def _activation_forward_kernel(
    z, offset, slope, out, tokens, D, floor,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    mask = (rows < tokens) & (cols < D)
    at = rows.to(tl.int64) * (2 * D) + cols
    re = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    im = tl.load(z + at + D, mask=mask, other=0.0).to(tl.float32)
    b, beta = 0.0, 0.0
    if offset is not None:
        b = tl.load(offset + cols, mask=cols < D, other=0.0).to(tl.float32)
    if slope is not None:
        beta = tl.load(slope + cols, mask=cols < D, other=0.0).to(tl.float32)
    re, im = activated(re, im, b, beta, floor, KIND)
    tl.store(out + at, re, mask=mask)
    tl.store(out + at + D, im, mask=mask)


@jit
def _activation_backward_kernel(
    grad, z, offset, slope, grad_z, partials, tokens, D, floor,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    cols = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    if KIND == "mod_relu" or KIND == "mod_swish":
        b = tl.load(offset + cols, mask=cols < D, other=0.0).to(tl.float32)
        grad_offset = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if KIND == "mod_swish":
        beta = tl.load(slope + cols, mask=cols < D, other=0.0).to(tl.float32)
        grad_slope = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        rows = (start + tl.arange(0, ROWS))[:, None]
        mask = (rows < tokens) & (cols < D)
        at = rows.to(tl.int64) * (2 * D) + cols
        re = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
        im = tl.load(z + at + D, mask=mask, other=0.0).to(tl.float32)
        y_re = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        y_im = tl.load(grad + at + D, mask=mask, other=0.0).to(tl.float32)
        if KIND == "split_gelu":
            d_re = y_re * (_normal_cdf(re) + re * 0.3989422804014327 * tl.exp(-0.5 * re * re))
            d_im = y_im * (_normal_cdf(im) + im * 0.3989422804014327 * tl.exp(-0.5 * im * im))
        elif KIND == "z_relu":
            inside = (re > 0) & (im > 0)
            d_re = tl.where(inside, y_re, 0.0)
            d_im = tl.where(inside, y_im, 0.0)
        else:
            size = _modulus(re, im, floor)
            # Divided by |z| one by one below: |z|^3 could underflow.
            dot = re * y_re + im * y_im
            if KIND == "cardioid":
                cos = re / size
                gate = 0.5 * (1 + cos)
                turn = 0.5 * dot / size
                d_re = gate * y_re + turn * (1 - cos * cos)
                d_im = gate * y_im - turn * cos * (im / size)
            elif KIND == "mod_relu":
                gate = _mod_relu_gate(size, b)
                by_offset = tl.where(gate > 0, dot / size, 0.0)
                grad_offset += by_offset
                turn = by_offset * b / size / size
                d_re = gate * y_re - turn * re
                d_im = gate * y_im - turn * im
            else:
                gate = _sigmoid(beta * size + b)
                by_offset = dot * gate * (1 - gate)
                grad_offset += by_offset
                grad_slope += by_offset * size
                turn = by_offset * beta / size
                d_re = gate * y_re + turn * re
                d_im = gate * y_im + turn * im
        tl.store(grad_z + at, d_re, mask=mask)
        tl.store(grad_z + at + D, d_im, mask=mask)
    parameters: tl.constexpr = (KIND == "mod_relu") + 2 * (KIND == "mod_swish")
    own = partials + tl.program_id(0) * parameters * D + tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D) < D
    if parameters > 0:
        tl.store(own, tl.sum(grad_offset, 0), mask=inside)
    if parameters > 1:
        tl.store(own + D, tl.sum(grad_slope, 0), mask=inside)


def activation(z: Tensor, kind: str, offset: Tensor | None, slope: Tensor | None) -> Tensor:
    """Reads z and writes out, 4 T D e bytes. 2 (z_relu) to 30 (split_gelu) FLOPs a channel."""
    z = z.contiguous()
    out = torch.empty_like(z)
    _launch(_activation_forward_kernel, z, (z, contiguous(offset), contiguous(slope), out), kind)
    return out


def activation_backward(
    grad: Tensor, z: Tensor, kind: str, offset: Tensor | None, slope: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Reads z and the gradient, writes one, 6 T D e bytes. 2 (z_relu) to 50 (split_gelu) FLOPs a channel."""
    z, grad = z.contiguous(), grad.contiguous()
    grad_z = torch.empty_like(z)
    tensors = (grad, z, contiguous(offset), contiguous(slope), grad_z)
    partials = _launch(_activation_backward_kernel, z, tensors, kind, sums=ACTIVATIONS[kind])
    return grad_z, partials.sum(0)


def _launch(
    kernel: Any, z: Tensor, tensors: tuple[Tensor | None, ...], kind: str, sums: int | None = None
) -> Any:
    tokens, numbers = z.shape[:-2].numel(), (z.shape[-1], activation_floor(z, kind))
    return by_tiles(PINNED, kernel, z, tokens, tensors, numbers, kind, sums=sums, KIND=kind)


def compile_cases() -> dict[str, Callable[[], object]]:
    """Every pinned configuration, by a label; each call launches a forward and a backward kernel."""
    return {
        f"{kind} {str(dtype).removeprefix('torch.')}": partial(_compile_activation, dtype, kind)
        for dtype in (torch.bfloat16, torch.float32)
        for kind in ACTIVATIONS
    }


def _compile_activation(dtype: torch.dtype, kind: str) -> None:
    z = torch.empty(4, 2, 2048, dtype=dtype)
    offset, slope = (z[0, 0] if ACTIVATIONS[kind] > count else None for count in range(2))
    activation(z, kind, offset, slope)
    activation_backward(z, z, kind, offset, slope)
