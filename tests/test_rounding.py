"""What ``rounding`` expects, what it sees, and how small a fault that is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rounding import FACTOR, RandomRounding, assert_as_accurate, errors_to_expect, find_fault, unit

from kernels.complex_attention import SCORES, complex_attention_forward
from kernels.complex_linear import PARAMETERS, complex_linear, complex_linear_activated
from kernels.complex_pointwise import (
    ACTIVATIONS,
    add_complex_rms_norm,
    complex_activation,
    complex_layer_norm,
    complex_rms_norm,
    rotate,
    split_heads,
)
from kernels.symplectic import force, symplectic_flow
from muse.models import linear_cross_entropy

TOKENS, WIDTH, HEADS = 40, 24, 3
WEIGHTS = [(2, WIDTH, WIDTH), (2 * WIDTH, WIDTH), (2 * WIDTH,), (50, WIDTH)]
# The relative error of one element that must be seen, in units of roundoff: 8e-6, 1.6 % and 12 %.
FAULT = {torch.float32: 2.0**7, torch.float16: 2.0**5, torch.bfloat16: 2.0**5}


def operations():
    """Each operation as a function of leaves, and their shapes."""
    z, square, gain, row = (TOKENS, 2, WIDTH), (2, WIDTH, WIDTH), (2, WIDTH), (WIDTH,)
    angle = torch.rand(TOKENS, WIDTH) * 6
    table = torch.stack((angle.cos(), angle.sin()), dim=-2)
    yield "product", complex_linear, [z, square, gain]
    yield "three products", lambda *x: complex_linear(*x, products=3), [z, square, gain]
    for kind, names in PARAMETERS.items():
        yield (
            f"product {kind}",
            lambda x, w, b, *p, k=kind, n=names: complex_linear_activated(
                x, w, b, activation=k, **dict(zip(n, p, strict=True))
            ),
            [z, square, gain, *[row] * len(names)],
        )
    yield "rms norm", complex_rms_norm, [z, gain]
    yield "sum and rms norm", add_complex_rms_norm, [z, z, gain]
    yield "layer norm", complex_layer_norm, [z, (3, WIDTH), gain]
    for kind, parameters in ACTIVATIONS.items():
        yield kind, lambda z, *p, k=kind: complex_activation(z, k, *p), [z, *[row] * parameters]
    yield "rotate", lambda z: rotate(z, table), [z]
    yield "split heads", lambda x: split_heads(x, table, HEADS, 1), [(2, TOKENS, 2, HEADS + 2, WIDTH)]
    for score in SCORES:
        yield (
            f"attention {score}",
            lambda *x, s=score: complex_attention_forward(*x, s, True)[0],
            [(1, HEADS, TOKENS, 2, WIDTH)] * 3,
        )
    flow = [(TOKENS, WIDTH)] * 2 + [(2 * WIDTH, WIDTH), (2 * WIDTH,), (2 * WIDTH,)]
    yield "force", lambda q, p, *w: force(q, *w) + p, flow
    for scale in (0.0, 2.0**22):
        yield (
            f"flow {scale}",
            lambda *x, s=scale: symplectic_flow(*x, [0.05, 0.1, 0.05], [0.1, 0.1, 0.0], scale=s)[:2],
            flow,
        )
    targets = torch.arange(TOKENS)
    yield (
        "cross-entropy",
        lambda x, w, b: linear_cross_entropy(x, w, targets, b),
        [(TOKENS, WIDTH), (50, WIDTH), (50,)],
    )


def run(function, leaves, cotangent_dtype=None):
    """Outputs, then the gradients of all leaves for random gradients of all outputs."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).to(cotangent_dtype or x.dtype) for x in outputs]
    cotangents = [c.to(x.dtype) for c, x in zip(cotangents, outputs, strict=True)]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, cotangents)]


def case(name, dtype):
    """Results of an operation, the exact ones, and the errors to expect."""
    function, shapes = {n: (f, s) for n, f, s in operations()}[name]
    wide_state = name.startswith(("flow", "force"))
    leaves = [
        (torch.randn(s) * (s[-1] ** -0.5 if s in WEIGHTS else 1)).to(
            torch.float32 if wide_state and i < 2 else dtype
        )
        for i, s in enumerate(shapes)
    ]
    results = run(function, leaves)
    exact = run(function, [x.double() for x in leaves], results[0].dtype)
    return results, exact, errors_to_expect(lambda: run(function, leaves), exact)


@pytest.mark.parametrize("dtype", FAULT)
@pytest.mark.parametrize("name", [name for name, *_ in operations()])
def test_one_wrong_element_in_a_thousand_is_seen(name, dtype):
    """In every output and gradient of every operation, at elements of at least median size.

    Smaller ones may be what is left of a difference, of which no computation keeps all digits.
    """
    for result, truth, errors in zip(*case(name, dtype), strict=True):
        assert find_fault(result, truth, errors) is None
        candidates = (truth.abs() >= truth.abs().median()).logical_and(truth != 0).flatten().nonzero()[:, 0]
        if not len(candidates):
            continue
        wrong = candidates[torch.randperm(len(candidates))[: 1 + truth.numel() // 1000]]
        planted = result.clone()
        planted.view(-1)[wrong] *= 1 + FAULT[dtype] * unit(dtype)
        assert find_fault(planted, truth, errors) is not None
