"""Norms, activations and rotary positions of planar complex tensors: one pass over memory each way.

A planar tensor is (..., 2, D): plane 0 real, plane 1 imaginary, float32, bfloat16 or float16 (float64 runs
the eager implementation only). Maths is float32 for all of these; a result is rounded once, when written.
What is kept for the backward pass is the input, which exists anyway, and a few numbers a token.

Traffic is given for T tokens of D channels and e bytes an element, so that one tensor is 2 T D e bytes. All
operations are bound by memory: 2 to 54 FLOPs a channel.

The norms' kernels hold whole rows of both planes in registers: a program takes a tile of a few tokens. Their
backward pass runs a pinned number of programs, each over many tiles, that sum the parameters' gradients in
registers and write one partial row each, so that the order of summation does not depend on the card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import Options, ceil_div, launch, next_power_of_2, pinned_beside, use_triton
from kernels.operator import operator
from kernels.planar import MODULUS_FLOOR, modulus_floor
from kernels.triton_import import jit, tl

PINNED = pinned_beside(__file__)
# Real numbers that the eager implementation works on at a time on a CPU: its buffers then stay in the cache.
CHUNK = 2**20
# The kinds of activation, and how many parameters a channel each of them has.
ACTIVATIONS = {"mod_relu": 1, "mod_swish": 2, "split_gelu": 0, "cardioid": 0, "z_relu": 0}
# Kernels whose configuration does not depend on the number of channels are pinned under this width.
ANY_WIDTH = 1

threshold_backward = torch.ops.aten.threshold_backward
sigmoid_backward = torch.ops.aten.sigmoid_backward
gelu_backward = torch.ops.aten.gelu_backward


# Public functions


def complex_rms_norm(z: Tensor, gain: Tensor, eps: float = 1e-6) -> Tensor:
    """g z / sqrt(mean_D |z|^2 + eps) with a complex gain g: equivariant under a global phase.

    Args:
        z: planar (..., 2, D).
        gain: planar (2, D), of any floating dtype.
        eps: added to the mean square.

    Returns:
        Planar, shape and dtype of z.

    Raises:
        ValueError: shapes that do not fit, or more channels than the kernels are configured for.
    """
    _check(z, gain=(gain, 2))
    return _complex_rms_norm(z, gain, eps)[0]


def add_complex_rms_norm(z: Tensor, branch: Tensor, gain: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """A residual sum and its norm in one pass: total = z + branch, normal = complex_rms_norm(total).

    Args:
        z: planar (..., 2, D).
        branch: shape and dtype of z.
        gain: planar (2, D).
        eps: added to the mean square.

    Returns:
        ``total`` rounded to the dtype of z, and ``normal``, the norm of the rounded total.

    Raises:
        ValueError: shapes or dtypes that do not fit, or more channels than the kernels are configured for.
    """
    _check(z, gain=(gain, 2))
    if branch.shape != z.shape or branch.dtype != z.dtype:
        raise ValueError(
            f"branch has shape {tuple(branch.shape)} and {branch.dtype}, z {tuple(z.shape)} and {z.dtype}"
        )
    total, normal, _ = _add_complex_rms_norm(z, branch, gain, eps)
    return total, normal


def complex_layer_norm(z: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-6) -> Tensor:
    """Whitening by the 2x2 covariance of the planes over the channels of a token, then an affine map.

    With V the covariance plus eps on its diagonal, s = sqrt(det V) and t = sqrt(V_rr + V_ii + 2 s), the
    whitening matrix is V^(-1/2) = [[V_ii + s, -V_ri], [-V_ri, V_rr + s]] / (s t) (Trabelsi et al. 2018).

    Args:
        z: planar (..., 2, D).
        gamma: (3, D), the elements rr, ii and ri of a symmetric 2x2 matrix a channel.
        beta: planar (2, D), added.
        eps: added to the diagonal of V.

    Returns:
        Planar, shape and dtype of z.

    Raises:
        ValueError: shapes that do not fit, or more channels than the kernels are configured for.
    """
    _check(z, gamma=(gamma, 3), beta=(beta, 2))
    return _complex_layer_norm(z, gamma, beta, eps)[0]


def complex_activation(
    z: Tensor, kind: str, offset: Tensor | None = None, slope: Tensor | None = None
) -> Tensor:
    """An activation; its gradient is finite everywhere, at z = 0 too.

    ``mod_relu``: relu(|z| + offset) z / |z| (Arjovsky et al. 2016), the identity where offset is 0.
    ``mod_swish``: z sigmoid(slope |z| + offset). ``split_gelu``: GELU on each plane.
    ``cardioid``: (1 + cos arg z) z / 2 (Virtue et al. 2017). ``z_relu``: z where both planes are positive,
    and 0 elsewhere (Guberman 2016).

    Args:
        z: planar (..., 2, D).
        kind: one of the above.
        offset: (D,), for mod_relu and mod_swish.
        slope: (D,), for mod_swish.

    Returns:
        Planar, shape and dtype of z.

    Raises:
        ValueError: an unknown kind, parameters that it lacks or does not take, or shapes that do not fit.
    """
    if kind not in ACTIVATIONS:
        raise ValueError(f"unknown activation {kind}; choose one of {', '.join(ACTIVATIONS)}")
    if (offset is not None, slope is not None) != (ACTIVATIONS[kind] > 0, ACTIVATIONS[kind] > 1):
        wanted = ("no parameters", "offset only", "offset and slope")[ACTIVATIONS[kind]]
        raise ValueError(f"{kind} takes {wanted}")
    _check(z)
    for name, parameter in (("offset", offset), ("slope", slope)):
        if parameter is not None and parameter.shape != z.shape[-1:]:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}, not ({z.shape[-1]},)")
    if kind == "split_gelu" and not use_triton(z):
        return F.gelu(z)
    return _complex_activation(z, kind, offset, slope)


def rotate(z: Tensor, table: Tensor, inverse: bool = False) -> Tensor:
    """z_k e^{i n omega_k}: a complex tensor turned by its position n (Su et al., RoFormer, 2021).

    A score q conj(k) of rotated q and k depends on the difference of their positions only. The table is taken
    as a constant, and its numbers must have modulus 1 for ``inverse`` to undo the rotation.

    Args:
        z: planar (..., S, 2, D).
        table: planar (S, 2, D), e^{i n omega_k}.
        inverse: turn back, by the conjugate table.

    Returns:
        Planar, shape and dtype of z.

    Raises:
        ValueError: shapes that do not fit.
    """
    if z.ndim < 3 or table.shape != z.shape[-3:] or z.shape[-2] != 2:
        raise ValueError(f"z of shape {tuple(z.shape)} does not fit a table of shape {tuple(table.shape)}")
    return _complex_rotate(z, table, inverse)


def split_heads(
    projection: Tensor, table: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys turned by their positions, and values, from one projection.

    Forward and backward write each result once, in the layout in which the next product reads it.

    Args:
        projection: planar (B, S, 2, heads + 2 kv_heads, d): queries, keys, values.
        table: planar (S, 2, d), as in ``rotate``.
        heads: query heads.
        kv_heads: key and value heads.

    Returns:
        Contiguous planar q (B, heads, S, 2, d), k and v (B, kv_heads, S, 2, d).

    Raises:
        ValueError: shapes that do not fit.
    """
    length, width = (projection.shape[1], projection.shape[4]) if projection.ndim == 5 else (0, 0)
    if projection.shape[2:4] != (2, heads + 2 * kv_heads) or table.shape != (length, 2, width):
        raise ValueError(
            f"projection of shape {tuple(projection.shape)} and table of shape {tuple(table.shape)} do not "
            f"fit {heads} query heads and {kv_heads} key and value heads"
        )
    return _complex_split_heads(projection, table, heads, kv_heads)


def _check(z: Tensor, **parameters: tuple[Tensor, int]) -> None:
    if z.ndim < 2 or z.shape[-2] != 2:
        raise ValueError(f"a planar tensor (..., 2, D) is needed, not one of shape {tuple(z.shape)}")
    for name, (parameter, rows) in parameters.items():
        if parameter.shape != (rows, z.shape[-1]):
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}, not ({rows}, {z.shape[-1]})")


# Shared by the eager implementations. On a CPU they work through some tokens at a time in float32 buffers
# that stay in the cache, so that each tensor is read from and written to memory once.


def _like(z: Tensor) -> Tensor:
    """A new contiguous tensor of z's shape and dtype."""
    return torch.empty(z.shape, dtype=z.dtype, device=z.device)


def _planes(z: Tensor) -> Tensor:
    """z (..., 2, D) seen as (2, T, D), of the same memory where that is possible."""
    return z.reshape(z.shape[:-2].numel(), *z.shape[-2:]).transpose(0, 1)


def _step(x: Tensor, numbers: int) -> int:
    """How many slices of so many numbers to work on at a time."""
    return max(1, CHUNK // max(1, numbers)) if x.device.type == "cpu" else 2**62


def _chunks(x: Tensor, buffers: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of tokens of x (2, T, D), and for each buffers (count, 2, T', D) in the dtype of the maths."""
    planes, tokens, width = x.shape
    step = max(1, min(tokens, _step(x, planes * width)))
    work = torch.empty(buffers, planes * step * width, dtype=_precise(x), device=x.device)
    for start in range(0, tokens, step):
        count = min(step, tokens - start)
        own = work[:, : planes * count * width].view(buffers, count, planes, width)
        yield slice(start, start + count), own.transpose(1, 2)


def _precise(x: Tensor) -> torch.dtype:
    """The dtype of the maths."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _read(x: Tensor, buffer: Tensor) -> Tensor:
    """x in the dtype of the buffer, which is filled only where that differs."""
    return x if x.dtype == buffer.dtype else buffer.copy_(x)


def _to_write(out: Tensor, buffer: Tensor) -> Tensor:
    """Where to compute what becomes ``out``: there, if the dtype is right."""
    return out if out.dtype == buffer.dtype else buffer


def _write(out: Tensor, computed: Tensor) -> None:
    """Round into ``out`` what was not computed there."""
    if out.dtype != computed.dtype:
        out.copy_(computed)


# RMS norm, alone and of a residual sum


def _rms_norm_eager(z: Tensor, branch: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, ...]:
    out = _like(z)
    total = _like(z) if branch is not None else z
    rstd = torch.empty(z.shape[:-2], dtype=_precise(z), device=z.device)
    g_re, g_im = gain.to(rstd.dtype)
    x, summed, results, flat = _planes(z), _planes(total), _planes(out), rstd.view(-1)
    added = None if branch is None else _planes(branch)
    for rows, (a, b) in _chunks(x, 2):
        if added is not None:
            torch.add(x[:, rows], added[:, rows], out=summed[:, rows])
        part = _read(summed[:, rows], a)
        length = torch.linalg.vector_norm(part.transpose(0, 1).flatten(1), dim=-1, out=flat[rows])
        scale = length.square_().div_(z.shape[-1]).add_(eps).rsqrt_()[:, None]
        re, im = torch.mul(part, scale, out=a)
        y = _to_write(results[:, rows], b)
        torch.mul(re, g_re, out=y[0]).addcmul_(im, g_im, value=-1)
        torch.mul(re, g_im, out=y[1]).addcmul_(im, g_re)
        _write(results[:, rows], y)
    return (out, rstd) if branch is None else (total, out, rstd)


def _rms_norm_backward_eager(
    grad: Tensor, z: Tensor, gain: Tensor, rstd: Tensor, grad_total: Tensor | None
) -> tuple[Tensor, Tensor]:
    grad_z = _like(z)
    x, grad_y, results, flat = _planes(z), _planes(grad), _planes(grad_z), rstd.view(-1)
    passed = None if grad_total is None else _planes(grad_total)
    g_re, g_im = gain.to(rstd.dtype)
    grad_gain = rstd.new_zeros(gain.shape)
    for rows, (a, b, c) in _chunks(x, 3):
        scale = flat[rows, None]
        n_re, n_im = torch.mul(_read(x[:, rows], a), scale, out=a)
        y_re, y_im = _read(grad_y[:, rows], b)
        # conj(n) y holds what both the gain's gradient and the mean are made of.
        torch.mul(n_re, y_re, out=c[0]).addcmul_(n_im, y_im)
        torch.mul(n_re, y_im, out=c[1]).addcmul_(n_im, y_re, value=-1)
        grad_gain += c.sum(1)
        mean = torch.mv(c[0], g_re).addmv_(c[1], g_im).div_(-z.shape[-1])[:, None]
        dz = _to_write(results[:, rows], c)
        torch.mul(y_re, g_re, out=dz[0]).addcmul_(y_im, g_im)
        torch.mul(y_im, g_re, out=dz[1]).addcmul_(y_re, g_im, value=-1)
        dz.addcmul_(a, mean).mul_(scale)
        if passed is not None:
            dz.add_(_read(passed[:, rows], b))
        _write(results[:, rows], dz)
    return grad_z, grad_gain.to(gain.dtype)


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


def _by_whole_rows(kernel: str, z: Tensor, tokens: int, run: Callable[[int, Options], Any]) -> Any:
    """Call ``run`` with how many programs a kernel of the norms gets, and the constants of their tiles."""

    def run_with(pinned: Options) -> Any:
        options = dict(pinned)
        block = next_power_of_2(z.shape[-1])
        rows = max(1, options.pop("TILE") // block)
        programs = min(options.pop("PROGRAMS", 2**31 - 1), ceil_div(tokens, rows))
        return run(programs, {"ROWS": rows, "BLOCK_D": block, **options})

    return run_with(PINNED.choose(kernel, z, z.shape[-1], run_with, tokens))


def _rms_norm_triton(z: Tensor, branch: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, ...]:
    """Reads z and writes out, 4 T D e bytes; with the sum 8, against 10 in two passes. 11 FLOPs a channel."""
    z = z.contiguous()
    branch = None if branch is None else branch.contiguous()
    total = None if branch is None else torch.empty_like(z)
    out, rstd = torch.empty_like(z), z.new_empty(z.shape[:-2], dtype=torch.float32)
    tokens, width = rstd.numel(), z.shape[-1]

    def run(programs: int, options: Options) -> None:
        launch(
            _rms_norm_forward_kernel,
            (programs,),
            *(z, branch, gain.contiguous(), total, out, rstd, tokens, width, eps),
            **options,
        )

    _by_whole_rows("rms_norm_forward", z, tokens, run)
    return (out, rstd) if total is None else (total, out, rstd)


def _rms_norm_backward_triton(
    grad: Tensor, z: Tensor, gain: Tensor, rstd: Tensor, grad_total: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Reads z and the gradient and writes one, 6 T D e bytes, 8 with the residual's. 24 FLOPs a channel."""
    z, grad = z.contiguous(), grad.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    grad_z, tokens, width = torch.empty_like(z), rstd.numel(), z.shape[-1]

    def run(programs: int, options: Options) -> Tensor:
        partials = rstd.new_empty(programs, 2, width)
        launch(
            _rms_norm_backward_kernel,
            (programs,),
            *(grad, grad_total, z, gain.contiguous(), rstd, grad_z, partials, tokens, width),
            **options,
        )
        return partials

    partials = _by_whole_rows("rms_norm_backward", z, tokens, run)
    return grad_z, partials.sum(0).to(gain.dtype)


@operator
def _complex_rms_norm(z: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    run = _rms_norm_triton if use_triton(z) else _rms_norm_eager
    out, rstd = run(z, None, gain, eps)
    return out, rstd


@operator
def _add_complex_rms_norm(
    z: Tensor, branch: Tensor, gain: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    run = _rms_norm_triton if use_triton(z) else _rms_norm_eager
    total, out, rstd = run(z, branch, gain, eps)
    return total, out, rstd


@operator
def _complex_rms_norm_backward(
    grad: Tensor, z: Tensor, gain: Tensor, rstd: Tensor, grad_total: Tensor | None
) -> tuple[Tensor, Tensor]:
    run = _rms_norm_backward_triton if use_triton(z) else _rms_norm_backward_eager
    return run(grad, z, gain, rstd, grad_total)


@_complex_rms_norm.register_fake
def _(z: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _like(z), z.new_empty(z.shape[:-2], dtype=_precise(z))


@_add_complex_rms_norm.register_fake
def _(z: Tensor, branch: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _like(z), _like(z), z.new_empty(z.shape[:-2], dtype=_precise(z))


@_complex_rms_norm_backward.register_fake
def _(
    grad: Tensor, z: Tensor, gain: Tensor, rstd: Tensor, grad_total: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _like(z), _like(gain)


def _keep_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # The state that was normalised: the input, or the first output, the sum.
    z, gain, state = inputs[0], inputs[-2], output[0]
    added = len(output) == 3
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(not added)
    ctx.save_for_backward(state if added else z, gain, output[-1])


def _differentiate_rms_norm(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    grad_z, grad_gain = _complex_rms_norm_backward(grad, *ctx.saved_tensors, None)
    return grad_z, grad_gain, None


def _differentiate_add_rms_norm(
    ctx: Any, grad_total: Tensor | None, grad: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return grad_total, grad_total, None, None
    grad_z, grad_gain = _complex_rms_norm_backward(grad, *ctx.saved_tensors, grad_total)
    return grad_z, grad_z, grad_gain, None


_complex_rms_norm.register_autograd(_differentiate_rms_norm, setup_context=_keep_rms_norm)
_add_complex_rms_norm.register_autograd(_differentiate_add_rms_norm, setup_context=_keep_rms_norm)


# Layer norm. Statistics are five numbers a token: the planes' means, V_rr, the variance of what is left of
# the imaginary plane without its part along the real one, and the slope V_ri / V_rr of that part, all without
# eps. det V = V_rr V_ii - V_ri^2 is then V_rr times what is left: never negative, and right where the planes
# are nearly dependent and the difference would be nothing but rounding.
TINY = 1e-30  # Added to V_rr, which may be zero, when it divides.


def _layer_norm_eager(z: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out = _like(z)
    x, results = _planes(z), _planes(out)
    statistics = torch.empty(5, x.shape[1], dtype=_precise(z), device=z.device)
    g_rr, g_ii, g_ri = gamma.to(statistics.dtype)
    b_re, b_im = beta.to(statistics.dtype)
    for rows, (a, b) in _chunks(x, 2):
        part = _read(x[:, rows], a)
        mean = part.mean(-1)
        re, im = torch.sub(part, mean[..., None], out=a)
        statistics[:2, rows] = mean
        v_rr, rest, slope = statistics[2:, rows]
        torch.linalg.vector_norm(re, dim=-1, out=v_rr).square_().div_(z.shape[-1])
        torch.div(torch.mul(re, im, out=b[0]).mean(-1), v_rr + TINY, out=slope)
        left = torch.addcmul(im, re, slope[:, None], value=-1, out=b[0])
        torch.linalg.vector_norm(left, dim=-1, out=rest).square_().div_(z.shape[-1])
        m_rr, m_ii, m_ri = _whitening(statistics[:, rows, None], eps)[0]
        white_re = torch.mul(re, m_rr, out=b[0]).addcmul_(im, m_ri)
        white_im = torch.mul(im, m_ii, out=b[1]).addcmul_(re, m_ri)
        y = _to_write(results[:, rows], a)
        torch.addcmul(b_re, white_re, g_rr, out=y[0]).addcmul_(white_im, g_ri)
        torch.addcmul(b_im, white_im, g_ii, out=y[1]).addcmul_(white_re, g_ri)
        _write(results[:, rows], y)
    return out, statistics


def _whitening(statistics: Tensor, eps: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Elements rr, ii, ri of V^(-1/2); and s, t^2, 1 / (s t), the gradients of det V by V_rr, V_ii, V_ri."""
    _, _, v_rr, rest, slope = statistics
    v_ri = slope * v_rr
    v_ii = rest + slope * v_ri
    s = (v_rr * rest + eps * (v_rr + v_ii + eps)).sqrt()
    v_rr, v_ii = v_rr + eps, v_ii + eps
    trace = v_rr + v_ii + 2 * s
    scale = 1 / (s * trace.sqrt())
    matrix = ((v_ii + s) * scale, (v_rr + s) * scale, -v_ri * scale)
    return matrix, (s, trace, scale, v_ii, v_rr, -2 * v_ri)


def _layer_norm_backward_eager(
    grad: Tensor, z: Tensor, gamma: Tensor, statistics: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_z = _like(z)
    x, grad_y, results = _planes(z), _planes(grad), _planes(grad_z)
    g_rr, g_ii, g_ri = gamma.to(statistics.dtype)
    width = z.shape[-1]
    grad_gamma, grad_beta = (statistics.new_zeros(count, width) for count in (3, 2))
    columns = statistics[..., None]
    matrix, parts = (torch.stack(numbers) for numbers in _whitening(columns, eps))
    for rows, (a, b, c, d) in _chunks(x, 4):
        m_rr, m_ii, m_ri = matrix[:, rows]
        re, im = torch.sub(_read(x[:, rows], a), columns[:2, rows], out=a)
        y = _read(grad_y[:, rows], b)
        y_re, y_im = y
        white_re = torch.mul(re, m_rr, out=c[0]).addcmul_(im, m_ri)
        white_im = torch.mul(im, m_ii, out=c[1]).addcmul_(re, m_ri)
        grad_gamma[:2] += torch.mul(y, c, out=d).sum(1)
        grad_gamma[2] += torch.mul(y_re, white_im, out=d[0]).addcmul_(y_im, white_re).sum(0)
        grad_beta += y.sum(1)
        # The gradient by the whitened state takes the place of the latter.
        w_re = torch.mul(y_re, g_rr, out=c[0]).addcmul_(y_im, g_ri)
        w_im = torch.mul(y_im, g_ii, out=c[1]).addcmul_(y_re, g_ri)
        along_rr, along_ii = torch.mul(c, a, out=d).sum(-1, keepdim=True)
        along_ri = torch.mul(w_re, im, out=d[0]).addcmul_(w_im, re).sum(-1, keepdim=True)
        p_rr, p_ii, p_ri = _covariance_gradient(along_rr, along_ii, along_ri, matrix[:, rows], parts[:, rows])
        c -= c.mean(-1, keepdim=True)
        dz = _to_write(results[:, rows], d)
        torch.mul(re, p_rr.div_(width), out=dz[0]).addcmul_(im, p_ri.div_(width))
        dz[0].addcmul_(w_re, m_rr).addcmul_(w_im, m_ri)
        torch.mul(im, p_ii.div_(width), out=dz[1]).addcmul_(re, p_ri)
        dz[1].addcmul_(w_im, m_ii).addcmul_(w_re, m_ri)
        _write(results[:, rows], dz)
    return grad_z, grad_gamma, grad_beta


def _covariance_gradient(
    along_rr: Tensor, along_ii: Tensor, along_ri: Tensor, matrix: Tensor, parts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Twice the gradients by V_rr and V_ii, and that by V_ri, from those by the elements of V^(-1/2)."""
    s, trace, scale, by_rr, by_ii, by_ri = parts
    along = matrix[0] * along_rr + matrix[1] * along_ii + matrix[2] * along_ri
    by_trace = along / -trace
    by_s = scale * (along_rr + along_ii) - along / s + by_trace
    by_det = by_s / s
    return (
        2 * scale * along_ii + by_trace + by_det * by_rr,
        2 * scale * along_rr + by_trace + by_det * by_ii,
        0.5 * by_det * by_ri - scale * along_ri,
    )


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
        re = tl.where(inside, tl.load(z + at, mask=mask, other=0.0).to(tl.float32) - mean_re, 0.0)
        im = tl.where(inside, tl.load(z + at + D, mask=mask, other=0.0).to(tl.float32) - mean_im, 0.0)
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


def _layer_norm_triton(z: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Reads z and writes out, 4 T D e bytes, and 20 a token. 23 FLOPs a channel."""
    z = z.contiguous()
    tokens, width = z.shape[:-2].numel(), z.shape[-1]
    out, statistics = torch.empty_like(z), z.new_empty(5, tokens, dtype=torch.float32)

    def run(programs: int, options: Options) -> None:
        launch(
            _layer_norm_forward_kernel,
            (programs,),
            *(z, gamma.contiguous(), beta.contiguous(), out, statistics, tokens, width, eps, TINY),
            **options,
        )

    _by_whole_rows("layer_norm_forward", z, tokens, run)
    return out, statistics


def _layer_norm_backward_triton(
    grad: Tensor, z: Tensor, gamma: Tensor, statistics: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Reads z and the gradient and writes one, 6 T D e bytes. 54 FLOPs a channel."""
    z, grad = z.contiguous(), grad.contiguous()
    grad_z, tokens, width = torch.empty_like(z), statistics.shape[1], z.shape[-1]

    def run(programs: int, options: Options) -> Tensor:
        partials = statistics.new_empty(programs, 5, width)
        launch(
            _layer_norm_backward_kernel,
            (programs,),
            *(grad, z, gamma.contiguous(), statistics, grad_z, partials, tokens, width, eps),
            **options,
        )
        return partials

    partials = _by_whole_rows("layer_norm_backward", z, tokens, run)
    return grad_z, partials[:, :3].sum(0), partials[:, 3:].sum(0)


@operator
def _complex_layer_norm(z: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    run = _layer_norm_triton if use_triton(z) else _layer_norm_eager
    return run(z, gamma, beta, eps)


@operator
def _complex_layer_norm_backward(
    grad: Tensor, z: Tensor, gamma: Tensor, statistics: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    run = _layer_norm_backward_triton if use_triton(z) else _layer_norm_backward_eager
    return run(grad, z, gamma, statistics, eps)


@_complex_layer_norm.register_fake
def _(z: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _like(z), z.new_empty(5, z.shape[:-2].numel(), dtype=_precise(z))


@_complex_layer_norm_backward.register_fake
def _(
    grad: Tensor, z: Tensor, gamma: Tensor, statistics: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    width = z.shape[-1]
    return _like(z), statistics.new_empty(3, width), statistics.new_empty(2, width)


def _keep_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, gamma, beta, ctx.eps = inputs
    ctx.beta_dtype = beta.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(z, gamma, output[1])


def _differentiate_layer_norm(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    z, gamma, statistics = ctx.saved_tensors
    grad_z, grad_gamma, grad_beta = _complex_layer_norm_backward(grad, z, gamma, statistics, ctx.eps)
    return grad_z, grad_gamma.to(gamma.dtype), grad_beta.to(ctx.beta_dtype), None


_complex_layer_norm.register_autograd(_differentiate_layer_norm, setup_context=_keep_layer_norm)


# Activations. With r = |z| and d = Re(conj(z) y) for a gradient y, a gate h(r) z has the gradient
# h y + h'(r) d z / r.


def activation_eager(z: Tensor, kind: str, offset: Tensor | None, slope: Tensor | None) -> Tensor:
    """The eager implementation of an activation, see ``complex_activation``."""
    if kind == "split_gelu":
        return F.gelu(z).contiguous()
    out = _like(z)
    x, results = _planes(z), _planes(out)
    if kind == "z_relu":
        _first_quadrant(x, x, results)
        return out
    parameters = _parameters(z, offset, slope)
    for rows, (a, b) in _chunks(x, 2):
        part = _read(x[:, rows], a)
        _, gate = _gate(part, kind, parameters, activation_floor(z, kind), b)
        y = _to_write(results[:, rows], a)
        torch.mul(part, gate, out=y)
        _write(results[:, rows], y)
    return out


def _parameters(z: Tensor, *parameters: Tensor | None) -> list[Tensor]:
    return [p.to(_precise(z)) for p in parameters if p is not None]


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
    step = _step(x, x.shape[0] * x.shape[2])
    for start in range(0, x.shape[1], step):
        rows = slice(start, start + step)
        least = torch.minimum(*x[:, rows])
        threshold_backward.grad_input(values[:, rows], least, 0, grad_input=out[:, rows])


def _activation_backward_eager(
    grad: Tensor, z: Tensor, kind: str, offset: Tensor | None, slope: Tensor | None
) -> tuple[Tensor, Tensor]:
    sums = torch.zeros(ACTIVATIONS[kind], z.shape[-1], dtype=_precise(z), device=z.device)
    if kind == "split_gelu":
        return gelu_backward(grad, z).contiguous(), sums
    grad_z = _like(z)
    x, grad_y, results = _planes(z), _planes(grad), _planes(grad_z)
    if kind == "z_relu":
        _first_quadrant(grad_y, x, results)
        return grad_z, sums
    parameters = _parameters(z, offset, slope)
    for rows, (a, b, c, d) in _chunks(x, 4):
        part, y = _read(x[:, rows], a), _read(grad_y[:, rows], b)
        size, gate = _gate(part, kind, parameters, activation_floor(z, kind), c)
        dot, turn = _halves(d)
        torch.mul(part[0], y[0], out=dot).addcmul_(part[1], y[1])
        dz = _to_write(results[:, rows], b)
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
        _write(results[:, rows], dz)
    return grad_z, sums


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


def _by_tiles(
    kernel: str,
    z: Tensor,
    tokens: int,
    run: Callable[[tuple[int, int], Options], Any],
    *more: object,
    sums: bool = False,
) -> Any:
    """Call ``run`` with a grid over tokens and channels, and the constants, of a kernel without whole rows.

    A kernel that sums over tokens runs the pinned number of programs in all, others one a tile. ``more`` is
    what else decides about the time.
    """
    width = z.shape[-1]

    def run_with(pinned: Options) -> Any:
        options = dict(pinned)
        block = min(next_power_of_2(width), options.pop("COLUMNS"))
        rows = options.pop("TILE") // block
        programs, columns = ceil_div(tokens, rows), ceil_div(width, block)
        most = options.pop("PROGRAMS", 0)
        if sums:
            programs = min(programs, ceil_div(most, columns))
        return run((programs, columns), {"ROWS": rows, "BLOCK_D": block, **options})

    return run_with(PINNED.choose(kernel, z, ANY_WIDTH, run_with, tokens, width, *more))


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _activation_triton(z: Tensor, kind: str, offset: Tensor | None, slope: Tensor | None) -> Tensor:
    """Reads z and writes out, 4 T D e bytes. 2 (z_relu) to 30 (split_gelu) FLOPs a channel."""
    z = z.contiguous()
    out, tokens, width = torch.empty_like(z), z.shape[:-2].numel(), z.shape[-1]

    def run(grid: tuple[int, int], options: Options) -> None:
        launch(
            _activation_forward_kernel,
            grid,
            *(z, _contiguous(offset), _contiguous(slope), out, tokens, width, activation_floor(z, kind)),
            KIND=kind,
            **options,
        )

    _by_tiles("activation_forward", z, tokens, run, kind)
    return out


def _activation_backward_triton(
    grad: Tensor, z: Tensor, kind: str, offset: Tensor | None, slope: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Reads z and the gradient, writes one, 6 T D e bytes. 2 (z_relu) to 50 (split_gelu) FLOPs a channel."""
    z, grad = z.contiguous(), grad.contiguous()
    grad_z, tokens, width = torch.empty_like(z), z.shape[:-2].numel(), z.shape[-1]

    def run(grid: tuple[int, int], options: Options) -> Tensor:
        partials = z.new_empty(grid[0], ACTIVATIONS[kind], width, dtype=torch.float32)
        launch(
            _activation_backward_kernel,
            grid,
            *(grad, z, _contiguous(offset), _contiguous(slope), grad_z, partials, tokens, width),
            activation_floor(z, kind),
            KIND=kind,
            **options,
        )
        return partials

    partials = _by_tiles("activation_backward", z, tokens, run, kind, sums=ACTIVATIONS[kind] > 0)
    return grad_z, partials.sum(0)


@operator
def _complex_activation(z: Tensor, kind: str, offset: Tensor | None, slope: Tensor | None) -> Tensor:
    run = _activation_triton if use_triton(z) else activation_eager
    return run(z, kind, offset, slope)


@operator
def complex_activation_backward(
    grad: Tensor, z: Tensor, kind: str, offset: Tensor | None, slope: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of z and, as rows, of the parameters in float32."""
    run = _activation_backward_triton if use_triton(z) else _activation_backward_eager
    return run(grad, z, kind, offset, slope)


@_complex_activation.register_fake
def _(z: Tensor, kind: str, offset: Tensor | None, slope: Tensor | None) -> Tensor:
    return _like(z)


@complex_activation_backward.register_fake
def _(
    grad: Tensor, z: Tensor, kind: str, offset: Tensor | None, slope: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _like(z), z.new_empty(ACTIVATIONS[kind], z.shape[-1], dtype=_precise(z))


def _keep_activation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, ctx.kind, offset, slope = inputs
    ctx.save_for_backward(z, offset, slope)


def _differentiate_activation(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    z, offset, slope = ctx.saved_tensors
    grad_z, gradients = complex_activation_backward(grad, z, ctx.kind, offset, slope)
    by_offset = gradients[0].to(offset.dtype) if offset is not None else None
    by_slope = gradients[1].to(slope.dtype) if slope is not None else None
    return grad_z, None, by_offset, by_slope


_complex_activation.register_autograd(_differentiate_activation, setup_context=_keep_activation)


# Rotary positions, alone and on the way from a projection to heads


def _turn_eager(out: Tensor, z: Tensor, table: Tensor, inverse: bool) -> None:
    """Write planar z (N, S, 2, H, D) times the table (S, 2, D), or its conjugate, into ``out``."""
    batch, length, planes, heads, width = z.shape
    token = planes * heads * width
    span = min(length, _step(z, token))
    items = min(batch, _step(z, length * token))
    cos, sin = table.to(_precise(z)).unsqueeze(2).unbind(1)
    work = torch.empty(2, items, span, planes, heads, width, dtype=cos.dtype, device=z.device)
    for start in range(0, length, max(1, span)):
        here = slice(start, start + span)
        c, s = cos[here], sin[here]
        for first in range(0, batch, max(1, items)):
            chunk, result = z[first : first + items, here], out[first : first + items, here]
            a, b = work[:, : chunk.shape[0], : chunk.shape[1]]
            re, im = _read(chunk, a).unbind(2)
            y = _to_write(result, b)
            torch.mul(re, c, out=y[:, :, 0]).addcmul_(im, s, value=1 if inverse else -1)
            torch.mul(im, c, out=y[:, :, 1]).addcmul_(re, s, value=-1 if inverse else 1)
            _write(result, y)


def _rotate_eager(z: Tensor, table: Tensor, inverse: bool) -> Tensor:
    out = _like(z)
    turned, flat = (x.reshape(z.shape[:-3].numel(), *z.shape[-3:]).unsqueeze(-2) for x in (out, z))
    _turn_eager(turned, flat, table, inverse)
    return out


def _as_projected(heads: Tensor) -> Tensor:
    """(B, H, S, 2, d) seen as (B, S, 2, H, d)."""
    return heads.permute(0, 2, 3, 1, 4)


def _split_heads_eager(
    projection: Tensor, table: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, _, _, width = projection.shape
    outs = [projection.new_empty(batch, count, length, 2, width) for count in (heads, kv_heads, kv_heads)]
    parts = projection.split((heads, kv_heads, kv_heads), dim=3)
    for out, part in zip(outs[:2], parts[:2], strict=True):
        _turn_eager(_as_projected(out), part, table, inverse=False)
    _as_projected(outs[2]).copy_(parts[2])
    return outs[0], outs[1], outs[2]


def _split_heads_backward_eager(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, table: Tensor) -> Tensor:
    batch, heads, length, _, width = grad_q.shape
    kv_heads = grad_k.shape[1]
    grad = grad_q.new_empty(batch, length, 2, heads + 2 * kv_heads, width)
    q, k, v = grad.split((heads, kv_heads, kv_heads), dim=3)
    _turn_eager(q, _as_projected(grad_q), table, inverse=True)
    _turn_eager(k, _as_projected(grad_k), table, inverse=True)
    v.copy_(_as_projected(grad_v))
    return grad


@jit
def _rotate_kernel(
    z, table, out, tokens, length, D,
    INVERSE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    mask = (rows < tokens) & (cols < D)
    at = rows.to(tl.int64) * (2 * D) + cols
    angle = (rows % length).to(tl.int64) * (2 * D) + cols
    cos = tl.load(table + angle, mask=mask, other=0.0)
    sin = tl.load(table + angle + D, mask=mask, other=0.0)
    if INVERSE:
        sin = -sin
    re = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    im = tl.load(z + at + D, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, re * cos - im * sin, mask=mask)
    tl.store(out + at + D, re * sin + im * cos, mask=mask)


@jit
def _split_heads_kernel(
    projection, q, k, v, table, tokens, length, heads, kv_heads, D,
    BACKWARD: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One head of a few tokens a program; BACKWARD makes the projection's gradient of those of q, k and v."""
    head = tl.program_id(1)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = (tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    mask = (rows < tokens) & (cols < D)
    plane = (heads + 2 * kv_heads) * D
    item = (rows // length).to(tl.int64)
    position = (rows % length).to(tl.int64)
    joined = projection + rows.to(tl.int64) * (2 * plane) + head * D + cols
    angle = table + position * (2 * D) + cols
    if head < heads:
        apart = q + ((item * heads + head) * length + position) * (2 * D) + cols
        _turn_head(joined, apart, angle, mask, plane, D, BACKWARD)
    elif head < heads + kv_heads:
        apart = k + ((item * kv_heads + head - heads) * length + position) * (2 * D) + cols
        _turn_head(joined, apart, angle, mask, plane, D, BACKWARD)
    else:
        apart = v + ((item * kv_heads + head - heads - kv_heads) * length + position) * (2 * D) + cols
        if BACKWARD:
            tl.store(joined, tl.load(apart, mask=mask), mask=mask)
            tl.store(joined + plane, tl.load(apart + D, mask=mask), mask=mask)
        else:
            tl.store(apart, tl.load(joined, mask=mask), mask=mask)
            tl.store(apart + D, tl.load(joined + plane, mask=mask), mask=mask)


@jit
def _turn_head(joined, apart, angle, mask, plane, D, BACKWARD: tl.constexpr):
    cos = tl.load(angle, mask=mask, other=0.0)
    sin = tl.load(angle + D, mask=mask, other=0.0)
    if BACKWARD:
        re = tl.load(apart, mask=mask, other=0.0).to(tl.float32)
        im = tl.load(apart + D, mask=mask, other=0.0).to(tl.float32)
        tl.store(joined, re * cos + im * sin, mask=mask)
        tl.store(joined + plane, im * cos - re * sin, mask=mask)
    else:
        re = tl.load(joined, mask=mask, other=0.0).to(tl.float32)
        im = tl.load(joined + plane, mask=mask, other=0.0).to(tl.float32)
        tl.store(apart, re * cos - im * sin, mask=mask)
        tl.store(apart + D, re * sin + im * cos, mask=mask)


def _rotate_triton(z: Tensor, table: Tensor, inverse: bool) -> Tensor:
    """Reads z and writes out, 4 T D e bytes, and the table, 8 S D. 6 FLOPs a channel."""
    z = z.contiguous()
    out, tokens = torch.empty_like(z), z.shape[:-2].numel()
    table = table.float().contiguous()

    def run(grid: tuple[int, int], options: Options) -> None:
        launch(
            _rotate_kernel,
            grid,
            *(z, table, out, tokens, z.shape[-3], z.shape[-1]),
            INVERSE=inverse,
            **options,
        )

    _by_tiles("rotate", z, tokens, run)
    return out


def _launch_split_heads(
    projection: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, backward: bool
) -> None:
    """Reads and writes the projection's size once, and the table. 6 FLOPs a channel of queries and keys."""
    batch, heads, length, _, width = q.shape
    kv_heads, tokens, table = k.shape[1], batch * length, table.float().contiguous()

    def run(grid: tuple[int, int], options: Options) -> None:
        launch(
            _split_heads_kernel,
            (grid[0], heads + 2 * kv_heads, grid[1]),
            *(projection, q, k, v, table, tokens, length, heads, kv_heads, width),
            BACKWARD=backward,
            **options,
        )

    _by_tiles("split_heads", projection, tokens, run, heads, kv_heads, backward)


def _split_heads_triton(
    projection: Tensor, table: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, _, _, width = projection.shape
    q, k, v = (projection.new_empty(batch, count, length, 2, width) for count in (heads, kv_heads, kv_heads))
    _launch_split_heads(projection.contiguous(), q, k, v, table, backward=False)
    return q, k, v


def _split_heads_backward_triton(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, table: Tensor) -> Tensor:
    batch, heads, length, _, width = grad_q.shape
    grad = grad_q.new_empty(batch, length, 2, heads + 2 * grad_k.shape[1], width)
    q, k, v = grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous()
    _launch_split_heads(grad, q, k, v, table, backward=True)
    return grad


@operator
def _complex_rotate(z: Tensor, table: Tensor, inverse: bool) -> Tensor:
    run = _rotate_triton if use_triton(z) else _rotate_eager
    return run(z, table, inverse)


@operator
def _complex_split_heads(
    projection: Tensor, table: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    run = _split_heads_triton if use_triton(projection) else _split_heads_eager
    return run(projection, table, heads, kv_heads)


@operator
def _complex_split_heads_backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, table: Tensor) -> Tensor:
    run = _split_heads_backward_triton if use_triton(grad_q) else _split_heads_backward_eager
    return run(grad_q, grad_k, grad_v, table)


@_complex_rotate.register_fake
def _(z: Tensor, table: Tensor, inverse: bool) -> Tensor:
    return _like(z)


@_complex_split_heads.register_fake
def _(projection: Tensor, table: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, _, _, width = projection.shape
    q, k, v = (projection.new_empty(batch, count, length, 2, width) for count in (heads, kv_heads, kv_heads))
    return q, k, v


@_complex_split_heads_backward.register_fake
def _(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, table: Tensor) -> Tensor:
    batch, heads, length, _, width = grad_q.shape
    return grad_q.new_empty(batch, length, 2, heads + 2 * grad_k.shape[1], width)


def _keep_rotation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, table, ctx.inverse = inputs
    ctx.save_for_backward(table)


def _differentiate_rotation(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _complex_rotate(grad, *ctx.saved_tensors, not ctx.inverse), None, None


def _keep_split_heads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[1])


def _differentiate_split_heads(
    ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
) -> tuple[Tensor | None, ...]:
    return _complex_split_heads_backward(grad_q, grad_k, grad_v, *ctx.saved_tensors), None, None, None


_complex_rotate.register_autograd(_differentiate_rotation, setup_context=_keep_rotation)
_complex_split_heads.register_autograd(_differentiate_split_heads, setup_context=_keep_split_heads)


# Compilation ahead of time


def compile_cases() -> dict[str, Callable[[], object]]:
    """Every pinned configuration, by a label; each call launches a forward and a backward kernel."""
    cases: dict[str, Callable[[], object]] = {"rms_norm bfloat16 512": partial(_compile_rms_norm, add=False)}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for width in (1024, 4096, 8192):
            cases[f"add_rms_norm {name} {width}"] = partial(_compile_rms_norm, dtype, width)
            cases[f"layer_norm {name} {width}"] = partial(_compile_layer_norm, dtype, width)
        for kind in ACTIVATIONS:
            cases[f"{kind} {name}"] = partial(_compile_activation, dtype, kind)
        cases[f"rotate and split_heads {name}"] = partial(_compile_rotation, dtype)
    return cases


def _compile_rms_norm(dtype: torch.dtype = torch.bfloat16, width: int = 512, add: bool = True) -> None:
    z, gain = torch.empty(4, 2, width, dtype=dtype), torch.empty(2, width, dtype=dtype)
    *_, rstd = _rms_norm_triton(z, z if add else None, gain, 1e-6)
    _rms_norm_backward_triton(z, z, gain, rstd, z if add else None)


def _compile_layer_norm(dtype: torch.dtype, width: int) -> None:
    z, gamma = torch.empty(4, 2, width, dtype=dtype), torch.empty(3, width, dtype=dtype)
    _, statistics = _layer_norm_triton(z, gamma, gamma[:2], 1e-6)
    _layer_norm_backward_triton(z, z, gamma, statistics, 1e-6)


def _compile_activation(dtype: torch.dtype, kind: str) -> None:
    z = torch.empty(4, 2, 2048, dtype=dtype)
    offset, slope = (z[0, 0] if ACTIVATIONS[kind] > count else None for count in range(2))
    _activation_triton(z, kind, offset, slope)
    _activation_backward_triton(z, z, kind, offset, slope)


def _compile_rotation(dtype: torch.dtype) -> None:
    projection, table = torch.empty(2, 16, 2, 8, 64, dtype=dtype), torch.empty(16, 2, 64)
    q, k, v = _split_heads_triton(projection, table, 4, 2)
    _split_heads_backward_triton(q, k, v, table)
    _rotate_triton(q, table, inverse=False)
