from __future__ import annotations

import math

import pytest
import torch

from muse.layers.init import rayleigh_, rayleigh_scale, riemann_zeros, zeta_

# The n-th zero on the critical line, rounded (Odlyzko's tables).
ZEROS = {
    1: 14.134725, 2: 21.022040, 3: 25.010858, 4: 30.424876, 5: 32.935062, 6: 37.586178, 7: 40.918719,
    8: 43.327073, 9: 48.005151, 10: 49.773832, 100: 236.524230, 1000: 1419.422481,
}  # fmt: skip


def test_rayleigh_moduli_and_uniform_phases():
    weight = rayleigh_(torch.empty(2, 300, 200, dtype=torch.float64), 0.3)
    c = torch.complex(weight[0], weight[1]).flatten()
    square = c.abs().square()
    noise = 5 / math.sqrt(c.numel())
    assert abs(square.mean() / (2 * 0.3**2) - 1) < noise
    # Of a Rayleigh modulus E|w|^4 = 2 (E|w|^2)^2; the relative deviation of |w|^4 is sqrt(5).
    assert abs(square.square().mean() / (2 * square.mean() ** 2) - 1) < noise * math.sqrt(5)
    for harmonic in range(1, 5):
        assert (c / c.abs()).pow(harmonic).mean().abs() < noise


@pytest.mark.parametrize(("kind", "expected"), [("glorot", 1 / math.sqrt(50)), ("he", 1 / math.sqrt(20))])
def test_rayleigh_scale(kind, expected):
    assert rayleigh_scale(20, 30, kind) == pytest.approx(expected)


def test_zeros_are_within_half_of_the_local_spacing():
    found = riemann_zeros(max(ZEROS))
    assert found.dtype == torch.float64
    assert (found.diff() > 0).all()
    for n, zero in ZEROS.items():
        spacing = 2 * math.pi / math.log(zero / (2 * math.pi))
        assert abs(found[n - 1].item() - zero) < spacing / 2, n


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_zeta_phases_turn_at_the_zeros(scale):
    weight = zeta_(torch.empty(40, 2, 16), rms=0.7, zeta_scale=scale)
    phase = torch.outer(torch.arange(1, 41, dtype=torch.float64), riemann_zeros(16) * scale)
    unit = weight / weight.square().sum(1, keepdim=True).sqrt()
    expected = torch.stack((phase.cos(), phase.sin()), dim=1).float()
    torch.testing.assert_close(unit, expected, atol=2e-6, rtol=0)


def test_zeta_moduli_and_rows():
    weight = zeta_(torch.empty(500, 2, 64), rms=0.1)
    square = weight.square().sum(1)
    assert abs(square.mean().item() / 0.1**2 - 1) < 5 / math.sqrt(square.numel())
    assert abs(square.square().mean() / (2 * square.mean() ** 2) - 1) < 5 * math.sqrt(5 / square.numel())
    assert len(torch.unique(weight.flatten(1), dim=0)) == 500
    # The rows are not only distinct but far apart: no pair is near parallel.
    rows = torch.nn.functional.normalize(weight.flatten(1))
    assert (rows @ rows.T).fill_diagonal_(0).abs().max() < 0.6
