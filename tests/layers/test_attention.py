from __future__ import annotations

import copy
import math

import pytest
import torch
from support.rounding import assert_as_accurate

from kernels.complex_attention import SCORES
from kernels.complex_attention.plain import attention
from muse.layers import ComplexAttention, KVCache
from muse.layers.packing import packing_of
from muse.planar import multiply


def turn(z, angle):
    return multiply(z, torch.tensor([[math.cos(angle)], [math.sin(angle)]], dtype=z.dtype))


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


def in_parts(layer, z, sizes):
    """Part by part, with the keys and values of earlier parts in a cache."""
    cache = KVCache()
    outs = []
    for part in z.split(sizes, dim=1):
        assert cache.length == sum(out.shape[1] for out in outs)
        outs.append(layer(part, cache))
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize(
    ("score", "dtype"),
    [
        *((score, torch.float64) for score in SCORES),
        ("real", torch.float16),
        ("magnitude", torch.float32),
        ("phase", torch.bfloat16),
    ],
)
def test_tokens_after_those_in_a_cache(score, dtype):
    """As accurate as all of them at once, and each is what it would be without the later ones."""
    layer = ComplexAttention(12, 4, 2, score).to(dtype)
    z = torch.randn(2, 9, 2, 12, dtype=torch.float64).to(dtype)
    parts = ([1] * 9, [4, 1, 4], [9], [1, 8])
    with torch.no_grad():
        outs = [in_parts(layer, z, sizes) for sizes in parts]
        exact = copy.deepcopy(layer).double()(z.double())
        if dtype == torch.float64:
            for out in outs:
                torch.testing.assert_close(out, exact, rtol=1e-11, atol=1e-12)
        else:
            assert_as_accurate(outs, lambda: [layer(z)] * len(parts), [exact] * len(parts), samples=8)
        z[:, 5:] = 7
        for out, sizes in zip(outs, parts, strict=True):
            assert torch.equal(in_parts(layer, z, sizes)[:, :5], out[:, :5])


@pytest.mark.parametrize(
    ("score", "dtype"),
    [
        ("real", torch.float64),
        ("real", torch.float32),
        ("magnitude", torch.bfloat16),
        ("phase", torch.float32),
    ],
)
def test_packed_documents_are_those_apart(score, dtype):
    layer = ComplexAttention(12, 4, 2, score).to(dtype)
    z = torch.randn(2, 7, 2, 12, dtype=torch.float64).to(dtype)
    # One ends where a window does.
    packing = packing_of(torch.tensor([[0, 0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3, 4]]))
    assert packing.cu_seqlens.tolist() == [0, 1, 7, 9, 14]

    def run(kind, packed):
        layer.to(kind)
        leaf = z.to(kind).requires_grad_()
        if packed:
            out = layer(leaf, packing=packing)
        else:
            row = leaf.view(1, 14, 2, 12)
            out = torch.cat([layer(part) for part in row.split([1, 6, 2, 5], dim=1)], dim=1).view_as(leaf)
        return out.detach(), torch.autograd.grad(out.float().square().sum(), leaf)[0]

    assert_as_accurate(run(dtype, True), lambda: run(dtype, False), run(torch.float64, False), samples=8)
    layer.to(dtype)
    with torch.no_grad():
        before = layer(z, packing=packing)
        z[0, 5] = 7
        after = layer(z, packing=packing)
    changed = [not torch.equal(a, b) for a, b in zip(before.flatten(0, 1), after.flatten(0, 1), strict=True)]
    assert changed == [5 <= n < 7 for n in range(14)]


def test_packed_documents_have_no_cache():
    packing = packing_of(torch.arange(3)[None])
    with pytest.raises(ValueError, match="packed documents have no cache"):
        ComplexAttention(12, 4)(torch.randn(1, 3, 2, 12), KVCache(), packing)
    with pytest.raises(ValueError, match="packed documents have no cache and no window"):
        ComplexAttention(12, 4, window=2)(torch.randn(1, 3, 2, 12), packing=packing)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("window", [1, 2, 5, 8, 30, 31])
def test_a_window_is_a_mask(score, window, monkeypatch):
    layer = ComplexAttention(12, 4, 2, score, window=window).double()
    z = torch.randn(2, 30, 2, 12, dtype=torch.float64)
    out = layer(z)

    def masked(q, k, v, score, window):
        places = torch.arange(30)
        hidden = (places > places[:, None]) | (places <= places[:, None] - window)
        return attention(q, k, v, score, hidden)

    monkeypatch.setattr("muse.layers.attention.windowed_attention", masked)
    torch.testing.assert_close(out, layer(z), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("sizes", [[1] * 30, [4, 1, 20, 5], [29, 1], [2, 2, 26]], ids=str)
@pytest.mark.parametrize("window", [1, 4, 7])
def test_a_window_keeps_no_more_than_it_sees(score, sizes, window):
    layer = ComplexAttention(12, 4, 2, score, window=window).double()
    z = torch.randn(2, 30, 2, 12, dtype=torch.float64)
    cache, outs = layer.new_cache(30), []
    with torch.no_grad():
        for part in z.split(sizes, 1):
            assert cache.length == sum(out.shape[1] for out in outs)
            outs.append(layer(part, cache))
            assert cache.keys.untyped_storage().nbytes() <= (window - 1) * 2 * 2 * 2 * 3 * 8
        torch.testing.assert_close(torch.cat(outs, 1), layer(z), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("score", "dtype"), [*zip(SCORES, [torch.float32, torch.bfloat16, torch.float32])])
def test_no_token_sees_a_later_one_or_beyond_its_window(score, dtype):
    layer, z = ComplexAttention(12, 4, 2, score, window=7).to(dtype), torch.randn(2, 40, 2, 12).to(dtype)
    with torch.no_grad():
        before = layer(z)
        for position in (0, 3, 6, 7, 20, 39):
            other = z.clone()
            other[:, position] += 1
            after = layer(other)
            changed = [not torch.equal(a, b) for a, b in zip(after.unbind(1), before.unbind(1), strict=True)]
            assert changed == [position <= n < position + 7 for n in range(40)]
