from __future__ import annotations

import math

import pytest
import torch

from muse.layers import KoopmanOperator
from muse.layers.koopman import noted_shares, prediction_loss
from muse.layers.prediction import distinct_share, predictable_shares, shares_of
from muse.planar import to_complex

CHANNELS = 24


def operator(**form):
    return KoopmanOperator(CHANNELS, CHANNELS, **form).double()


def noise(batch, length, channels=CHANNELS):
    return torch.randn(batch, length, 2, channels, dtype=torch.float64)


def process(batch, length, factor, channels=CHANNELS):
    """z_t = a z_(t-1) + noise, of variance 2, planar, after it has forgotten its start."""
    power = torch.complex(*noise(batch, length + 300, channels).unbind(2)) * math.sqrt(1 - abs(factor) ** 2)
    states = [power[:, 0]]
    for own in power.unbind(1)[1:]:
        states.append(factor * states[-1] + own)
    return torch.view_as_real(torch.stack(states[300:], 1)).transpose(-1, -2)


@pytest.mark.parametrize(("batch", "length"), [(16, 128), (2, 2048), (3, 12)])
@pytest.mark.parametrize("form", [{}, {"angles": False}, {"selective": False}], ids=str)
def test_no_share_of_white_noise_is_predictable(batch, length, form):
    """By operators whose memory is short and long; the taps are far from their start.

    R^2 of n samples is about 1/n, exponentially distributed, and the mean of K of them has a standard
    deviation of 1 / (n sqrt(K)).
    """
    layer = operator(**form)
    with torch.no_grad():
        layer.taps.normal_()
        with noted_shares(layer) as noted:
            layer(noise(batch, length))
    ((found, _),) = noted[""]
    assert abs(found) < 5 / (batch * (length - 1) * math.sqrt(CHANNELS))


@pytest.mark.parametrize("factor", [0.5, 0.9j, 0.8 * complex(math.cos(1), math.sin(1))])
def test_the_share_of_a_predictable_signal_is_its_true_one(factor):
    """Of an autoregressive process of factor a: |a|^2 (1 - |lambda|^2) / (1 - |lambda a|^2)."""
    layer = operator(selective=False)
    z = process(8, 4000, factor)
    with torch.no_grad():
        u = layer.projection(z)[..., :CHANNELS]
        with noted_shares(layer) as noted:
            layer(z)
        ((found, _),) = noted[""]
        size = layer.eigenvalues()[0].exp()
        wanted = abs(factor) ** 2 * (1 - size**2) / (1 - size**2 * abs(factor) ** 2)
        assert found == pytest.approx(wanted.mean().item(), abs=0.01)
        # By what was seen last alone, all there is.
        alone = predictable_shares(u, u)
    torch.testing.assert_close(alone, torch.full_like(alone, abs(factor) ** 2), rtol=0, atol=0.04)


def test_shares_are_those_of_a_regression():
    g, u = noise(2, 9), noise(2, 9)
    found = predictable_shares(g, u)
    known, wanted = (to_complex(x).flatten(0, 1) for x in (g[:, :-1], u[:, 1:]))
    for channel in range(CHANNELS):
        columns = torch.stack((torch.ones_like(known[:, 0]), known[:, channel]), 1)
        fit = columns @ torch.linalg.lstsq(columns, wanted[:, channel : channel + 1]).solution
        rest = (wanted[:, channel] - fit[:, 0]).abs().square().sum() / 14
        whole = (wanted[:, channel] - wanted[:, channel].mean()).abs().square().sum() / 15
        torch.testing.assert_close(found[channel], 1 - rest / whole)


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_copies_count_once(copies):
    distinct = torch.linalg.qr(torch.randn(4000, 12 // copies, dtype=torch.complex128) - 0j).Q
    distinct = torch.linalg.qr(distinct - distinct.mean(0)).Q
    factors = torch.exp(1j * torch.arange(copies)) * (1 + torch.arange(copies))
    channels = (distinct[:, :, None] * factors).flatten(1) + 3
    planar = torch.view_as_real(channels).transpose(1, 2).unflatten(0, (4, 1000))
    assert distinct_share(planar).item() == pytest.approx(1 / copies)


def test_neither_share_depends_on_scale_phase_and_mean():
    g, u = noise(3, 50), noise(3, 50) + 0.5 * noise(3, 50).cumsum(1)
    turned = to_complex(u) * (torch.rand(CHANNELS) * torch.exp(1j * torch.rand(CHANNELS)) * 100 + 1) + 7
    other = torch.view_as_real(turned).transpose(-1, -2)
    torch.testing.assert_close(shares_of(g, other), shares_of(g, u))
    assert shares_of(torch.zeros_like(g), torch.ones_like(u)).tolist() == pytest.approx([0, 1], abs=0.01)


def test_the_gradients_are_those_of_the_values_and_none_goes_through_what_is_predicted():
    g, u = (noise(2, 5, 3).requires_grad_() for _ in range(2))
    target = u.detach()
    assert torch.autograd.gradcheck(lambda g: predictable_shares(g, target), g)
    assert torch.autograd.gradcheck(distinct_share, u)
    predictable_shares(g, u).sum().backward()
    assert u.grad is None
    assert g.grad.any()


def test_every_parameter_before_the_output_is_trained():
    layer = operator()
    with noted_shares(layer) as noted:
        layer(noise(2, 20))
    prediction_loss(noted).backward()
    trained = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert trained == {"projection.weight", "taps", "rate.weight", "rate.bias", "nu", "theta"}
    assert all(parameter.grad.any() for name, parameter in layer.named_parameters() if name in trained)
    assert layer.noted is None


def _descended(distinct_weight):
    """Observables after a descent, of states of which one channel is predictable and all others are noise."""
    torch.manual_seed(0)
    layer = KoopmanOperator(8, 8)
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    for _ in range(150):
        z = noise(8, 64, 8).float()
        z[..., 0] = process(8, 64, 0.95, 1)[..., 0].float()
        with noted_shares(layer) as noted:
            layer(z)
        ((predictable, distinct),) = noted[""]
        optimizer.zero_grad()
        (-predictable - distinct_weight * distinct).backward()
        optimizer.step()
    return predictable.item(), distinct.item()


def test_observables_do_not_collapse_onto_what_is_predictable():
    predictable, distinct = _descended(0.0)
    assert predictable > 0.5
    assert distinct < 0.3
    predictable, distinct = _descended(1.0)
    assert distinct > 0.7
    assert predictable > 0.05


def test_too_few_tokens_have_no_shares():
    layer = operator()
    with noted_shares(layer) as noted:
        layer(noise(2, 2))
    assert noted == {"": []}
    assert prediction_loss(noted) is None
