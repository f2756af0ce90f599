"""Activations of planar complex tensors (..., 2, D): one pass over memory each way.

Maths is float32, and float64 for float64, which only the eager implementation takes; a result is rounded
once, when written. What is kept for the backward pass is the input, which exists anyway.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kernels.chunks import like
from kernels.complex_activation import eager, triton_code
from kernels.complex_activation.eager import ACTIVATIONS
from kernels.launch import use_triton
from kernels.operator import operator
from kernels.planar import check_planar, precise

__all__ = ["ACTIVATIONS", "complex_activation", "complex_activation_backward"]


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
    check_planar(z)
    for name, parameter in (("offset", offset), ("slope", slope)):
        if parameter is not None and parameter.shape != z.shape[-1:]:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}, not ({z.shape[-1]},)")
    if kind == "split_gelu" and not use_triton(z):
        return F.gelu(z)
    return _complex_activation(z, kind, offset, slope)


@operator
def _complex_activation(z: Tensor, kind: str, offset: Tensor | None, slope: Tensor | None) -> Tensor:
    code = triton_code if use_triton(z) else eager
    return code.activation(z, kind, offset, slope)


@operator
def complex_activation_backward(
    grad: Tensor, z: Tensor, kind: str, offset: Tensor | None, slope: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of z and, as rows, of the parameters in float32."""
    code = triton_code if use_triton(z) else eager
    return code.activation_backward(grad, z, kind, offset, slope)


_complex_activation.register_fake(lambda z, *_: like(z))


@complex_activation_backward.register_fake
def _(grad: Tensor, z: Tensor, kind: str, *_: Any) -> tuple[Tensor, Tensor]:
    return like(z), z.new_empty(ACTIVATIONS[kind], z.shape[-1], dtype=precise(z))


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
