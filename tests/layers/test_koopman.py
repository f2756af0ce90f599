from __future__ import annotations

import math

import pytest
import torch
from support.causality import assert_causal
from support.rounding import assert_as_accurate

from muse.layers import ComplexAttention, KoopmanOperator, KoopmanState
from muse.layers.koopman import LONGEST, SHARPNESS, SHORTEST, TAPS, half_lives
from muse.layers.packing import packing_of
from muse.planar import to_complex

FORMS = [{}, {"angles": False}, {"selective": False}]


def operator(dtype=torch.float64, d_model=6, observables=8, **form):
    """An operator none of whose parameters is at its start."""
    built = KoopmanOperator(d_model, observables, **form).to(dtype)
    with torch.no_grad():
        for parameter in (built.taps, *([built.rate.bias] if built.rate else [])):
            parameter.add_(0.5 * torch.randn_like(parameter))
    return built


def states(length, batch=2, d_model=6, dtype=torch.float64):
    return torch.randn(batch, length, 2, d_model).to(dtype)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_output_is_that_of_the_formula(form):
    """Token after token, in complex numbers."""
    layer, z = operator(**form), states(9)
    u, gate = to_complex(layer.projection(z)).chunk(2, -1)
    rate = torch.full((2, 9, 8), 0.5)
    if form.get("selective", True):
        rate = torch.sigmoid(layer.rate(torch.cat((z[..., 0, :], z[..., 1, :]), -1)))
    assert layer.theta.any() == form.get("angles", True)
    decay = torch.exp(-SHARPNESS * rate * torch.log1p(layer.nu.exp()))
    gelu = torch.nn.functional.gelu
    g, out = 0, []
    for t in range(9):
        heard = sum(layer.taps[:, TAPS - 1 - k] * u[:, t - k] for k in range(min(TAPS, t + 1)))
        g = decay[:, t] * torch.exp(1j * layer.theta) * g + (1 - decay[:, t] ** 2).sqrt() * heard
        out.append(g * torch.complex(gelu(gate[:, t].real), gelu(gate[:, t].imag)))
    weight = torch.complex(*layer.output.weight)
    torch.testing.assert_close(to_complex(layer(z)), torch.stack(out, 1) @ weight.mT)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_parameter_is_trained(form):
    layer = operator(**form)
    layer(states(5)).square().sum().backward()
    assert all((p.grad != 0).any() for p in layer.parameters())


def test_there_are_as_many_parameters_as_in_attention():
    layer = operator(d_model=8)
    attention = sum(p.numel() for p in ComplexAttention(8, 2).parameters())
    assert sum(p.numel() for p in layer.parameters()) == attention + 8 * (TAPS + 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_sees_a_later_one(dtype):
    layer, z = operator(dtype), states(70, dtype=dtype)
    assert_causal(layer, z, z + 1, (0, 3, 31, 32, 69))


@pytest.mark.parametrize("sizes", [[1] * 12, [7, 1, 1, 3], [2, 10]], ids=str)
def test_part_by_part_with_a_state_whose_size_stays(sizes):
    layer, z = operator(), states(12)
    cache, outs, kept = layer.new_cache(100), [], set()
    assert cache == KoopmanState()
    with torch.no_grad():
        for part in z.split(sizes, 1):
            outs.append(layer(part, cache))
            held = (cache.observables, cache.recent)
            # The memory behind them, too: a view of a long part would keep all of it.
            kept.add(tuple((own.shape, own.untyped_storage().nbytes()) for own in held))
        torch.testing.assert_close(torch.cat(outs, 1), layer(z))
    assert len(kept) == 1
    assert cache.length == 12


def test_half_lives_at_the_start_are_spread_evenly_in_their_logarithm():
    layer = KoopmanOperator(4, 5)
    decay, _ = layer.eigenvalues()
    half_lives = math.log(0.5) / decay
    expected = torch.logspace(math.log10(SHORTEST), math.log10(LONGEST), 5)
    torch.testing.assert_close(half_lives, expected, rtol=1e-4, atol=0)


def test_many_steps_without_input_are_one_product():
    layer = operator()
    g = torch.randn(3, 2, 8, dtype=torch.float64)
    stepwise = g
    for _ in range(50):
        stepwise = layer.evolve(stepwise, 1, rate=0.3)
    torch.testing.assert_close(layer.evolve(g, 50, rate=0.3), stepwise)
    # And they are those of the layer where nothing comes in.
    decay, theta = layer.eigenvalues(0.3)
    turned = to_complex(g) * torch.exp(torch.complex(decay, theta))
    torch.testing.assert_close(to_complex(layer.evolve(g, 1, rate=0.3)), turned)


def test_half_lives_of_a_model_are_told_by_operator():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), KoopmanOperator(4, 5))
    told = half_lives(model)
    # Of 1, 4, 16, 64 and 256.
    expected = {
        "koopman/1/half_life_p10": 2.2,
        "koopman/1/half_life_p50": 16,
        "koopman/1/half_life_p90": 179.2,
    }
    assert told == {key: pytest.approx(value, rel=1e-4) for key, value in expected.items()}


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_packed_documents_are_those_apart(form, dtype):
    layer, sizes = operator(**form), [[1, 2, 60, 7], [70], [3, 3, 3, 61]]
    positions = torch.stack([torch.cat([torch.arange(size) for size in row]) for row in sizes])
    z, packing = states(70, batch=3, dtype=dtype), packing_of(positions)

    def run(kind, packed):
        layer.to(kind)
        given = z.to(kind)
        if packed:
            return layer(given, packing=packing).detach()
        rows = zip(given, sizes, strict=True)
        alone = [torch.cat([layer(part) for part in row[None].split(own, 1)], 1) for row, own in rows]
        return torch.cat(alone).detach()

    layer.to(dtype)
    assert_as_accurate(
        (run(dtype, True),), lambda: (run(dtype, False),), (run(torch.float64, False),), samples=8
    )
    out = run(dtype, True)
    # Another document, and not a bit of the others.
    z[0, 40] = 5
    changed = (run(dtype, True) != out).flatten(2).any(-1)
    assert changed[0].tolist() == [40 <= n < 63 for n in range(70)]
    assert not changed[1:].any()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients_of_packed_documents_are_those_apart(form):
    layer, sizes = operator(**form), [1, 2, 40, 7]
    z = states(50, batch=1).requires_grad_()
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    cotangent = torch.randn_like(z)

    def gradients(out):
        return torch.autograd.grad((out * cotangent).sum(), [z, *layer.parameters()])

    packed = gradients(layer(z, packing=packing_of(positions)))
    for found, known in zip(
        packed, gradients(torch.cat([layer(part) for part in z.split(sizes, 1)], 1)), strict=True
    ):
        torch.testing.assert_close(found, known, rtol=1e-9, atol=1e-12)


def test_packed_documents_have_no_cache():
    with pytest.raises(ValueError, match="packed documents have no cache"):
        operator()(states(3, batch=1), KoopmanState(), packing_of(torch.arange(3)[None]))
