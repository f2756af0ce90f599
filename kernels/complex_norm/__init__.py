"""Norms of planar complex tensors (..., 2, D): one pass over memory each way.

Maths is float32, and float64 for float64, which only the eager implementation takes; a result is rounded
once, when written. What is kept for the backward pass is the input, which exists anyway, and a few
numbers a token.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernels.chunks import like
from kernels.complex_norm import eager, triton_code
from kernels.launch import use_triton
from kernels.operator import operator
from kernels.planar import check_planar, precise

__all__ = ["add_complex_rms_norm", "complex_layer_norm", "complex_rms_norm"]


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
    check_planar(z, gain=(gain, 2))
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
    check_planar(z, gain=(gain, 2))
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
    check_planar(z, gamma=(gamma, 3), beta=(beta, 2))
    return _complex_layer_norm(z, gamma, beta, eps)[0]


@operator
def _complex_rms_norm(z: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    code = triton_code if use_triton(z) else eager
    out, rstd = code.rms_norm(z, None, gain, eps)
    return out, rstd


@operator
def _add_complex_rms_norm(
    z: Tensor, branch: Tensor, gain: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    code = triton_code if use_triton(z) else eager
    total, out, rstd = code.rms_norm(z, branch, gain, eps)
    return total, out, rstd


@operator
def _complex_rms_norm_backward(
    grad: Tensor, z: Tensor, gain: Tensor, rstd: Tensor, grad_total: Tensor | None
) -> tuple[Tensor, Tensor]:
    code = triton_code if use_triton(z) else eager
    return code.rms_norm_backward(grad, z, gain, rstd, grad_total)


def _rstd_like(z: Tensor) -> Tensor:
    return z.new_empty(z.shape[:-2], dtype=precise(z))


_complex_rms_norm.register_fake(lambda z, *_: (like(z), _rstd_like(z)))
_add_complex_rms_norm.register_fake(lambda z, *_: (like(z), like(z), _rstd_like(z)))
_complex_rms_norm_backward.register_fake(lambda grad, z, gain, *_: (like(z), like(gain)))


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


@operator
def _complex_layer_norm(z: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    code = triton_code if use_triton(z) else eager
    return code.layer_norm(z, gamma, beta, eps)


@operator
def _complex_layer_norm_backward(
    grad: Tensor, z: Tensor, gamma: Tensor, statistics: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    code = triton_code if use_triton(z) else eager
    return code.layer_norm_backward(grad, z, gamma, statistics, eps)


@_complex_layer_norm.register_fake
def _(z: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return like(z), z.new_empty(5, z.shape[:-2].numel(), dtype=precise(z))


@_complex_layer_norm_backward.register_fake
def _(grad: Tensor, z: Tensor, gamma: Tensor, statistics: Tensor, eps: float) -> tuple[Tensor, ...]:
    width = z.shape[-1]
    return like(z), statistics.new_empty(3, width), statistics.new_empty(2, width)


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
