"""The norms in Triton, bound by memory.

Traffic is given for T tokens of D channels and e bytes an element, so that one tensor is 2 T D e bytes.

The kernels hold whole rows of both planes in registers: a program takes a tile of a few tokens. Their
backward pass runs a pinned number of programs, each over many tiles, that sum the parameters' gradients in
registers and write one partial row each, so that the order of summation does not depend on the card.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.complex_norm.eager import TINY
from kernels.launch import Options, ceil_div, contiguous, launch, next_power_of_2, pinned_beside
from kernels.triton_import import jit, tl

PINNED = pinned_beside(__file__)


@jit
def _rms_norm_forward_kernel(
    z, branch, gain, total, out, rstd, tokens, D, eps,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)[None, :]
    mask = (rows[:, None] < tokens) & (cols < D)
    at = rows.to(tl.int64)[:, None] * (2 * D) + cols
    re = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    im = tl.load(z + at + D, mask=mask, other=0.0).to(tl.float32)
    if branch is not None:
        re += tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
        im += tl.load(branch + at + D, mask=mask, other=0.0).to(tl.float32)
        # The norm is that of the rounded sum, as if the two were apart.
        rounded_re, rounded_im = re.to(total.dtype.element_ty), im.to(total.dtype.element_ty)
        tl.store(total + at, rounded_re, mask=mask)
        tl.store(total + at + D, rounded_im, mask=mask)
        re, im = rounded_re.to(tl.float32), rounded_im.to(tl.float32)
    scale = tl.rsqrt(tl.sum(re * re + im * im, 1) / D + eps)
    tl.store(rstd + rows, scale, mask=rows < tokens)
    re *= scale[:, None]
    im *= scale[:, None]
    g_re = tl.load(gain + cols, mask=cols < D, other=0.0).to(tl.float32)
    g_im = tl.load(gain + D + cols, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(out + at, re * g_re - im * g_im, mask=mask)
    tl.store(out + at + D, re * g_im + im * g_re, mask=mask)


@jit
def _rms_norm_backward_kernel(
    grad, grad_total, z, gain, rstd, grad_z, partials, tokens, D,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_D)[None, :]
    g_re = tl.load(gain + cols, mask=cols < D, other=0.0).to(tl.float32)
    g_im = tl.load(gain + D + cols, mask=cols < D, other=0.0).to(tl.float32)
    grad_g_re = tl.zeros((ROWS, BLOCK_D), tl.float32)
    grad_g_im = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows[:, None] < tokens) & (cols < D)
        at = rows.to(tl.int64)[:, None] * (2 * D) + cols
        scale = tl.load(rstd + rows, mask=rows < tokens, other=0.0)[:, None]
        re = tl.load(z + at, mask=mask, other=0.0).to(tl.float32) * scale
        im = tl.load(z + at + D, mask=mask, other=0.0).to(tl.float32) * scale
        y_re = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        y_im = tl.load(grad + at + D, mask=mask, other=0.0).to(tl.float32)
        dot_re = re * y_re + im * y_im
        dot_im = re * y_im - im * y_re
        grad_g_re += dot_re
        grad_g_im += dot_im
        mean = (tl.sum(dot_re * g_re + dot_im * g_im, 1) / D)[:, None]
        d_re = (y_re * g_re + y_im * g_im - re * mean) * scale
        d_im = (y_im * g_re - y_re * g_im - im * mean) * scale
        if grad_total is not None:
            d_re += tl.load(grad_total + at, mask=mask, other=0.0).to(tl.float32)
            d_im += tl.load(grad_total + at + D, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_z + at, d_re, mask=mask)
        tl.store(grad_z + at + D, d_im, mask=mask)
    own = partials + tl.program_id(0) * (2 * D) + tl.arange(0, BLOCK_D)
    inside = tl.arange(0, BLOCK_D) < D
    tl.store(own, tl.sum(grad_g_re, 0), mask=inside)
    tl.store(own + D, tl.sum(grad_g_im, 0), mask=inside)


def _launch(
    kernel: Any, z: Tensor, tensors: tuple[Tensor | None, ...], *numbers: float, sums: int = 0
) -> Tensor:
    """Launch a kernel on whole rows of z.

    Returns:
        What each of its programs summed over tokens: float32 (programs, sums, D), passed behind ``tensors``.
    """
    tokens, width = z.shape[:-2].numel(), z.shape[-1]

    def run(pinned: Options) -> Tensor:
        options = dict(pinned)
        block = next_power_of_2(width)
        rows = max(1, options.pop("TILE") // block)
        programs = min(options.pop("PROGRAMS", 2**31 - 1), ceil_div(tokens, rows))
        partials = z.new_empty(programs if sums else 0, sums, width, dtype=torch.float32)
        arguments = (*tensors, partials) if sums else tensors
        launch(kernel, (programs,), *arguments, tokens, width, *numbers, ROWS=rows, BLOCK_D=block, **options)
        return partials

    name = kernel.__name__.strip("_").removesuffix("_kernel")
    return run(PINNED.choose(name, z, width, run, tokens))


def rms_norm(z: Tensor, branch: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, ...]:
    """Reads z and writes out, 4 T D e bytes; with the sum 8, against 10 in two passes. 11 FLOPs a channel."""
    z, branch = z.contiguous(), contiguous(branch)
    total = None if branch is None else torch.empty_like(z)
    out, rstd = torch.empty_like(z), z.new_empty(z.shape[:-2], dtype=torch.float32)
    _launch(_rms_norm_forward_kernel, z, (z, branch, gain.contiguous(), total, out, rstd), eps)
    return (out, rstd) if total is None else (total, out, rstd)


def rms_norm_backward(
    grad: Tensor, z: Tensor, gain: Tensor, rstd: Tensor, grad_total: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Reads z and the gradient and writes one, 6 T D e bytes, 8 with the residual's. 24 FLOPs a channel."""
    z, grad = z.contiguous(), grad.contiguous()
    grad_z = torch.empty_like(z)
    tensors = (grad, contiguous(grad_total), z, gain.contiguous(), rstd, grad_z)
    partials = _launch(_rms_norm_backward_kernel, z, tensors, sums=2)
    return grad_z, partials.sum(0).to(gain.dtype)


@jit
def _whiten(v_rr, rest, slope, eps):
    """As ``_whitening``."""
    v_ri = slope * v_rr
    v_ii = rest + slope * v_ri
    s = tl.sqrt(v_rr * rest + eps * (v_rr + v_ii + eps))
    v_rr += eps
    v_ii += eps
    trace = v_rr + v_ii + 2 * s
    scale = 1 / (s * tl.sqrt(trace))
    return (v_ii + s) * scale, (v_rr + s) * scale, -v_ri * scale, s, trace, scale, v_ii, v_rr, -2 * v_ri


@jit
def _layer_norm_forward_kernel(
    z, gamma, beta, out, statistics, tokens, D, eps, tiny,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)[None, :]
    inside = cols < D
    mask = (rows[:, None] < tokens) & inside
    at = rows.to(tl.int64)[:, None] * (2 * D) + cols
    re = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    im = tl.load(z + at + D, mask=mask, other=0.0).to(tl.float32)
    mean_re = tl.sum(re, 1) / D
    mean_im = tl.sum(im, 1) / D
    re = tl.where(inside, re - mean_re[:, None], 0.0)
    im = tl.where(inside, im - mean_im[:, None], 0.0)
    v_rr = tl.sum(re * re, 1) / D
    slope = tl.sum(re * im, 1) / D / (v_rr + tiny)
    left = im - slope[:, None] * re
    rest = tl.sum(left * left, 1) / D
    tl.store(statistics + rows, mean_re, mask=rows < tokens)
    tl.store(statistics + tokens + rows, mean_im, mask=rows < tokens)
    tl.store(statistics + 2 * tokens + rows, v_rr, mask=rows < tokens)
    tl.store(statistics + 3 * tokens + rows, rest, mask=rows < tokens)
    tl.store(statistics + 4 * tokens + rows, slope, mask=rows < tokens)
    m_rr, m_ii, m_ri, _, _, _, _, _, _ = _whiten(v_rr[:, None], rest[:, None], slope[:, None], eps)
    w_re = m_rr * re + m_ri * im
    w_im = m_ii * im + m_ri * re
    g_rr = tl.load(gamma + cols, mask=inside, other=0.0).to(tl.float32)
    g_ii = tl.load(gamma + D + cols, mask=inside, other=0.0).to(tl.float32)
    g_ri = tl.load(gamma + 2 * D + cols, mask=inside, other=0.0).to(tl.float32)
    b_re = tl.load(beta + cols, mask=inside, other=0.0).to(tl.float32)
    b_im = tl.load(beta + D + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, g_rr * w_re + g_ri * w_im + b_re, mask=mask)
    tl.store(out + at + D, g_ii * w_im + g_ri * w_re + b_im, mask=mask)


@jit
def _layer_norm_backward_kernel(
    grad, z, gamma, statistics, grad_z, partials, tokens, D, eps,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_D)[None, :]
    inside = cols < D
    grad_rr = tl.zeros((ROWS, BLOCK_D), tl.float32)
    grad_ii = tl.zeros((ROWS, BLOCK_D), tl.float32)
    grad_ri = tl.zeros((ROWS, BLOCK_D), tl.float32)
    grad_b_re = tl.zeros((ROWS, BLOCK_D), tl.float32)
    grad_b_im = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows[:, None] < tokens) & inside
        at = rows.to(tl.int64)[:, None] * (2 * D) + cols
        own = statistics + rows[:, None]
        known = rows[:, None] < tokens
        mean_re = tl.load(own, mask=known, other=0.0)
        mean_im = tl.load(own + tokens, mask=known, other=0.0)
        v_rr = tl.load(own + 2 * tokens, mask=known, other=1.0)
        rest = tl.load(own + 3 * tokens, mask=known, other=1.0)
        slope = tl.load(own + 4 * tokens, mask=known, other=0.0)
        m_rr, m_ii, m_ri, s, trace, scale, by_rr, by_ii, by_ri = _whiten(v_rr, rest, slope, eps)
        # Not 0 past the last channel, where it meets gradients and gains of 0 alone.
        re = tl.load(z + at, mask=mask, other=0.0).to(tl.float32) - mean_re
        im = tl.load(z + at + D, mask=mask, other=0.0).to(tl.float32) - mean_im
        y_re = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        y_im = tl.load(grad + at + D, mask=mask, other=0.0).to(tl.float32)
        w_re = m_rr * re + m_ri * im
        w_im = m_ii * im + m_ri * re
        grad_rr += y_re * w_re
        grad_ii += y_im * w_im
        grad_ri += y_re * w_im + y_im * w_re
        grad_b_re += y_re
        grad_b_im += y_im
        g_rr = tl.load(gamma + cols, mask=inside, other=0.0).to(tl.float32)
        g_ii = tl.load(gamma + D + cols, mask=inside, other=0.0).to(tl.float32)
        g_ri = tl.load(gamma + 2 * D + cols, mask=inside, other=0.0).to(tl.float32)
        # The gradient by the whitened state, then as ``_covariance_gradient``.
        w_re = g_rr * y_re + g_ri * y_im
        w_im = g_ii * y_im + g_ri * y_re
        mean_re = tl.sum(w_re, 1)[:, None] / D
        mean_im = tl.sum(w_im, 1)[:, None] / D
        along_rr = tl.sum(w_re * re, 1)[:, None]
        along_ii = tl.sum(w_im * im, 1)[:, None]
        along_ri = tl.sum(w_re * im + w_im * re, 1)[:, None]
        along = m_rr * along_rr + m_ii * along_ii + m_ri * along_ri
        by_trace = -along / trace
        by_det = (scale * (along_rr + along_ii) - along / s + by_trace) / s
        p_rr = (2 * scale * along_ii + by_trace + by_det * by_rr) / D
        p_ii = (2 * scale * along_rr + by_trace + by_det * by_ii) / D
        p_ri = (0.5 * by_det * by_ri - scale * along_ri) / D
        w_re -= mean_re
        w_im -= mean_im
        tl.store(grad_z + at, m_rr * w_re + m_ri * w_im + p_rr * re + p_ri * im, mask=mask)
        tl.store(grad_z + at + D, m_ii * w_im + m_ri * w_re + p_ii * im + p_ri * re, mask=mask)
    own = partials + tl.program_id(0) * (5 * D) + tl.arange(0, BLOCK_D)
    inside = tl.arange(0, BLOCK_D) < D
    tl.store(own, tl.sum(grad_rr, 0), mask=inside)
    tl.store(own + D, tl.sum(grad_ii, 0), mask=inside)
    tl.store(own + 2 * D, tl.sum(grad_ri, 0), mask=inside)
    tl.store(own + 3 * D, tl.sum(grad_b_re, 0), mask=inside)
    tl.store(own + 4 * D, tl.sum(grad_b_im, 0), mask=inside)


def layer_norm(z: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Reads z and writes out, 4 T D e bytes, and 20 a token. 23 FLOPs a channel."""
    z = z.contiguous()
    out, statistics = torch.empty_like(z), z.new_empty(5, z.shape[:-2].numel(), dtype=torch.float32)
    tensors = (z, gamma.contiguous(), beta.contiguous(), out, statistics)
    _launch(_layer_norm_forward_kernel, z, tensors, eps, TINY)
    return out, statistics


def layer_norm_backward(
    grad: Tensor, z: Tensor, gamma: Tensor, statistics: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Reads z and the gradient and writes one, 6 T D e bytes. 54 FLOPs a channel."""
    z, grad = z.contiguous(), grad.contiguous()
    grad_z = torch.empty_like(z)
    tensors = (grad, z, gamma.contiguous(), statistics, grad_z)
    partials = _launch(_layer_norm_backward_kernel, z, tensors, eps, sums=5)
    return grad_z, partials[:, :3].sum(0), partials[:, 3:].sum(0)


def compile_cases() -> dict[str, Callable[[], object]]:
    """Every pinned configuration, by a label; each call launches a forward and a backward kernel."""
    cases: dict[str, Callable[[], object]] = {"rms_norm bfloat16 512": partial(_compile_rms_norm, add=False)}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for width in (1024, 4096, 8192):
            cases[f"add_rms_norm {name} {width}"] = partial(_compile_rms_norm, dtype, width)
            cases[f"layer_norm {name} {width}"] = partial(_compile_layer_norm, dtype, width)
    return cases


def _compile_rms_norm(dtype: torch.dtype = torch.bfloat16, width: int = 512, add: bool = True) -> None:
    z, gain = torch.empty(4, 2, width, dtype=dtype), torch.empty(2, width, dtype=dtype)
    *_, rstd = rms_norm(z, z if add else None, gain, 1e-6)
    rms_norm_backward(z, z, gain, rstd, z if add else None)


def _compile_layer_norm(dtype: torch.dtype, width: int) -> None:
    z, gamma = torch.empty(4, 2, width, dtype=dtype), torch.empty(3, width, dtype=dtype)
    _, statistics = layer_norm(z, gamma, gamma[:2], 1e-6)
    layer_norm_backward(z, z, gamma, statistics, 1e-6)
