from __future__ import annotations

import pytest
import torch

from muse.layers import ComplexEmbedding
from muse.planar import to_complex


@pytest.mark.parametrize("init", ["zeta", "normal"])
@pytest.mark.parametrize("rms", [1.0, 0.02])
def test_states_have_unit_mean_square(init, rms):
    layer = ComplexEmbedding(300, 64, rms, init)
    z = layer(torch.arange(300)[None])
    assert z.shape == (1, 300, 2, 64)
    assert abs(z.square().sum(-2).mean().item() - 1) < 0.04
    assert abs(layer.weight.square().sum(1).mean().sqrt().item() / rms - 1) < 0.02
    assert len(torch.unique(z[0].flatten(1), dim=0)) == 300


def test_lookup_and_gradient_rows():
    layer = ComplexEmbedding(10, 4, rms=0.5)
    tokens = torch.tensor([[3, 3, 7], [0, 7, 9]])
    z = layer(tokens)
    torch.testing.assert_close(z, layer.weight[tokens] * 2)
    z.sum().backward()
    used = layer.weight.grad.flatten(1).abs().sum(1) > 0
    assert used.nonzero().flatten().tolist() == [0, 3, 7, 9]
    assert (layer.weight.grad[3] == 4).all()  # twice in the batch, each times 1/rms


def test_positional_phases():
    layer = ComplexEmbedding(10, 4, positions=6).double()
    tokens = torch.randint(10, (2, 5))
    still = layer(tokens)
    torch.testing.assert_close(still, layer.weight[tokens])  # phases start at 0
    with torch.no_grad():
        layer.phase.normal_()
    turn = torch.polar(torch.ones(5, 4).double(), layer.phase[:5].detach())
    torch.testing.assert_close(to_complex(layer(tokens)), to_complex(still) * turn)
    layer(tokens).square().sum().backward()
    assert layer.phase.grad.isfinite().all()
