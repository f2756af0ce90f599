from __future__ import annotations

import pytest
import torch
from support.dtypes import DTYPES, HALVES, in_each_half
from support.padding import padded
from support.rounding import SAMPLES, assert_as_accurate, keep_scores_off_zero

from kernels.complex_attention import SCORES, complex_attention, complex_attention_forward
from kernels.complex_attention.plain import flash, future_keys
from kernels.launch import Pinned

# Queries, keys, heads, heads of keys, width. In the interpreter blocks are 64 queries and 32 keys, and what a
# query may see of a causal block is decided by how many more keys than queries there are.
ONE = (1, 1, 2, 1, 20)
FEWER_THAN_A_BLOCK = (33, 33, 3, 3, 16)
ONE_PAST_A_BLOCK = (65, 65, 2, 1, 5)
SEVERAL_BLOCKS = (130, 130, 1, 1, 6)
ONE_MORE_KEY = (64, 65, 2, 2, 48)
# The first query sees all keys of a block but one, whether that has 16, 32 or 64 keys.
ALL_BUT_ONE_KEY = (7, 69, 4, 2, 20)
# The last block lacks one key.
ONE_KEY_LESS = (20, 63, 2, 1, 12)
ONE_QUERY = (1, 40, 2, 1, 96)
FEW_KEYS = (65, 20, 4, 2, 12)
WIDE = (33, 33, 1, 1, 128)


def operands(device, dtype, sizes=FEWER_THAN_A_BLOCK, batch=1, scale=1.0):
    """Queries, keys and values with strides of their own."""
    queries, keys, heads, kv_heads, width = sizes
    q = torch.randn(batch, heads, queries, 2, width, device=device) * scale
    k, v = torch.randn(2, batch, kv_heads, keys, 2, width, device=device)
    gaps = ((0, 1, 1, 1, 0), (1, 0, 2, 2, 0), (1, 1, 1, 3, 0))
    return [padded(x.to(dtype), *gap) for x, gap in zip((q, k * scale, v), gaps, strict=True)]


def gradient_of(x):
    """A random gradient of the output, with other strides than those of the operands."""
    return padded(torch.randn(x.shape, device=x.device).to(x.dtype), 0, 2, 1, 4, 0)


def differentiated(function, inputs, cotangent, kind):
    leaves = [x.detach().to(kind).requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(kind))]


def ours(score, causal):
    return lambda *x: complex_attention_forward(*x, score, causal)[0]


def check(inputs, score, causal, samples=SAMPLES):
    """Forward and every gradient against float64."""
    dtype = inputs[0].dtype
    if score != "real":
        keep_scores_off_zero(*inputs[:2])
    cotangent = gradient_of(inputs[0])
    future = future_keys(*inputs[:2]) if causal else None

    def run_plain(kind):
        return differentiated(lambda *x: flash(*x, score, future), inputs, cotangent, kind)

    results = differentiated(ours(score, causal), inputs, cotangent, dtype)
    assert_as_accurate(results, lambda: run_plain(dtype), run_plain(torch.float64), samples)


@pytest.mark.parametrize(
    ("score", "dtype", "causal", "sizes", "batch"),
    in_each_half(
        [
            ("real", torch.float32, True, ONE_PAST_A_BLOCK, 1),
            ("real", torch.float16, True, ALL_BUT_ONE_KEY, 2),
            ("real", torch.float16, False, FEWER_THAN_A_BLOCK, 1),
            ("real", torch.float32, False, ONE_QUERY, 2),
            ("real", torch.float16, False, ONE_KEY_LESS, 1),
            ("magnitude", torch.float16, True, ONE_PAST_A_BLOCK, 1),
            ("magnitude", torch.float32, True, ALL_BUT_ONE_KEY, 1),
            ("magnitude", torch.float32, False, FEW_KEYS, 1),
            ("magnitude", torch.float16, True, WIDE, 1),
            ("magnitude", torch.float16, True, ONE, 2),
            ("phase", torch.float32, True, SEVERAL_BLOCKS, 1),
            ("phase", torch.float16, True, ONE_MORE_KEY, 1),
            ("phase", torch.float16, False, ONE_PAST_A_BLOCK, 1),
            ("phase", torch.float32, True, ALL_BUT_ONE_KEY, 1),
            ("phase", torch.float32, False, FEWER_THAN_A_BLOCK, 2),
            ("phase", torch.float16, True, FEWER_THAN_A_BLOCK, 2),
            ("phase", torch.float32, True, WIDE, 1),
        ]
    ),
)
def test_value_and_gradients(score, dtype, causal, sizes, batch, device):
    check(operands(device, dtype, sizes, batch), score, causal)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("sizes", [(3, 1025, 1, 1, 6), (1025, 3, 1, 1, 6)], ids=["keys", "queries"])
def test_long_sums(score, sizes, device):
    """Over 1025 keys of a query, or 1025 queries of a key."""
    check(operands(device, torch.float32, sizes), score, False, samples=8)


@pytest.mark.parametrize(
    ("score", "queries", "keys"),
    [("real", 64, 16), ("magnitude", 16, 64), ("phase", 16, 64), ("phase", 64, 16)],
)
def test_blocks_of_either_shape(score, queries, keys, device, monkeypatch):
    """The whole and the masked blocks of a causal call begin elsewhere when keys outnumber queries."""
    blocks = {"BLOCK_M": queries, "BLOCK_N": keys, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(Pinned, "options", lambda *_: blocks)
    check(operands(device, torch.float32, (70, 95, 1, 1, 6)), score, True)
    check(operands(device, torch.float32, (18, 80, 1, 1, 6)), score, True)


@pytest.mark.parametrize(
    ("score", "dtype"),
    in_each_half(
        [
            ("real", torch.float16),
            ("magnitude", torch.float32),
            ("phase", torch.float32),
            ("phase", torch.float16),
        ]
    ),
)
def test_large_scores(score, dtype, device):
    check(operands(device, dtype, scale=6.0), score, True)


@pytest.mark.parametrize("keys", [33, 63])
def test_scores_far_below_zero(keys, device):
    """Where a key that does not exist, with its score of 0, would weigh infinitely more than all others."""
    q, k, v = operands(device, torch.float32, (keys, keys, 3, 3, 16))
    k.copy_(k[:, :, :1] + k / 10)
    q.copy_(-24 * k)
    check([q, k, v], "real", False)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_zero(score, dtype, device):
    q, k, v = operands(device, dtype)
    leaves = [x.requires_grad_() for x in (torch.zeros_like(q), k, v)]
    out = ours(score, False)(*leaves)
    expected = torch.zeros_like(out) if score == "phase" else v.mean(2, keepdim=True).expand_as(out)
    torch.testing.assert_close(out, expected, atol=4 * torch.finfo(dtype).eps, rtol=0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.float().sum(), leaves))


def test_planes_need_not_lie_together(device):
    inputs = operands(device, torch.float32)
    expected = differentiated(ours("phase", True), inputs, inputs[0], torch.float32)
    scattered = [x.mT.contiguous().mT for x in inputs]
    got = differentiated(ours("phase", True), scattered, scattered[0], torch.float32)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize(
    ("score", "causal", "longest"),
    [("real", True, None), ("magnitude", False, 40), ("phase", True, 40), ("phase", False, None)],
)
def test_packed_sequences(score, causal, longest, device):
    inputs = operands(device, torch.float32, (65, 65, 2, 1, 20))
    cotangent = gradient_of(inputs[0])
    bounds = torch.tensor([0, 1, 41, 41, 65], dtype=torch.int32, device=device)
    packed = differentiated(
        lambda *x: complex_attention(*x, score, causal, bounds, longest), inputs, cotangent, torch.float32
    )
    apart = [
        differentiated(ours(score, causal), [x[:, :, p] for x in inputs], cotangent[:, :, p], torch.float32)
        for p in (slice(0, 1), slice(1, 41), slice(41, 65))
    ]
    for whole, *pieces in zip(packed, *apart, strict=True):
        torch.testing.assert_close(whole, torch.cat(pieces, dim=2))


@pytest.mark.parametrize("bounds", [[0, 3], [1, 65], [0, 40, 24, 65]])
def test_boundaries_must_cover_the_batch(bounds, device):
    if device.type == "cuda":
        pytest.skip("a failed assertion of the device ends the process's use of it")
    inputs = operands(device, torch.float32, (65, 65, 1, 1, 5))
    bounds = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0 to the 65 packed tokens"):
        complex_attention(*inputs, "phase", cu_seqlens=bounds)


def test_the_longest_packed_sequence_must_not_be_understated(device):
    if device.type == "cuda":
        pytest.skip("a failed assertion of the device ends the process's use of it")
    inputs = operands(device, torch.float32, (65, 65, 1, 1, 5))
    bounds = torch.tensor([0, 40, 65], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="max_seqlen=39 is less than the longest packed sequence"):
        complex_attention(*inputs, "phase", cu_seqlens=bounds, max_seqlen=39)


@pytest.mark.parametrize("score", SCORES)
def test_causality_bit_for_bit(score, device):
    q, k, v = operands(device, torch.float32, ONE_PAST_A_BLOCK)
    out = ours(score, True)(q, k, v)
    for x in (q, k, v):
        x[:, :, 50:] = 7.0
    assert torch.equal(ours(score, True)(q, k, v)[:, :, :50], out[:, :, :50])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", HALVES)
def test_repeated_gradients_are_the_same_bits(score, dtype, device):
    inputs = operands(device, dtype, ONE_PAST_A_BLOCK)
    cotangent = gradient_of(inputs[0])
    first, second = (differentiated(ours(score, True), inputs, cotangent, dtype) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_head_size_that_is_too_large(device):
    with pytest.raises(ValueError, match="width 130 is too large; at most 128"):
        complex_attention(*operands(device, torch.float32, (3, 3, 1, 1, 130)), "phase")
