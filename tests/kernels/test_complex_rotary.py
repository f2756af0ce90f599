from __future__ import annotations

import pytest
import torch
from support.pointwise import DTYPES, table_of

from kernels.complex_rotary import rotate, split_heads
from muse.planar import to_complex


def scores(q, k):
    """q_n conj(k_m) of every two positions, per channel: (S, S, D)."""
    return to_complex(q)[:, None] * to_complex(k)[None].conj()


def test_scores_of_rotated_states_depend_on_relative_positions_only():
    q, k = torch.randn(2, 7, 2, 3, dtype=torch.float64)

    def turned_at(shift):
        table = table_of(7, 3, start=shift)
        return rotate(q, table), rotate(k, table)

    base, moved = turned_at(0), turned_at(40)
    torch.testing.assert_close(scores(*base), scores(*moved))
    # Without the conjugate positions would add up.
    products = [to_complex(q)[:, None] * to_complex(k)[None] for q, k in (base, moved)]
    assert (products[0] - products[1]).abs().max() > 0.1
    # Nor may a difference of positions go unnoticed.
    assert (scores(base[0], moved[1]) - scores(*base)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_inverse_rotation_undoes_rotation(dtype):
    z, table = torch.randn(2, 3, 9, 2, 5).to(dtype), table_of(9, 5)
    tolerance = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps * z.abs().max().item()}
    torch.testing.assert_close(rotate(rotate(z, table), table, inverse=True), z, **tolerance)
    assert (rotate(rotate(z, table), table) - z).abs().max() > 0.1


def test_rotation_has_a_second_derivative():
    z, table = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True), table_of(3, 4)
    assert torch.autograd.gradgradcheck(lambda z: rotate(z, table), z)


@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (4, 4)])
def test_split_heads_gives_contiguous_heads(sizes):
    heads, kv_heads = sizes
    projection = torch.randn(2, 1, 2, heads + 2 * kv_heads, 5)
    parts = split_heads(projection, table_of(1, 5), heads, kv_heads)
    assert [x.shape for x in parts] == [(2, count, 1, 2, 5) for count in (heads, kv_heads, kv_heads)]
    assert all(x.is_contiguous() for x in parts)
    assert torch.equal(parts[2].permute(0, 2, 3, 1, 4), projection[:, :, :, -kv_heads:])


def test_bad_input():
    with pytest.raises(ValueError, match="does not fit a table"):
        rotate(torch.randn(4, 2, 3), table_of(5, 3))
    with pytest.raises(ValueError, match="do not fit 2 query heads and 1 key"):
        split_heads(torch.randn(1, 4, 2, 5, 3), table_of(4, 3), 2, 1)
