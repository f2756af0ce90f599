from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.rounding import OFF_ZERO, assert_as_accurate, clearance, keep_scores_off_zero

from kernels import complex_attention as operation
from kernels.complex_attention import (
    SCORES,
    complex_attention,
    complex_attention_backward,
    complex_attention_forward,
)
from kernels.complex_attention.eager import Mask
from kernels.complex_attention.plain import flash, future_keys, native
from kernels.launch import TARGETS, compiling_for
from muse.planar import conjugate, from_complex, multiply, to_complex

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def reference(q, k, v, score, causal):
    """The definition, in complex128 with every score held."""
    future = future_keys(q, k) if causal else None
    return from_complex(native(*(to_complex(x.double()) for x in (q, k, v)), score, future))


def operands(length=7, heads=2, kv_heads=2, width=6, dtype=torch.float64, scale=1.0):
    q = torch.randn(2, heads, length, 2, width) * scale
    k, v = torch.randn(2, 2, kv_heads, length, 2, width) * scale
    return q.to(dtype), k.to(dtype), (v / scale).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_scores_kept_off_zero_point_every_way(dtype):
    """And differ as before: else a fault in their phases could hide."""
    q, k, _ = operands(50, 4, 2, 5, dtype)
    before = q.clone()
    keep_scores_off_zero(q, k)
    assert torch.equal(q.abs(), before.abs())
    off_zero = clearance(before, k).amin(-1) >= OFF_ZERO
    assert torch.equal(q[off_zero], before[off_zero])
    s = to_complex(q.double()) @ to_complex(k.double()).mH.repeat_interleave(2, 1)
    assert (s.abs() > 0).all()
    eighths = torch.histc(s.angle() / math.pi, bins=8, min=-1, max=1) / s.numel()
    assert 0.1 < eighths.min() <= eighths.max() < 0.15
    if dtype == torch.bfloat16:
        assert clearance(before, k).min() < OFF_ZERO / 8


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


SIZES = [(1, 2, 2, 4), (15, 2, 1, 12), (17, 2, 2, 7)]


# Every two of these choices meet.
@pytest.mark.parametrize(
    ("score", "dtype", "sizes"),
    [(score, DTYPES[k], SIZES[(n + k) % 3]) for n, score in enumerate(SCORES) for k in range(3)],
)
def test_accuracy(score, dtype, sizes):
    inputs = operands(*sizes, dtype=dtype)
    keep_scores_off_zero(*inputs[:2])
    cotangent = torch.randn_like(inputs[0])

    def run(function, kind):
        leaves = [x.detach().to(kind).requires_grad_() for x in inputs]
        out = function(*leaves, score, True)
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(kind))]

    exact = run(reference, torch.float64)

    def plain(q, k, v, score, causal):
        return flash(q, k, v, score, future_keys(q, k) if causal else None)

    assert_as_accurate(run(complex_attention, dtype), lambda: run(plain, dtype), exact)


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
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_of_the_registered_operation(score, packed):
    """Which ``complex_attention`` does not call where keys are few or SDPA does as well."""
    q, k, v = (x[:1].requires_grad_() for x in operands(5, 2, 1, 2))
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32) if packed else None
    assert torch.autograd.gradcheck(
        lambda *x: complex_attention_forward(*x, score, True, bounds)[0], (q, k, v)
    )


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 2, 300, 2, 4), (0, 2, 5, 2, 4), (2, 2, 0, 2, 4)], ids=str)
def test_nothing_to_attend_to(score, dtype, shape):
    q = torch.zeros(shape, dtype=dtype, requires_grad=True)
    out = complex_attention(q, q, q, score)
    out.sum().backward()
    assert out.shape == q.grad.shape == shape


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


def test_shapes_that_do_not_belong_together():
    q, k, v = operands()
    with pytest.raises(ValueError, match="no multiple of 3"):
        complex_attention(q[:, [0, 1, 0, 1]], k[:, [0, 1, 0]], v[:, [0, 1, 0]])
    with pytest.raises(ValueError, match="planar queries"):
        complex_attention(q[..., :3], k, v)
    with pytest.raises(ValueError, match="as many keys, not 5"):
        complex_attention(q, k[:, :, :5], v[:, :, :5])
    complex_attention(q, k[:, :, :5], v[:, :, :5], causal=False)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [1, 4])
def test_more_keys_than_queries(score, dtype, causal, queries):
    """The last queries of a sequence, with the keys of all of it, give the last outputs."""
    q, k, v = operands(9, 4, 2, 5, dtype)
    whole = complex_attention(q, k, v, score, causal)
    last = complex_attention(q[:, :, -queries:], k, v, score, causal)
    # Weights of half precision are rounded apart, sums of float64 only taken in another order.
    rounding = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(last, whole[:, :, -queries:], atol=rounding, rtol=rounding)


# Every two of these choices meet.
SCORE_DTYPE_CAUSAL = [
    (score, dtype, (n + k) % 2 == 0)
    for n, score in enumerate(SCORES)
    for k, dtype in enumerate((torch.float64, torch.bfloat16))
]


@pytest.mark.parametrize(("score", "dtype", "causal"), SCORE_DTYPE_CAUSAL)
def test_packed_sequences_do_not_see_each_other(score, dtype, causal):
    parts = [slice(0, 1), slice(1, 9), slice(9, 9), slice(9, 14)]
    bounds = torch.tensor([0, 1, 9, 9, 14], dtype=torch.int32)
    inputs = [x[:1] for x in operands(14, 4, 2, 5, dtype)]
    keep_scores_off_zero(*inputs[:2])
    cotangent = torch.randn_like(inputs[0])

    def run(kind, packed):
        leaves = [x.detach().to(kind).requires_grad_() for x in inputs]
        if packed:
            out = complex_attention(*leaves, score, causal, cu_seqlens=bounds)
        else:
            out = torch.cat(
                [complex_attention(*(x[:, :, p] for x in leaves), score, causal) for p in parts], dim=2
            )
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(kind))]

    assert_as_accurate(run(dtype, True), lambda: run(dtype, False), run(torch.float64, False))


@pytest.mark.parametrize("bounds", [[0, 3], [1, 7], [0, 5, 4, 7]])
def test_boundaries_must_cover_the_batch(bounds):
    q, k, v = (x[:1] for x in operands())
    with pytest.raises(ValueError, match="must rise from 0 to the 7"):
        complex_attention(q, k, v, "phase", cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    with pytest.raises(ValueError, match="a batch of one"):
        complex_attention(*operands(), cu_seqlens=torch.tensor([0, 7], dtype=torch.int32))


@pytest.mark.parametrize("score", SCORES)
def test_the_longest_packed_sequence_must_not_be_understated(score):
    inputs = [x[:1] for x in operands()]
    bounds = torch.tensor([0, 2, 7], dtype=torch.int32)
    complex_attention(*inputs, score, cu_seqlens=bounds, max_seqlen=5)
    with pytest.raises(ValueError, match="max_seqlen=4 is too small; a packed sequence has 5 tokens"):
        complex_attention(*inputs, score, cu_seqlens=bounds, max_seqlen=4)


def test_boundaries_of_the_wrong_kind():
    inputs = [x[:1] for x in operands()]
    with pytest.raises(TypeError, match=r"must be int32, not torch\.int64"):
        complex_attention(*inputs, cu_seqlens=torch.tensor([0, 7]))
    with pytest.raises(ValueError, match=r"must be \(n \+ 1,\) on cpu, not \(1, 2\) on cpu"):
        complex_attention(*inputs, cu_seqlens=torch.tensor([[0, 7]], dtype=torch.int32))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("other", [0, 1, 2])
def test_operands_of_different_dtypes(score, other):
    inputs = list(operands())
    inputs[other] = inputs[other].float()
    with pytest.raises(TypeError, match="of one dtype are needed, not"):
        complex_attention(*inputs, score)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("length", [9, 300])
def test_causality_bit_for_bit(score, dtype, length):
    """300 queries are several blocks."""
    q, k, v = operands(length, 2, 1, 5, dtype)
    out = complex_attention(q, k, v, score)
    token = length - 3
    for x in (q, k, v):
        x[:, :, token:] = 7.0
    assert torch.equal(complex_attention(q, k, v, score)[:, :, :token], out[:, :, :token])


@pytest.mark.parametrize(
    ("score", "dtype", "causal"), [*SCORE_DTYPE_CAUSAL, *((score, torch.float32, True) for score in SCORES)]
)
def test_blocks_are_as_accurate_as_held_scores(score, dtype, causal, monkeypatch):
    """Few keys are held, many go by blocks."""
    q, k, v = operands(50, 4, 2, 5, dtype)
    q, cotangent = q[:, :, -40:], torch.randn(2, 4, 40, 2, 5)
    keep_scores_off_zero(q, k)
    monkeypatch.setattr("kernels.complex_attention._takes_sdpa", lambda *_: False)

    def run(held, kind):
        monkeypatch.setattr("kernels.complex_attention.HELD_KEYS", held)
        leaves = [x.detach().to(kind).requires_grad_() for x in (q, k, v)]
        out = complex_attention(*leaves, score, causal)
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(dtype).to(kind))]

    assert_as_accurate(run(0, dtype), lambda: run(256, dtype), run(256, torch.float64))


@pytest.mark.parametrize("score", SCORES)
def test_blocks_of_queries_do_not_change_the_result(score, monkeypatch):
    leaves = [x.requires_grad_() for x in operands(50, 4, 2, 5)]
    results = []
    for step in (64, 7):
        monkeypatch.setattr("kernels.complex_attention.eager.BLOCK_QUERIES", (step, step))
        out, _ = complex_attention_forward(*leaves, score, True)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_gradients_are_the_same_bits(score, dtype):
    leaves = [x.requires_grad_() for x in operands(70, 4, 2, 5, dtype)]
    out, _ = complex_attention_forward(*leaves, score, True)
    first, second = (torch.autograd.grad(out.float().sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("packed", [False, True])
def test_registration(score, packed):
    q, k, v = (x[:1].requires_grad_() for x in operands(6, 2, 1, 3, torch.float32))
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32) if packed else None
    torch.library.opcheck(complex_attention_forward, (q, k, v, score, True, bounds))
    out, lse = complex_attention_forward(q, k, v, score, True, bounds)
    arguments = (out.detach(), q.detach(), k.detach(), v.detach(), None, lse.detach(), score, True, bounds)
    torch.library.opcheck(complex_attention_backward, arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("score", "dtype", "held"),
    [
        ("real", torch.bfloat16, True),
        ("magnitude", torch.float32, True),
        ("phase", torch.bfloat16, True),
        # Which kind it is does not concern the compiler.
        ("phase", torch.float32, False),
    ],
)
def test_compiles_without_a_graph_break(score, dtype, held):
    leaves = [x.requires_grad_() for x in operands(12, 4, 2, 5, dtype)]

    def loss(q, k, v):
        if held:
            out = complex_attention(2 * q, k, v, score)
        else:
            out, _ = complex_attention_forward(2 * q, k, v, score, True)
        return out.float().square().mean()

    compiled = torch.compile(loss, fullgraph=True)
    # Compiled code rounds the held scores of half precision at other places.
    close = {"rtol": 2e-2, "atol": 2e-3} if held and dtype == torch.bfloat16 else {}
    torch.testing.assert_close(compiled(*leaves), loss(*leaves), **close)
    gradients = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("score", SCORES)
def test_packed_sequences_compile_without_a_graph_break(score):
    leaves = [x[:1].requires_grad_() for x in operands(12, 4, 2, 5, torch.float32)]
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)

    def loss(q, k, v):
        return complex_attention(2 * q, k, v, score, cu_seqlens=bounds).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_more_heads_than_the_second_axis_of_a_grid_has(monkeypatch):
    """The axes of a grid of CUDA after the first end at 65535."""
    grids = []
    monkeypatch.setattr(operation.triton_code, "launch", lambda _, grid, *a, **o: grids.append(grid))
    with compiling_for(TARGETS[0], print), torch.device("meta"):
        q = torch.empty(4096, 16, 5, 2, 16)
        code, mask = operation.triton_code, Mask(True)
        out, lse = code.forward(q, q, q, "phase", mask)
        code.backward(q, q, q, q, out, lse, "phase", mask)
    assert grids == [(4096 * 16,)] * 3


@pytest.mark.parametrize(("queries", "keys", "width", "sdpa"), [
    (8, 8, 16, True), (1, 8, 16, True), (4, 8, 16, False), (8, 8, 129, True), (4, 8, 129, True)
])  # fmt: skip
@pytest.mark.parametrize("deterministic", [True, False])
def test_where_real_scores_go_on_a_gpu(queries, keys, width, sdpa, deterministic):
    torch.use_deterministic_algorithms(deterministic)
    with compiling_for(TARGETS[0], print):
        q, k = (torch.empty(1, 2, n, 2, width, device="meta").bfloat16() for n in (queries, keys))
        takes = operation._takes_sdpa(q, k, k, True)
        assert takes == (sdpa and not (deterministic and width <= 128))
        assert operation._takes_sdpa(q, k, k, False) == (not deterministic or width > 128)


def test_double_backward_is_refused():
    leaves = [x.requires_grad_() for x in operands(5)]
    out, _ = complex_attention_forward(*leaves, "phase", True)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), leaves[0])
