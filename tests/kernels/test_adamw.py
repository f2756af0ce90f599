"""AdamW over bfloat16: its maths, its random numbers and its rounding, in the eager implementation."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from support.adamw import OPTIONS, arguments, bits, copied, held, numbers

from kernels.adamw import Part, adamw, coefficients, eager, key_of, plain, round_stochastically
from kernels.adamw.triton_code import compile_cases
from kernels.launch import TARGETS
from kernels.resources import compile_launch, launches
from kernels.triton_import import triton


def ulp(x):
    """Of bfloat16 at the size of float64 ``x``."""
    return torch.exp2(torch.floor(torch.log2(x.abs().clamp_min(2.0**-126))) - 7)


@pytest.mark.parametrize("plane_axis", [None, 0, 1])
@pytest.mark.parametrize("decays", [True, False])
@pytest.mark.parametrize("round_moments", [True, False])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_follows_float64(plane_axis, decays, round_moments, factor):
    shape = (50, 2, 32) if plane_axis == 1 else (2, 50, 32)
    plane = 0 if plane_axis is None else math.prod(shape[plane_axis + 1 :])
    one = held(shape, plane=plane, decays=decays)
    w, m, v = (x.double() for x in one.tensors())
    options = OPTIONS if decays else OPTIONS | {"weight_decay": 0.0}
    exact = plain.adamw(w, one.gradient.double() * factor, m, v, **options, plane_axis=plane_axis)
    adamw(*arguments([one]), numbers(factor), round_moments)
    for found, expected, nearest in zip(
        one.tensors(), exact, (False, not round_moments, not round_moments), strict=True
    ):
        # Below, the rounding of float32 before that of bfloat16; a sum that cancels has that of its terms.
        error, largest = (found.double() - expected).abs(), (0.5 if nearest else 1.0) * ulp(expected)
        assert (error <= largest + 1e-6 * expected.abs().max()).all()


def test_is_plain_adamw_but_for_the_rounding_of_parameters():
    one = held((64, 33))
    expected = plain.adamw(one.part.parameter, one.gradient, *one.tensors()[1:], **OPTIONS)
    before = one.part.parameter.clone()
    adamw(*arguments([one]), numbers())
    for found, other in zip(one.tensors()[1:], expected[1:], strict=True):
        # Where float32 rounds otherwise, a number between two in bfloat16 may fall to the other one.
        assert (found != other).float().mean() < 1e-3
    assert ((found := one.part.parameter) != expected[0]).float().mean() > 0.1
    assert not torch.equal(found, before)


def test_the_root_and_quotient_of_the_cpu_are_rounded_correctly():
    """On which the bits of ``adamw`` depend; torch.sqrt is not everywhere."""
    exponents = torch.randint(-126, 60, (2**16,)).float()
    x = torch.rand(2**16).add_(1).mul_(torch.exp2(exponents))
    exact = np.float32(1) / np.sqrt(x.numpy())
    assert np.array_equal(x.rsqrt().numpy(), exact)
    assert np.array_equal(x.div(x.flip(0)).numpy(), x.numpy() / x.numpy()[::-1])


def noise(key, start, count):
    work = eager.Workspace(count, torch.device("cpu"))
    return work.noise(key, start, torch.empty(count, dtype=torch.int32))


def scalar_noise(key, position):
    """The definition, in Python's whole numbers."""
    from kernels.adamw.noise import FIRST, SECOND, WEYL

    x = (position // 2 * WEYL + key) % 2**32
    x ^= x >> 16
    x = x * FIRST % 2**32 ^ key >> 32
    x ^= x >> 15
    x = x * SECOND % 2**32
    return x >> 16 if position % 2 else x % 2**16


@pytest.mark.parametrize("start", [0, 1, 777, 2**31 - 5, 2**32 - 3, 2**40 + 1])
def test_noise_is_the_hash_of_a_position(start):
    key = key_of(3, 4, "some.weight")
    found = noise(key, start, 20)
    assert found.tolist() == [scalar_noise(key, start + n) for n in range(20)]
    assert torch.equal(noise(key, start + 7, 13), found[7:])


def test_keys_differ_in_everything():
    keys = {
        key_of(*of) for of in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (1, 11, "a"), (11, 1, "a"))
    }
    assert len(keys) == 6
    assert all(0 <= key < 2**64 for key in keys)


def test_noise_is_uniform_and_independent():
    """Of 2^20 numbers: bits, bytes, neighbours, and the same position under other keys and steps."""
    count = 2**20
    x, other = (noise(key_of(0, step, "weight"), 0, count) for step in (0, 1))
    for byte in (x & 255, x >> 8):
        counts = torch.bincount(byte, minlength=256).double()
        chi = ((counts - count / 256).square() / (count / 256)).sum().item()
        assert abs(chi - 255) < 6 * math.sqrt(2 * 255)
    bound = 6 / math.sqrt(count)
    centred = (x.double() + 0.5) / 2**16 - 0.5
    assert abs(centred.mean().item()) * math.sqrt(12) < bound
    for lag in (1, 2, 3, 4, 64, 512, 1024, 2**16):
        assert abs((centred[lag:] * centred[:-lag]).mean().item()) * 12 < 6 / math.sqrt(count - lag), lag
    across = (other.double() + 0.5) / 2**16 - 0.5
    assert abs((centred * across).mean().item()) * 12 < bound
    # Each bit against each other bit of its neighbour.
    planes = torch.stack([(x >> n) & 1 for n in range(16)]).float().mul_(2).sub_(1)
    assert (planes[:, :-1] @ planes[:, 1:].T / count).abs().max() < bound


@pytest.mark.parametrize("share", [2**-12, 0.1, 0.5, 0.9])
def test_rounding_is_unbiased(share):
    """The mean over 4000 seeds of each of 8 positions, and of all, within 5 standard errors."""
    seeds, count, below, step = 4000, 8, 1.0, 2.0**-7
    value = torch.full((count,), below + share * step)
    exact = value[0].item()
    found = torch.zeros(count, dtype=torch.float64)
    for seed in range(seeds):
        target = torch.empty(count, dtype=torch.bfloat16)
        round_stochastically(target, value.clone(), key_of(seed, 0, "weight"), (5,))
        assert set(target.tolist()) <= {below, below + step}
        found += target.double()
    error = step * math.sqrt(share * (1 - share) / seeds)
    assert ((found / seeds - exact).abs() < 5 * error).all()
    assert abs(found.mean().item() / seeds - exact) < 5 * error / math.sqrt(count)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_what_bfloat16_holds_stays(sign):
    values = torch.tensor([0.0, 2.0**-133, 2.0**-126, 1.0, 1.5, 3.3e38, math.inf]).bfloat16() * sign
    for seed in range(50):
        target = torch.empty_like(values)
        round_stochastically(target, values.float(), key_of(seed, 0, "weight"), (0,))
        assert torch.equal(target, values)
    target = torch.empty(1, dtype=torch.bfloat16)
    round_stochastically(target, torch.tensor([math.nan]), 0, (0,))
    assert target.isnan().all()


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_bits_do_not_depend_on_chunks(chunk, monkeypatch):
    those = [held((2, 50, 9), (0,), 450), held((37,), decays=False, seed=1)]
    others = copied(those)
    adamw(*arguments(those), numbers())
    monkeypatch.setattr(eager, "CHUNK", chunk)
    adamw(*arguments(others), numbers())
    assert all(map(torch.equal, bits(those), bits(others)))


@pytest.mark.parametrize("round_moments", [True, False])
@pytest.mark.parametrize(("axis", "ranks"), [(0, 2), (0, 3), (1, 2), (1, 5), (2, 3)])
def test_bits_do_not_depend_on_shards(axis, ranks, round_moments):
    shape = (6, 10, 9)
    one = held(shape)
    parts = []
    for first in range(0, shape[axis], shape[axis] // ranks):
        piece = one.tensors()[0].narrow(axis, first, shape[axis] // ranks)
        inner = math.prod(shape[axis + 1 :])
        starts = tuple((run * shape[axis] + first) * inner for run in range(math.prod(shape[:axis])))
        w, m, v, g = (
            x.narrow(axis, first, piece.shape[axis]).clone(memory_format=torch.contiguous_format)
            for x in (*one.tensors(), one.gradient)
        )
        adamw([Part(w, m, v, True, starts)], [g], [one.key], numbers(), round_moments)
        parts.append((w, m, v))
    adamw(*arguments([one]), numbers(), round_moments)
    for whole, pieces in zip(one.tensors(), zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(pieces, axis), whole)


def test_nothing_to_step():
    adamw([], [], [], numbers())
    empty = held((0, 3))
    adamw(*arguments([empty]), numbers())


def test_what_does_not_fit_is_refused():
    one = held((4, 6))
    with pytest.raises(ValueError, match=re.escape("(4, 6) and dtype torch.float32 is not a contiguous bf")):
        adamw([one.part], [one.gradient.float()], [0], numbers())
    with pytest.raises(ValueError, match="not a contiguous bfloat16 tensor"):
        adamw([one.part], [one.gradient.T], [0], numbers())
    part = Part(*one.tensors(), decays=True, starts=(0, 1, 2, 3, 4))
    with pytest.raises(ValueError, match="24 elements are not 5 runs of equal length"):
        adamw([part], [one.gradient], [0], numbers())


def test_coefficients_are_those_of_the_first_update():
    found = coefficients(0.1, (0.9, 0.99), 1e-8, 0.5, 1, 0.5)
    # m / (1 - b1) and sqrt(v / (1 - b2)) are the gradient: a step of lr.
    gradient = 3.0
    m, v = found.gain_m * gradient, (found.gain_v * gradient) ** 2
    step = found.rate * m / (math.sqrt(v) + found.offset)
    assert step == pytest.approx(0.1)
    assert found.shrink == pytest.approx(0.95)


@pytest.mark.slow
@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_compiled_code_rounds_every_operation_and_moves_16_bytes():
    """What the equality of bits rests on where there is no GPU to see it."""
    cuda = next(target for target in TARGETS if target.name == "sm_90")
    (launched,) = launches(cuda, compile_cases())["bfloat16 adamw_kernel"]
    ptx = compile_launch(launched).asm["ptx"]
    assert not re.findall(r"\bfma\.|\.ftz|\.approx|\bmad\.[\w.]*f32", ptx)
    # Parameter, gradient and moments; all but the gradient back.
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == 4
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == 3
    contracted = launched._replace(options=launched.options | {"enable_fp_fusion": True})
    assert re.search(r"\bfma\.", compile_launch(contracted).asm["ptx"])
