from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from muse.layers import ComplexAttention, complex_attention
from muse.planar import conjugate, from_complex, multiply, to_complex

SCORES = ["real", "magnitude", "phase"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def reference(q, k, v, score, causal):
    """The definition, in complex128 with every score held."""
    q, k, v = (to_complex(x.double()) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    heads = [head // groups for head in range(q.shape[1])]
    s = torch.einsum("bhnd,bhmd->bhnm", q, k[:, heads].conj()) / math.sqrt(q.shape[-1])
    logits = s.real if score == "real" else s.abs()
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -math.inf)
    weight = logits.softmax(-1).to(torch.complex128)
    if score == "phase":
        weight = weight * torch.sgn(s)
    return from_complex(weight @ v[:, heads])


def plain(q, k, v, score, causal):
    """The same maths on planes in the dtype of the operands."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    (q_re, q_im), (k_re, k_im), (v_re, v_im) = (x.unbind(-2) for x in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1])
    s_re = (q_re @ k_re.mT + q_im @ k_im.mT) * scale
    s_im = (q_im @ k_re.mT - q_re @ k_im.mT) * scale
    logits = s_re if score == "real" else (s_re.square() + s_im.square()).sqrt()
    size = logits
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -math.inf)
    weight = logits.softmax(-1)
    if score != "phase":
        return torch.stack((weight @ v_re, weight @ v_im), dim=-2)
    w_re, w_im = weight * s_re / size, weight * s_im / size
    return torch.stack((w_re @ v_re - w_im @ v_im, w_re @ v_im + w_im @ v_re), dim=-2)


def operands(length=7, heads=2, kv_heads=2, width=6, dtype=torch.float64, scale=1.0):
    q = torch.randn(2, heads, length, 2, width) * scale
    k, v = torch.randn(2, 2, kv_heads, length, 2, width) * scale
    return q.to(dtype), k.to(dtype), (v / scale).to(dtype)


def turn(z, angle):
    return multiply(z, torch.tensor([[math.cos(angle)], [math.sin(angle)]], dtype=z.dtype))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (7, 2, 2, 6), (63, 3, 3, 5), (65, 4, 2, 12), (9, 6, 1, 3), (64, 2, 1, 16)]
)
def test_value_is_the_definition(score, causal, sizes):
    q, k, v = operands(*sizes)
    torch.testing.assert_close(
        complex_attention(q, k, v, score, causal), reference(q, k, v, score, causal), atol=1e-7, rtol=1e-7
    )


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 2, 2, 4), (63, 2, 1, 12), (65, 2, 2, 7)])
def test_accuracy(score, dtype, sizes, assert_as_accurate):
    inputs = operands(*sizes, dtype=dtype)
    cotangent = torch.randn_like(inputs[0])

    def run(function, kind):
        leaves = [x.detach().to(kind).requires_grad_() for x in inputs]
        out = function(*leaves, score, True)
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(kind))]

    parts = (run(complex_attention, dtype), run(plain, dtype), run(reference, torch.float64))
    for result, other, exact in zip(*parts, strict=True):
        # With one key the weight is 1 and the gradients of the scores cancel to zero.
        assert_as_accurate(result, other, exact, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_real_scores_are_sdpa_on_concatenated_planes(dtype):
    q, k, v = operands(65, 4, 2, 6, dtype)
    k_all, v_all = (x.repeat_interleave(2, 1).flatten(-2) for x in (k, v))
    expected = F.scaled_dot_product_attention(
        q.flatten(-2), k_all, v_all, is_causal=True, scale=1 / math.sqrt(6)
    )
    torch.testing.assert_close(complex_attention(q, k, v).flatten(-2), expected)


@pytest.mark.parametrize("score", SCORES)
def test_global_phases(score):
    q, k, v = operands()
    out = complex_attention(q, k, v, score)
    torch.testing.assert_close(
        complex_attention(turn(q, 0.8), turn(k, 0.8), v, score), out, atol=1e-8, rtol=0
    )
    torch.testing.assert_close(
        complex_attention(q, k, turn(v, 0.8), score), turn(out, 0.8), atol=1e-8, rtol=0
    )


def test_phase_of_the_query_alone():
    q, k, v = operands()
    for score, expected in (("magnitude", lambda out: out), ("phase", lambda out: turn(out, 0.8))):
        out = complex_attention(q, k, v, score)
        got = complex_attention(turn(q, 0.8), k, v, score)
        torch.testing.assert_close(got, expected(out), atol=1e-8, rtol=0)
    real = complex_attention(q, k, v)
    assert (complex_attention(turn(q, 0.8), k, v) - real).abs().max() > 1e-2


@pytest.mark.parametrize("score", SCORES)
def test_phase_scores_differ_from_those_of_the_conjugate(score):
    """s = q conj(k), not its conjugate: only the phase kind can tell them apart."""
    q, k, v = operands()
    out, other = complex_attention(q, k, v, score), complex_attention(conjugate(q), conjugate(k), v, score)
    assert torch.allclose(out, other) == (score != "phase")


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(score, causal):
    inputs = [x.requires_grad_() for x in operands(3, 2, 1, 2)]
    assert torch.autograd.gradcheck(lambda *x: complex_attention(*x, score, causal), inputs)


@pytest.mark.parametrize("score", SCORES)
def test_operands_need_not_be_contiguous(score):
    q, k, v = (x.permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4) for x in operands(9))
    assert not q.is_contiguous()
    torch.testing.assert_close(
        complex_attention(q, k, v, score), reference(q, k, v, score, True), atol=1e-7, rtol=1e-7
    )


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 30.0])
def test_large_and_vanishing_scores(score, dtype, scale):
    q, k, v = operands(33, width=8, dtype=dtype, scale=scale or 1.0)
    if scale == 0:
        q, k = torch.zeros_like(q), torch.zeros_like(k)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = complex_attention(*leaves, score)
    out.float().square().sum().backward()
    assert out.isfinite().all()
    assert all(x.grad.isfinite().all() for x in leaves)
    # No weights beyond a convex combination: moduli stay below those of v.
    largest = to_complex(v.detach()).abs().max()
    assert to_complex(out.detach()).abs().max() <= largest * (1 + 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_scores_of_zero(dtype):
    """|s| = 0 weighs all keys alike; its phase is 0/0, taken as 0. Gradients stay finite in each dtype."""
    q, k, v = operands(12, dtype=dtype)
    q = torch.zeros_like(q).requires_grad_()
    mean = v.double().mean(2, keepdim=True).expand(v.shape)
    magnitude = complex_attention(q, k, v, "magnitude", causal=False)
    torch.testing.assert_close(magnitude.double(), mean, atol=4 * torch.finfo(dtype).eps, rtol=0)
    phase = complex_attention(q, k, v, "phase", causal=False)
    assert (phase == 0).all()
    (magnitude + phase).sum().backward()
    assert q.grad.isfinite().all()


def test_unknown_score():
    with pytest.raises(ValueError, match="cosine"):
        complex_attention(*operands(), score="cosine")


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_module(score, kv_heads):
    layer = ComplexAttention(12, 4, kv_heads, score)
    z = torch.randn(2, 9, 2, 12, requires_grad=True)
    out = layer(z)
    assert out.shape == z.shape
    out.square().sum().backward()
    assert all((p.grad != 0).all() for p in layer.parameters())
    assert sum(p.numel() for p in layer.parameters()) == 2 * 12 * (12 + 2 * 3 * (kv_heads or 4) + 12)


@pytest.mark.parametrize("score", SCORES)
def test_module_turns_with_its_input(score):
    layer = ComplexAttention(12, 2, score=score).double()
    z = torch.randn(2, 9, 2, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(turn(z, 0.6)), turn(layer(z), 0.6), atol=1e-8, rtol=0)


@pytest.mark.parametrize("score", SCORES)
def test_module_knows_positions(score):
    """Permuted earlier tokens change the last output: without rotation it would see a set."""
    layer = ComplexAttention(12, 2, score=score).double()
    z = torch.randn(1, 9, 2, 12, dtype=torch.float64)
    swapped = z.clone()
    swapped[:, [2, 5]] = z[:, [5, 2]]
    assert (layer(z) - layer(swapped))[:, -1].abs().max() > 1e-4
