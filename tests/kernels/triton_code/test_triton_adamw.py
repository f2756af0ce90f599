"""The Triton code of AdamW: the bits of the eager implementation, whatever the launch."""

from __future__ import annotations

import pytest
import torch
from support.adamw import OPTIONS, arguments, bits, copied, held, numbers

from kernels.adamw import adamw, eager, plain, triton_code
from kernels.launch import eager as without_triton
from kernels.triton_import import INTERPRETED

# In the interpreter a block holds 64 elements and a piece of one 8. Runs begin at even and odd positions, at
# aligned addresses and at others.
SHAPES = {
    "less than a block": {"shape": (37,), "decays": False},
    "whole blocks": {"shape": (4, 64)},
    "a last block": {"shape": (5, 61)},
    "an odd position": {"shape": (4, 64), "starts": (7,)},
    "a far position": {"shape": (3, 64), "starts": (2**33 + 6,)},
    "another address": {"shape": (4, 64), "shift": 1},
    "runs": {"shape": (2, 16, 8), "starts": (128, 1024)},
    "runs of odd length": {"shape": (3, 5, 15), "starts": (10, 110, 211)},
    "planes": {"shape": (2, 16, 8), "plane": 128},
    "inner planes": {"shape": (20, 2, 9), "plane": 9},
    "runs of planes": {"shape": (2, 8, 8), "starts": (64, 320), "plane": 64},
}


@pytest.fixture(autouse=True)
def accesses_stay_inside(no_access_outside_of_the_operands):
    """The tensors are known to the kernel by their addresses alone."""

    def allow(those):
        if no_access_outside_of_the_operands is not None:
            tensors = [x for one in those for x in (*one.tensors(), one.gradient)]
            no_access_outside_of_the_operands[:] = tensors

    return allow


def build(names):
    return [held(**SHAPES[name], seed=n) for n, name in enumerate(names)]


@pytest.mark.parametrize("round_moments", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_bits_are_those_of_the_eager_implementation(name, round_moments, device, accesses_stay_inside):
    those = build([name])
    twins = copied(those)
    with without_triton():
        adamw(*arguments(twins), numbers(0.7), round_moments)
    those = [on(one, device) for one in those]
    accesses_stay_inside(those)
    before = [x.clone() for x in bits(those)]
    adamw(*arguments(those), numbers(0.7), round_moments)
    for found, expected, start in zip(bits(those), bits(twins), before, strict=True):
        assert torch.equal(found.cpu(), expected)
        assert not torch.equal(found, start)


def on(one, device):
    """The same on another device, as far from an aligned address."""
    if device.type == "cpu":
        return one
    (other,) = copied([one])
    room = [
        x.new_empty(x.numel() + x.storage_offset(), device=device) for x in (*other.tensors(), other.gradient)
    ]
    placed = [
        r[x.storage_offset() :].view(x.shape).copy_(x)
        for r, x in zip(room, (*other.tensors(), other.gradient), strict=True)
    ]
    part = type(one.part)(*placed[:3], one.part.decays, one.part.starts, one.part.plane)
    return type(one)(part, placed[3], one.key)


def test_one_launch_steps_all_parts(device, monkeypatch, accesses_stay_inside):
    those = build(SHAPES)
    twins = copied(those)
    with without_triton():
        adamw(*arguments(twins), numbers())
    those = [on(one, device) for one in those]
    accesses_stay_inside(those)
    launched = []
    launch = triton_code.launch
    monkeypatch.setattr(triton_code, "launch", lambda *a, **k: (launched.append(a), launch(*a, **k)))
    adamw(*arguments(those), numbers())
    assert len(launched) == 1
    assert all(torch.equal(x.cpu(), y) for x, y in zip(bits(those), bits(twins), strict=True))


@pytest.mark.parametrize("block", [16, 32, 128])
def test_bits_do_not_depend_on_the_launch(block, device, monkeypatch, accesses_stay_inside):
    names = ["a last block", "runs", "inner planes"]
    results = []
    for size in (None, block):
        if size is not None:
            options = {"BLOCK": size, "num_warps": 4, "num_stages": 1}
            monkeypatch.setattr(type(triton_code.PINNED), "choose", lambda *_, options=options: options)
        those = [on(one, device) for one in build(names)]
        accesses_stay_inside(those)
        adamw(*arguments(those), numbers())
        results.append(bits(those))
    assert all(map(torch.equal, *results))


def test_follows_float64(device, accesses_stay_inside):
    (one,) = (on(one, device) for one in build(["a last block"]))
    exact = plain.adamw(
        *(x.double() for x in (one.part.parameter, one.gradient, *one.tensors()[1:])), **OPTIONS
    )
    accesses_stay_inside([one])
    adamw(*arguments([one]), numbers())
    for found, expected in zip(one.tensors(), exact, strict=True):
        ulp = torch.exp2(torch.floor(torch.log2(expected.abs().clamp_min(2.0**-126))) - 7)
        assert ((found.double() - expected).abs() <= ulp + 1e-6 * expected.abs().max()).all()


def test_special_numbers(device, accesses_stay_inside):
    """Zeros, the smallest, the largest; what is not a number stays none."""
    values = [0.0, -0.0, 2.0**-133, -(2.0**-126), 1e-20, 1e18, -3e38, float("inf"), float("nan")]
    those = [held((64,))]
    for x in (*those[0].tensors(), those[0].gradient):
        spread = torch.tensor(values).repeat(8)[
            torch.randperm(64, generator=torch.Generator().manual_seed(x.numel()))
        ]
        x.copy_(spread.abs() if x is those[0].part.exp_avg_sq else spread)
    those[0].gradient.copy_(those[0].gradient.roll(3))
    twins = copied(those)
    with without_triton():
        adamw(*arguments(twins), numbers())
    those = [on(one, device) for one in those]
    accesses_stay_inside(those)
    adamw(*arguments(those), numbers())
    for one, other in zip(those[0].tensors(), twins[0].tensors(), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0, equal_nan=True)


def test_an_idle_launch_changes_nothing(device, monkeypatch, accesses_stay_inside):
    """What is measured while a configuration is looked for."""
    those = [on(one, device) for one in build(["a last block", "planes"])]
    accesses_stay_inside(those)
    before = [x.clone() for one in those for x in one.tensors()]
    triton_code.step(*arguments(those), triton_code.IDLE, False)
    assert all(map(torch.equal, before, (x for one in those for x in one.tensors())))


FAULTS = {
    "another multiplier": ("SECOND", 0x846CA68D),
    "another floor": ("FLOOR", 1e-3),
}


@pytest.mark.skipif(not INTERPRETED, reason="faults are planted in the interpreter")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault, device, monkeypatch, accesses_stay_inside):
    from kernels.triton_import import tl

    those = build(["a last block", "planes"])
    twins = copied(those)
    name, value = FAULTS[fault]
    with without_triton():
        adamw(*arguments(twins), numbers())
    monkeypatch.setattr(triton_code, name, tl.constexpr(value))
    accesses_stay_inside(those)
    adamw(*arguments(those), numbers())
    assert not all(map(torch.equal, bits(those), bits(twins)))
    assert eager.FLOOR == 2.0**-126
