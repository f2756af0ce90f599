"""Norms, activations and rotary positions by name: the operation, the plain formula, and leaves for both."""

from __future__ import annotations

from functools import partial

import torch

from kernels.complex_activation import ACTIVATIONS, complex_activation
from kernels.complex_activation.eager import activation_floor
from kernels.complex_activation.plain import activation
from kernels.complex_norm import add_complex_rms_norm, complex_layer_norm, complex_rms_norm
from kernels.complex_norm.plain import add_rms_norm, layer_norm, rms_norm
from kernels.complex_rotary import plain, rotate, split_heads
from muse.planar import from_complex, to_complex

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = ["rms_norm", "add_rms_norm", "layer_norm"]
OPERATIONS = [*NORMS, *ACTIVATIONS, "rotate", "rotate_back", "split_heads"]
HEADS, KV_HEADS = 3, 2


def table_of(length, width, start=0):
    omega = 100.0 ** (-torch.arange(width, dtype=torch.float64) / width)
    angle = torch.outer(torch.arange(start, start + length).double(), omega)
    return torch.stack((angle.cos(), angle.sin()), dim=-2)


def turned(z, angle):
    return from_complex(to_complex(z) * torch.polar(torch.ones(()).double(), torch.tensor(angle).double()))


def case(name, length=6, width=5, dtype=torch.float64, batch=2, device="cpu", scale=1.0):
    """An operation, the same in plain PyTorch, and leaves for both: the first one of the states scaled."""
    z, other = (torch.randn(batch, length, 2, width).mul(scale).to(device, dtype) for _ in range(2))
    gain, gamma = (torch.randn(rows, width).to(device, dtype) for rows in (2, 3))
    table = table_of(length, width).to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    match name:
        case "rms_norm":
            return complex_rms_norm, rms_norm, [z, gain]
        case "add_rms_norm":
            return add_complex_rms_norm, add_rms_norm, [z, other, gain]
        case "layer_norm":
            return complex_layer_norm, layer_norm, [z, gamma, gain]
        case "split_heads":
            projection = torch.randn(batch, length, 2, HEADS + 2 * KV_HEADS, width).mul(scale)
            functions = (
                lambda x, f=f: f(x, table, HEADS, KV_HEADS) for f in (split_heads, plain.split_heads)
            )
            return *functions, [projection.to(device, dtype)]
        case "rotate" | "rotate_back":
            back = name == "rotate_back"
            return *(lambda z, f=f: f(z, table, back) for f in (rotate, plain.rotate)), [z]
    offset, slope = (torch.linspace(-1, end, width).to(device, dtype) for end in (0.8, 2))
    leaves = [z, offset, slope][: 1 + ACTIVATIONS[name]]
    plain_activation = partial(activation, floor=activation_floor(z, name))
    return *(lambda z, *p, f=f: f(z, name, *p) for f in (complex_activation, plain_activation)), leaves


def results(function, leaves, dtype=None, spread=False):
    """Outputs, then the gradients of all leaves for random gradients of all outputs.

    The maths runs in ``dtype``, on leaves and gradients that were rounded to the dtype of the first leaf.
    """
    rounded = leaves[0].dtype
    leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, rounded).to(x.dtype)
        for x in outputs
    ]
    if spread:
        cotangents = [x.mT.contiguous().mT for x in cotangents]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, cotangents)]


def scattered(leaves):
    """The same values, none of them contiguous."""
    spread = [
        leaf.mT.contiguous().mT if leaf.ndim > 1 else leaf[:, None].repeat(1, 2)[:, 0] for leaf in leaves
    ]
    assert not any(leaf.is_contiguous() for leaf in spread)
    return spread
