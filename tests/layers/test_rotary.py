from __future__ import annotations

import pytest
import torch

from kernels.complex_attention import complex_attention
from kernels.complex_rotary import rotate
from muse.layers import rotary_table, rotate_pairs
from muse.planar import to_complex

# The table is float32: an angle's cosine is right to 6e-8.
TABLE = {"rtol": 0, "atol": 1e-6}


def test_table_holds_unit_numbers_at_the_documented_rates():
    positions = torch.tensor([0, 1, 7, 4095])
    table = rotary_table(positions, 6, base=100.0)
    assert table.shape == (4, 2, 6)
    assert table.dtype == torch.float32
    c = to_complex(table.double())
    torch.testing.assert_close(c.abs(), torch.ones(4, 6, dtype=torch.float64), **TABLE)
    rates = 100.0 ** (-torch.arange(6, dtype=torch.float64) / 6)
    torch.testing.assert_close(
        c, torch.polar(torch.ones(4, 6).double(), positions[:, None].double() * rates), **TABLE
    )
    assert torch.equal(table[0], torch.stack((torch.ones(6), torch.zeros(6))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rotation_multiplies_and_keeps_moduli(dtype):
    z = torch.randn(2, 3, 9, 2, 5).to(dtype)
    table = rotary_table(torch.arange(9), 5)
    y = rotate(z, table)
    assert y.dtype == dtype
    expected = to_complex(z.double()) * to_complex(table.double())
    tolerance = {"rtol": 0, "atol": 4 * max(torch.finfo(dtype).eps, 1e-7)}
    torch.testing.assert_close(to_complex(y.double()), expected, **tolerance)
    torch.testing.assert_close(to_complex(y.double()).abs(), to_complex(z.double()).abs(), **tolerance)


@pytest.mark.parametrize("score", ["real", "magnitude", "phase"])
@pytest.mark.parametrize("shift", [1, 50, 1000])
def test_attention_depends_on_relative_positions_only(score, shift):
    q, k, v = torch.randn(3, 1, 2, 11, 2, 6, dtype=torch.float64)

    def attend(q_shift, k_shift):
        q_table, k_table = (rotary_table(torch.arange(11) + s, 6) for s in (q_shift, k_shift))
        return complex_attention(rotate(q, q_table), rotate(k, k_table), v, score)

    base = attend(0, 0)
    torch.testing.assert_close(attend(shift, shift), base, rtol=0, atol=1e-5)
    assert (attend(shift, 0) - base).abs().max() > 1e-2


def test_pairs_are_planes():
    x = torch.randn(2, 3, 7, 10)
    table = rotary_table(torch.arange(7), 5)
    assert torch.equal(rotate_pairs(x, table), rotate(x.unflatten(-1, (2, 5)), table).flatten(-2))
    # The textbook form on halves: x cos + rotate_half(x) sin.
    cos, sin = (torch.cat((t, t), dim=-1) for t in table.unbind(-2))
    turned = torch.cat((-x[..., 5:], x[..., :5]), dim=-1)
    torch.testing.assert_close(rotate_pairs(x, table), x * cos + turned * sin)


def test_gradient_is_the_inverse_rotation():
    z = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    table = rotary_table(torch.arange(4), 3)
    (gradient,) = torch.autograd.grad(rotate(z, table), z, rotate(z, table))
    torch.testing.assert_close(gradient, z, **TABLE)
