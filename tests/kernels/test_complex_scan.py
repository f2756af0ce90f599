from __future__ import annotations

import pytest
import torch
from support.pointwise import results
from support.rounding import assert_as_accurate
from support.scan import scan_inputs

from kernels import complex_scan as operation
from kernels.complex_scan import complex_scan, plain
from kernels.complex_scan.tiles import TILE

LENGTHS = [1, TILE - 1, TILE, TILE + 1, 3 * TILE + 5]


@pytest.mark.parametrize("length", LENGTHS)
def test_value_and_every_gradient_are_those_of_the_recurrence(length):
    leaves = scan_inputs(2, length, 3)
    for actual, expected in zip(
        results(complex_scan, leaves), results(plain.complex_scan, leaves), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_accuracy(dtype):
    leaves = scan_inputs(2, TILE + 9, 5, dtype)
    assert_as_accurate(
        results(complex_scan, leaves),
        lambda: results(plain.complex_scan, leaves),
        results(plain.complex_scan, leaves, torch.float64),
        samples=8,
    )


def test_gradcheck():
    leaves = [leaf.requires_grad_() for leaf in scan_inputs(1, TILE + 2, 2)]
    assert torch.autograd.gradcheck(complex_scan, leaves)


def test_registration():
    leaves = scan_inputs(2, TILE + 3, 3, torch.bfloat16)
    torch.library.opcheck(operation._complex_scan, [leaf.requires_grad_() for leaf in leaves])
    u, log_decay, angle, _ = (leaf.detach() for leaf in leaves)
    g, final, entries = (x.detach() for x in operation._complex_scan(*leaves))
    torch.library.opcheck(operation._complex_scan_backward, (g, final, u, log_decay, angle, entries))


@pytest.mark.slow
def test_compiles_in_one_graph():
    leaves = scan_inputs(2, TILE + 3, 3, torch.float32)
    compiled = torch.compile(complex_scan, fullgraph=True)
    for actual, expected in zip(results(compiled, leaves), results(complex_scan, leaves), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("cut", [1, TILE, TILE + 7])
def test_a_sequence_goes_on_where_its_first_part_ended(cut):
    u, log_decay, angle, state = scan_inputs(2, 2 * TILE + 3, 3)
    g, final = complex_scan(u, log_decay, angle, state)
    first, between = complex_scan(u[:, :cut], log_decay[:, :cut], angle, state)
    second, end = complex_scan(u[:, cut:], log_decay[:, cut:], angle, between)
    torch.testing.assert_close(torch.cat((first, second), 1), g)
    torch.testing.assert_close(end, final)


def test_what_was_forgotten_has_no_trace():
    """Sequences that are packed one behind the other, as if each were alone, forward and backward."""
    u, log_decay, angle, state = scan_inputs(1, 2 * TILE, 3)
    starts = [5, TILE, TILE + 9]
    log_decay[:, starts] = -torch.inf
    packed = results(complex_scan, [u, log_decay, angle, state])
    assert all(x.isfinite().all() for x in packed)
    other = u.clone()
    other[:, 4] += 1
    changed = complex_scan(other, log_decay, angle, state)[0]
    assert torch.equal(changed[:, 5:], packed[0][:, 5:])
    assert not torch.equal(changed[:, 4], packed[0][:, 4])
    torch.testing.assert_close(packed[0][:, starts], u[:, starts])
    alone = complex_scan(u[:, 5:TILE], log_decay[:, 5:TILE], angle)[0]
    torch.testing.assert_close(alone, packed[0][:, 5:TILE])


def test_no_output_sees_a_later_input():
    leaves = scan_inputs(2, 2 * TILE, 3, torch.float32)
    before = complex_scan(*leaves)[0]
    for position in (0, TILE - 1, TILE, TILE + 5):
        for index in range(2):
            changed = [leaf.clone() for leaf in leaves]
            changed[index][:, position] -= 1
            after = complex_scan(*changed)[0]
            assert torch.equal(after[:, :position], before[:, :position])
            # Of the first token's decay only the state and the scale know.
            assert not torch.equal(after[:, position], before[:, position])


def test_white_noise_keeps_its_variance():
    u, log_decay, angle, _ = scan_inputs(4, 4000, 8, torch.float32)
    log_decay = log_decay.mean(1, keepdim=True).expand_as(log_decay)
    g = complex_scan(u, log_decay, angle)[0][:, 1000:]
    assert g.square().mean() == pytest.approx(1, rel=0.05)


def test_a_state_without_decay_and_input_turns():
    u, log_decay, angle, state = scan_inputs(1, 100, 4)
    g, final = complex_scan(u * 5, log_decay * 0, angle, state)
    torch.testing.assert_close(g.square().sum(-2), state.square().sum(-2)[:, None].expand(1, 100, 4))
    turned = torch.view_as_complex(state.mT.contiguous()) * torch.exp(100j * angle)
    torch.testing.assert_close(torch.view_as_complex(final.mT.contiguous()), turned)


def test_repeated_backward_is_bitwise_equal():
    leaves = scan_inputs(3, 3 * TILE, 17, torch.float32)
    assert all(map(torch.equal, results(complex_scan, leaves), results(complex_scan, leaves)))


@pytest.mark.parametrize("fault", ["planes", "decay", "angle", "state", "no tokens"])
def test_bad_input(fault):
    u, log_decay, angle, state = scan_inputs(2, 4, 3)
    match fault:
        case "planes":
            u = u[:, :, :1]
        case "decay":
            log_decay = log_decay[:, :3]
        case "angle":
            angle = angle[:2]
        case "state":
            state = state[:1]
        case "no tokens":
            u, log_decay = u[:, :0], log_decay[:, :0]
    with pytest.raises(ValueError, match="shape"):
        complex_scan(u, log_decay, angle, state)
