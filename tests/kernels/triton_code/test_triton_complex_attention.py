from __future__ import annotations

import pytest
import torch
from attention_maths import plain
from rounding import SAMPLES, assert_as_accurate

from kernels.complex_attention import SCORES, complex_attention, complex_attention_forward
from kernels.launch import Pinned

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])


def operands(device, dtype, batch=1, length=65, keys=None, heads=2, kv_heads=1, width=20, scale=1.0):
    q = torch.randn(batch, heads, length, 2, width, device=device) * scale
    k, v = torch.randn(2, batch, kv_heads, keys or length, 2, width, device=device)
    return [x.to(dtype) for x in (q, k * scale, v)]


def differentiated(function, inputs, cotangent, kind):
    leaves = [x.detach().to(kind).requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(kind))]


def ours(score, causal):
    return lambda *x: complex_attention_forward(*x, score, causal)[0]


def check(inputs, score, causal, samples=SAMPLES):
    """Forward and every gradient against float64."""
    dtype = inputs[0].dtype
    cotangent = torch.randn(inputs[0].shape, device=inputs[0].device).to(dtype)

    def run_plain(kind):
        return differentiated(lambda *x: plain(*x, score, causal), inputs, cotangent, kind)

    results = differentiated(ours(score, causal), inputs, cotangent, dtype)
    assert_as_accurate(results, lambda: run_plain(dtype), run_plain(torch.float64), samples)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 63, 65])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(score, dtype, length, causal, device):
    inputs = operands(device, dtype, length=length)
    check(inputs, score, causal)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("width", "heads", "kv_heads", "dtype"),
    [
        (16, 3, 3, torch.float32),
        (5, 4, 2, torch.float16),
        (48, 6, 1, torch.float32),
        (96, 2, 2, torch.float16),
        (128, 1, 1, torch.float32),
        (128, 1, 1, torch.float16),
    ],
)
def test_head_sizes_and_groups(score, width, heads, kv_heads, dtype, device):
    inputs = operands(device, dtype, 2, 33, width=width, heads=heads, kv_heads=kv_heads)
    check(inputs, score, True)


# Phases in half precision, the most to compute, and otherwise float32.
@pytest.mark.parametrize(
    ("score", "dtype"), [("real", torch.float32), ("magnitude", torch.float32), ("phase", torch.float16)]
)
def test_long_sequence(score, dtype, device):
    check(operands(device, dtype, length=1025, heads=1, width=6), score, True, samples=8)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("queries", "keys"), [(16, 64), (64, 16)])
def test_blocks_of_either_shape(score, queries, keys, device, monkeypatch):
    """The whole and the masked blocks of a causal call begin elsewhere when keys outnumber queries."""
    blocks = {"BLOCK_M": queries, "BLOCK_N": keys, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(Pinned, "options", lambda *_: blocks)
    check(operands(device, torch.float32, length=130, heads=1, width=6), score, True)
    check(operands(device, torch.float32, 1, 70, 95, heads=1, width=6), score, True)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "keys"), [(1, 40), (7, 65)])
def test_more_keys_than_queries(score, causal, length, keys, device):
    check(operands(device, torch.float32, 2, length, keys), score, causal)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(score, dtype, device):
    q, k, v = operands(device, dtype, length=33, scale=6.0)
    check([q, k, v], score, True)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_zero(score, dtype, device):
    q, k, v = operands(device, dtype, length=33)
    leaves = [x.requires_grad_() for x in (torch.zeros_like(q), k, v)]
    out = ours(score, False)(*leaves)
    expected = torch.zeros_like(out) if score == "phase" else v.mean(2, keepdim=True).expand_as(out)
    torch.testing.assert_close(out, expected, atol=4 * torch.finfo(dtype).eps, rtol=0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.float().sum(), leaves))


@pytest.mark.parametrize("score", SCORES)
def test_operands_need_not_be_contiguous(score, device):
    inputs = operands(device, torch.float32, 2, 33)
    cotangent = torch.randn_like(inputs[0])
    expected = differentiated(ours(score, True), inputs, cotangent, torch.float32)
    for order in ((0, 2, 3, 1, 4), (0, 1, 2, 4, 3)):
        back = [order.index(axis) for axis in range(5)]
        scattered = [x.permute(order).contiguous().permute(back) for x in (*inputs, cotangent)]
        assert not scattered[0].is_contiguous()
        got = differentiated(ours(score, True), scattered[:3], scattered[3], torch.float32)
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences(score, causal, device):
    lengths = [1, 40, 0, 24]
    inputs = operands(device, torch.float32, length=sum(lengths))
    cotangent = torch.randn_like(inputs[0])
    bounds = torch.tensor([0, 1, 41, 41, 65], dtype=torch.int32, device=device)
    for longest in (None, 40):
        packed = differentiated(
            lambda *x, n=longest: complex_attention(*x, score, causal, bounds, n),
            inputs,
            cotangent,
            torch.float32,
        )
        parts = [slice(0, 1), slice(1, 41), slice(41, 65)]
        apart = [
            differentiated(
                ours(score, causal), [x[:, :, p] for x in inputs], cotangent[:, :, p], torch.float32
            )
            for p in parts
        ]
        for whole, *pieces in zip(packed, *apart, strict=True):
            torch.testing.assert_close(whole, torch.cat(pieces, dim=2))


@pytest.mark.parametrize("bounds", [[0, 3], [1, 65], [0, 40, 24, 65]])
def test_boundaries_must_cover_the_batch(bounds, device):
    if device.type == "cuda":
        pytest.skip("a failed assertion of the device ends the process's use of it")
    inputs = operands(device, torch.float32)
    bounds = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0 to the 65 packed tokens"):
        complex_attention(*inputs, "phase", cu_seqlens=bounds)


def test_the_longest_packed_sequence_must_not_be_understated(device):
    if device.type == "cuda":
        pytest.skip("a failed assertion of the device ends the process's use of it")
    bounds = torch.tensor([0, 40, 65], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="max_seqlen=39 is less than the longest packed sequence"):
        complex_attention(*operands(device, torch.float32), "phase", cu_seqlens=bounds, max_seqlen=39)


@pytest.mark.parametrize("score", SCORES)
def test_causality_bit_for_bit(score, device):
    q, k, v = operands(device, torch.float32)
    out = ours(score, True)(q, k, v)
    for x in (q, k, v):
        x[:, :, 50:] = 7.0
    assert torch.equal(ours(score, True)(q, k, v)[:, :, :50], out[:, :, :50])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_gradients_are_the_same_bits(score, dtype, device):
    inputs = operands(device, dtype, kv_heads=1, heads=4)
    cotangent = torch.randn_like(inputs[0])
    first, second = (differentiated(ours(score, True), inputs, cotangent, dtype) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_head_size_that_is_too_large(device):
    with pytest.raises(ValueError, match="width 130 is too large; at most 128"):
        complex_attention(*operands(device, torch.float32, width=130), "phase")
