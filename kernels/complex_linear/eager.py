"""The planar product in PyTorch, as one real product or as Gauss's three."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.complex_activation.eager import activation as activate
from kernels.planar import upcast
from kernels.products import linear, matmul


def real_form(weight: Tensor) -> Tensor:
    """[[W_r, -W_i], [W_i, W_r]], (2 out, 2 in): acts on [re | im] as the weight (2, out, in) acts on z."""
    real, imag = weight
    out_features, in_features = real.shape
    form = weight.new_empty(2, out_features, 2, in_features)
    form[0, :, 0] = real
    form[1, :, 1] = real
    form[1, :, 0] = imag
    torch.neg(imag, out=form[0, :, 1])
    return form.view(2 * out_features, 2 * in_features)


def _flat(z: Tensor) -> Tensor:
    """(..., 2, D) as [re | im], (rows, 2 D)."""
    return z.reshape(z.shape[:-2].numel(), 2 * z.shape[-1])


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, products: int, adjoint: bool
) -> Tensor:
    """x W^T + b, or x conj(W)^T + b, plus a residual."""
    shape = (*x.shape[:-1], weight.shape[2 if adjoint else 1])
    if products == 3:
        y = _three_products(x, weight.mT if adjoint else weight, adjoint)
        y = y if bias is None else y.add_(bias)
    elif adjoint:
        y = matmul(_flat(x), real_form(weight))
    else:
        y = linear(_flat(x), real_form(weight), None if bias is None else bias.reshape(-1))
    return _plus(y.view(shape), residual)


def product_activated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offset: Tensor | None,
    slope: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Active and hidden, as of ``complex_linear_activated``."""
    hidden = product(x, weight, bias, None, 4, False)
    return _plus(activate(hidden, activation, offset, slope), residual), hidden


def _plus(y: Tensor, residual: Tensor | None) -> Tensor:
    """The sum, in the memory of y if it has the dtype."""
    if residual is None:
        return y
    return y.add_(residual) if residual.dtype == y.dtype else y + residual


def _three_products(x: Tensor, weight: Tensor, conjugate: bool) -> Tensor:
    """Gauss's product (rows, 2, out); half precision is summed in float32 between the products."""
    re, im = x.reshape(x.shape[:-2].numel(), *x.shape[-2:]).unbind(-2)
    w_re, w_im = weight
    w_sum = w_re - w_im if conjugate else w_re + w_im
    factors = (re, w_re), (im, w_im), (re + im, w_sum)
    first, second, third = (upcast(linear(rows, weights)) for rows, weights in factors)
    if conjugate:
        second = -second
    y = x.new_empty(re.shape[0], 2, w_re.shape[0])
    y[:, 0] = first - second
    y[:, 1] = third.sub_(first).sub_(second)
    return y


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """dW of y = x W^T from the gradient of y."""
    features = grad.shape[-1], x.shape[-1]
    form = matmul(_flat(grad).t(), _flat(x)).view(2, features[0], 2, features[1])
    folded = form.new_empty(2, *features)
    torch.add(form[0, :, 0], form[1, :, 1], out=folded[0])
    torch.sub(form[1, :, 0], form[0, :, 1], out=folded[1])
    return folded


def empty_product(x: Tensor, weight: Tensor, residual: Tensor | None = None, adjoint: bool = False) -> Tensor:
    """Room for a product, with a residual in the dtype of the sum."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty((*x.shape[:-1], weight.shape[2 if adjoint else 1]), dtype=dtype)
