"""The arithmetic of inference beside the model's own forward pass, in float32."""

from __future__ import annotations

import pytest
import torch
from support.configs import VOCAB, small_sizes, stage_config

from muse.models import build_model
from muse.serving.decoder import SlotDecoder

WINDOW = 70
MODELS = [
    {"number": "0"},
    {"number": "0", "activation": "swiglu", "tied": False},
    {"number": "0", "trunk": "reversible", "loops": 1},
    {"number": "1"},
    {"number": "1", "tied": False, "dropout": 0.5, "precision": "bf16"},
    {"number": "1", "norm": "layer", "loops": 2},
    {"number": "1", "trunk": "reversible"},
    {"number": "1", "mixer": "none"},
    {"number": "1", "mixer": "none", "loops": 2},
    *({"number": "1", "score": score} for score in ("magnitude", "phase")),
    *({"number": "1", "activation": name} for name in ("mod_relu", "mod_swish", "cardioid", "z_relu")),
    {"number": "2"},
    {"number": "2", "norm": "layer", "context": False, "phi": "silu", "confinement": 0.0, "flows": 3},
    {"number": "2", "potential": "duffing", "integrator": "position_verlet", "ode_steps": 2},
    {"number": "2", "phi": "softplus", "potential_width": 5, "trunk": "reversible"},
    {"number": "3"},
    {"number": "3", "koopman": "add", "loops": 2},
    {"number": "3", "koopman": "replace", "koopman_every": 2},
    {"number": "3", "koopman": "add", "koopman_angles": False, "attention_window": 9},
    {"number": "3", "koopman_selective": False, "dialectic": "mlp", "dialectic_candidates": 5},
    {"number": "3", "dialectic": "hamiltonian", "dialectic_candidates": 4, "trunk": "reversible"},
    {"number": "3", "mera": "add", "loops": 2},
    {"number": "3", "mera": "replace", "mera_every": 1, "mera_levels": 2},
    {"number": "3", "mera": "replace", "koopman": "none", "trunk": "reversible", "norm": "layer"},
    {"number": "3a"},
]


def named(options):
    return "-".join(str(value) for value in options.values())


def build(options, **width):
    """A model none of whose gains is 1 and none of whose biases is 0."""
    sizes = small_sizes(VOCAB, WINDOW, **({"kv_heads": 2} if options["number"] == "3a" else {}), **width)
    model = build_model(stage_config(**options), sizes, VOCAB, seed=3).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3).add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def forward(model, tokens):
    """Logits of each position by the model itself, in float32."""
    with torch.no_grad():
        return model.float()(torch.tensor([tokens]))[0]


def close(found, wanted):
    return (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.fixture(params=MODELS, ids=named)
def model(request):
    return build(request.param)


def tokens_of(length, seed=0):
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def test_logits_are_those_of_the_models_forward_pass(model):
    decoder, tokens = SlotDecoder(model, 5, WINDOW), tokens_of(WINDOW)
    wanted = forward(model, tokens)
    for slot, piece in ((0, 7), (4, 33)):
        for start in range(0, 40, piece):
            part = tokens[start : min(40, start + piece)]
            found = decoder.read(slot, start, part, every=True)
            assert close(found, wanted[start : start + len(part)])
        decoder.clear(slot, 40)
        assert close(decoder.read(slot, 0, tokens[:9]), wanted[8:9])
    for at in range(9, WINDOW):
        # The one in slot 4 stays; those between were never there.
        found = decoder.step([tokens[at]] + [0] * 4, [at, -1, -1, -1, -1])
        assert close(found[0], wanted[at])
    decoder.move(4, 1, 9)
    assert close(decoder.step([0, tokens[9]], [-1, 9])[1], wanted[9])
