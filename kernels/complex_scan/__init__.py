"""A linear recurrence with complex eigenvalues along the tokens of planar tensors.

The state is float32, and float64 for float64, which only the eager implementation takes; results are rounded
once, when written. What is kept for the backward pass are the inputs and the state at the beginning of every
tile of tokens, from which the states in between are computed again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernels.chunks import like
from kernels.complex_scan import eager, triton_code
from kernels.complex_scan.tiles import entries_like
from kernels.launch import use_triton
from kernels.operator import operator
from kernels.planar import precise


def complex_scan(
    u: Tensor, log_decay: Tensor, angle: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """g_t = lambda_t g_(t-1) + sqrt(1 - |lambda_t|^2) u_t with lambda_t = exp(log_decay_t + i angle).

    A gated linear recurrence (Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences",
    2023; De et al., "Griffin", 2024) whose input is scaled so that white noise of unit variance gives a state
    of unit variance. A decay of -inf forgets what was before: the first token of a packed sequence.

    Args:
        u: planar (B, S, 2, K).
        log_decay: (B, S, K), at most 0, of any floating dtype; the logarithm of |lambda|.
        angle: (K,), radians, of any floating dtype.
        state: planar (B, 2, K), that before the first token; zeros if absent.

    Returns:
        g, planar of shape and dtype of u, and the state after the last token, planar (B, 2, K) in float32, or
        float64 where u is.

    Raises:
        ValueError: shapes that do not fit.
    """
    batch, length, planes, channels = u.shape if u.ndim == 4 else (0, 0, 0, 0)
    fits = planes == 2 and length and log_decay.shape == (batch, length, channels)
    if not fits or angle.shape != (channels,):
        raise ValueError(
            f"u of shape {tuple(u.shape)}, log_decay of shape {tuple(log_decay.shape)} and angle of shape "
            f"{tuple(angle.shape)} do not fit (B, S, 2, K), (B, S, K) and (K,)"
        )
    if state is None:
        state = u.new_zeros(batch, 2, channels, dtype=precise(u))
    elif state.shape != (batch, 2, channels):
        raise ValueError(f"state has shape {tuple(state.shape)}, not {(batch, 2, channels)}")
    g, final, _ = _complex_scan(u, log_decay, angle, state)
    return g, final


@operator
def _complex_scan(
    u: Tensor, log_decay: Tensor, angle: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    code = triton_code if use_triton(u) else eager
    return code.scan(u, log_decay, angle, state)


@operator
def _complex_scan_backward(
    grad: Tensor, grad_final: Tensor, u: Tensor, log_decay: Tensor, angle: Tensor, entries: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    code = triton_code if use_triton(u) else eager
    return code.scan_backward(grad, grad_final, u, log_decay, angle, entries)


def _state_like(u: Tensor) -> Tensor:
    return u.new_empty(u.shape[0], 2, u.shape[3], dtype=precise(u))


_complex_scan.register_fake(lambda u, *_: (like(u), _state_like(u), entries_like(u)))
_complex_scan_backward.register_fake(
    lambda grad, grad_final, u, log_decay, angle, entries: (
        like(u),
        like(log_decay),
        like(angle),
        _state_like(u),
    )
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, log_decay, angle, state = inputs
    ctx.save_for_backward(u, log_decay, angle, output[2])
    ctx.state_dtype = state.dtype


def _differentiate(
    ctx: Any, grad: Tensor, grad_final: Tensor, grad_entries: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    du, d_decay, d_angle, d_state = _complex_scan_backward(grad, grad_final, *ctx.saved_tensors)
    return du, d_decay, d_angle, d_state.to(ctx.state_dtype)


_complex_scan.register_autograd(_differentiate, setup_context=_keep)

__all__ = ["complex_scan"]
