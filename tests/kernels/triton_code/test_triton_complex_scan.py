from __future__ import annotations

import pytest
import torch
from support.pointwise import results, scattered
from support.rounding import assert_as_accurate
from support.scan import scan_inputs

from kernels.complex_scan import complex_scan, plain
from kernels.complex_scan.tiles import TILE


def check(leaves, samples=8):
    """Outputs and gradients against the plain recurrence in float64."""
    got = results(complex_scan, leaves)
    exact = results(plain.complex_scan, leaves, torch.float64)
    assert_as_accurate(got, lambda: results(plain.complex_scan, leaves), exact, samples)
    return got


@pytest.mark.parametrize(
    ("length", "channels", "dtype"),
    [
        (1, 1, torch.float32),
        (TILE - 1, 3, torch.float16),
        (TILE, 3, torch.float32),
        (TILE + 1, 17, torch.float16),
        (2 * TILE + 1, 5, torch.float32),
    ],
)
def test_value_and_every_gradient(length, channels, dtype, device):
    check(scan_inputs(2, length, channels, dtype, device))


def test_neither_inputs_nor_gradients_need_be_contiguous(device):
    leaves = scan_inputs(2, TILE + 3, 3, torch.float32, device)
    spread = results(complex_scan, scattered(leaves), spread=True)
    assert all(map(torch.equal, spread, results(complex_scan, leaves)))


def test_repeated_backward_is_bitwise_equal(device):
    leaves = scan_inputs(2, TILE + 3, 3, torch.float32, device)
    assert all(map(torch.equal, results(complex_scan, leaves), results(complex_scan, leaves)))


def test_no_output_sees_a_later_input(device):
    leaves = scan_inputs(1, TILE + 5, 2, torch.float32, device)
    before = complex_scan(*leaves)[0]
    for position in (3, TILE - 1, TILE):
        for index in range(2):
            changed = [leaf.clone() for leaf in leaves]
            changed[index][:, position] -= 1
            after = complex_scan(*changed)[0]
            assert torch.equal(after[:, :position], before[:, :position])
            assert not torch.equal(after[:, position], before[:, position])


def test_what_was_forgotten_has_no_trace(device):
    u, log_decay, angle, state = scan_inputs(1, TILE + 8, 2, torch.float32, device)
    log_decay[:, [5, TILE]] = -torch.inf
    got = results(complex_scan, [u, log_decay, angle, state])
    assert all(x.isfinite().all() for x in got)
    u[:, 4] += 1
    assert torch.equal(complex_scan(u, log_decay, angle, state)[0][:, 5:], got[0][:, 5:])


def test_the_scale_is_exact_for_every_decay(device):
    """Also where 1 - |lambda|^2 is a difference of numbers that are equal to six digits."""
    log_decay = -torch.logspace(-7, 1, 64, device=device)[None, None].clone()
    # Where a series ends and the difference begins.
    log_decay[..., :3] = torch.tensor([-0.4999, -0.5, -0.5001], device=device)
    u = torch.ones(1, 1, 2, 64, device=device)
    g = complex_scan(u, log_decay, torch.zeros(64, device=device))[0]
    exact = (-torch.expm1(2 * log_decay.double())).sqrt()
    for plane in g.unbind(-2):
        torch.testing.assert_close(plane.double(), exact, rtol=5e-7, atol=0)
