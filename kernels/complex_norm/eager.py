"""The norms in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.chunks import chunks, like, planes, read, to_write, write
from kernels.planar import precise


def rms_norm(z: Tensor, branch: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, ...]:
    """The sum, if there is a branch, then the norm and what it multiplied each token by."""
    out = like(z)
    total = like(z) if branch is not None else z
    rstd = torch.empty(z.shape[:-2], dtype=precise(z), device=z.device)
    g_re, g_im = gain.to(rstd.dtype)
    x, summed, results, flat = planes(z), planes(total), planes(out), rstd.view(-1)
    added = None if branch is None else planes(branch)
    for rows, (a, b) in chunks(x, 2):
        if added is not None:
            torch.add(x[:, rows], added[:, rows], out=summed[:, rows])
        part = read(summed[:, rows], a)
        length = torch.linalg.vector_norm(part.transpose(0, 1).flatten(1), dim=-1, out=flat[rows])
        scale = length.square_().div_(z.shape[-1]).add_(eps).rsqrt_()[:, None]
        re, im = torch.mul(part, scale, out=a)
        y = to_write(results[:, rows], b)
        torch.mul(re, g_re, out=y[0]).addcmul_(im, g_im, value=-1)
        torch.mul(re, g_im, out=y[1]).addcmul_(im, g_re)
        write(results[:, rows], y)
    return (out, rstd) if branch is None else (total, out, rstd)


def rms_norm_backward(
    grad: Tensor, z: Tensor, gain: Tensor, rstd: Tensor, grad_total: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of z, to which that of the sum is added, and of the gain."""
    grad_z = like(z)
    x, grad_y, results, flat = planes(z), planes(grad), planes(grad_z), rstd.view(-1)
    passed = None if grad_total is None else planes(grad_total)
    g_re, g_im = gain.to(rstd.dtype)
    grad_gain = rstd.new_zeros(gain.shape)
    for rows, (a, b, c) in chunks(x, 3):
        scale = flat[rows, None]
        n_re, n_im = torch.mul(read(x[:, rows], a), scale, out=a)
        y_re, y_im = read(grad_y[:, rows], b)
        # conj(n) y holds what both the gain's gradient and the mean are made of.
        torch.mul(n_re, y_re, out=c[0]).addcmul_(n_im, y_im)
        torch.mul(n_re, y_im, out=c[1]).addcmul_(n_im, y_re, value=-1)
        grad_gain += c.sum(1)
        mean = torch.mv(c[0], g_re).addmv_(c[1], g_im).div_(-z.shape[-1])[:, None]
        dz = to_write(results[:, rows], c)
        torch.mul(y_re, g_re, out=dz[0]).addcmul_(y_im, g_im)
        torch.mul(y_im, g_re, out=dz[1]).addcmul_(y_re, g_im, value=-1)
        dz.addcmul_(a, mean).mul_(scale)
        if passed is not None:
            dz.add_(read(passed[:, rows], b))
        write(results[:, rows], dz)
    return grad_z, grad_gain.to(gain.dtype)


# Layer norm. Statistics are five numbers a token: the planes' means, V_rr, the variance of what is left of
# the imaginary plane without its part along the real one, and the slope V_ri / V_rr of that part, all without
# eps. det V = V_rr V_ii - V_ri^2 is then V_rr times what is left: never negative, and right where the planes
# are nearly dependent and the difference would be nothing but rounding.
TINY = 1e-30  # Added to V_rr, which may be zero, when it divides.


def layer_norm(z: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm and the statistics of each token."""
    out = like(z)
    x, results = planes(z), planes(out)
    statistics = torch.empty(5, x.shape[1], dtype=precise(z), device=z.device)
    g_rr, g_ii, g_ri = gamma.to(statistics.dtype)
    b_re, b_im = beta.to(statistics.dtype)
    for rows, (a, b) in chunks(x, 2):
        part = read(x[:, rows], a)
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
        y = to_write(results[:, rows], a)
        torch.addcmul(b_re, white_re, g_rr, out=y[0]).addcmul_(white_im, g_ri)
        torch.addcmul(b_im, white_im, g_ii, out=y[1]).addcmul_(white_re, g_ri)
        write(results[:, rows], y)
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


def layer_norm_backward(
    grad: Tensor, z: Tensor, gamma: Tensor, statistics: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z, gamma and beta."""
    grad_z = like(z)
    x, grad_y, results = planes(z), planes(grad), planes(grad_z)
    g_rr, g_ii, g_ri = gamma.to(statistics.dtype)
    width = z.shape[-1]
    grad_gamma, grad_beta = (statistics.new_zeros(count, width) for count in (3, 2))
    columns = statistics[..., None]
    matrix, parts = (torch.stack(numbers) for numbers in _whitening(columns, eps))
    for rows, (a, b, c, d) in chunks(x, 4):
        m_rr, m_ii, m_ri = matrix[:, rows]
        re, im = torch.sub(read(x[:, rows], a), columns[:2, rows], out=a)
        y = read(grad_y[:, rows], b)
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
        dz = to_write(results[:, rows], d)
        torch.mul(re, p_rr.div_(width), out=dz[0]).addcmul_(im, p_ri.div_(width))
        dz[0].addcmul_(w_re, m_rr).addcmul_(w_im, m_ri)
        torch.mul(im, p_ii.div_(width), out=dz[1]).addcmul_(re, p_ri)
        dz[1].addcmul_(w_im, m_ii).addcmul_(w_re, m_ri)
        write(results[:, rows], dz)
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
