from __future__ import annotations

import math

import pytest
import torch

from kernels.complex_attention import SCORES
from muse.layers import ComplexAttention
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
