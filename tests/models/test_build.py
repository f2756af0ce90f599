from __future__ import annotations

import math

import pytest
import torch
from support.models import CONF, model_config, stage_config

from muse.models import build_model, count_parameters


def build_on_meta(stage, model, vocab_size):
    with torch.device("meta"):
        return build_model(stage, model, vocab_size)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "model").glob("*.yaml")))
def test_stages_have_equal_parameter_counts(name):
    model = model_config(name)
    counts = [count_parameters(build_on_meta(stage_config(n), model, model.vocab_size)) for n in (0, 1, 2, 3)]
    assert abs(counts[1] / counts[0] - 1) < 0.03, counts
    assert abs(counts[2] / counts[1] - 1) < 0.001, counts
    grouped = model.complex.kv_heads < model.complex.heads
    # A Koopman operator has no fewer for groups of queries.
    assert -0.001 < counts[3] / counts[2] - 1 < (0.1 if grouped else 0.003), counts


def test_parameters_of_the_seeds_block():
    model = model_config("seed")
    built = build_on_meta(stage_config(1, mixer="none"), model, 50257)
    assert count_parameters(built) == 80_937_553


@pytest.mark.parametrize("number", [0, 1])
def test_swiglu_and_score_kinds_cost_nothing(number):
    model = model_config("tiny")
    option, values = ("activation", ["gelu", "swiglu"]) if number == 0 else ("score", ["real", "phase"])
    counts = [
        count_parameters(build_on_meta(stage_config(number, **{option: v}), model, 4096)) for v in values
    ]
    assert abs(counts[1] / counts[0] - 1) < 0.01


@pytest.mark.parametrize(
    "options",
    [
        {"number": 0},
        {"number": 0, "tied": False},
        {"number": 1},
        {"number": 1, "tied": False},
        {"number": 1, "score": "phase", "norm": "layer", "activation": "mod_relu"},
        {"number": 1, "init": "he", "embedding_init": "normal"},
        {"number": 1, "mixer": "none"},
        {"number": 2},
        {"number": 2, "potential": "duffing"},
        {"number": 3},
    ],
    ids=str,
)
def test_initial_loss_is_that_of_a_uniform_guess(options):
    model = model_config("tiny")
    built = build_model(stage_config(**options), model, model.vocab_size)
    tokens = torch.randint(model.vocab_size, (2, 129))
    with torch.no_grad():
        loss = built.loss(tokens[:, :-1], tokens[:, 1:]).item()
    assert abs(loss / math.log(model.vocab_size) - 1) < 0.02


@pytest.mark.parametrize(
    "options",
    [{"number": 0}, {"number": 1}, {"number": 1, "mixer": "none"}, {"number": 2}, {"number": 3}],
    ids=str,
)
def test_seed_alone_decides_the_weights(options):
    model = model_config("tiny")
    stage = stage_config(**options)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = build_model(stage, model, 50, seed=7).state_dict()
    assert torch.equal(torch.rand(3), expected), "building a model moved the global random state"
    second = build_model(stage, model, 50, seed=7).state_dict()
    other = build_model(stage, model, 50, seed=8).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])
    assert all(value.isfinite().all() for value in first.values())


@pytest.mark.parametrize(
    ("number", "precision"),
    [(0, "fp32"), (0, "bf16"), (1, "bf16-mixed"), (1, "bf16"), (2, "fp16-mixed"), (2, "bf16"), (3, "bf16")],
)
def test_storage_follows_the_precision(number, precision):
    built = build_on_meta(stage_config(number, precision=precision), model_config("tiny"), 50)
    expected = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {p.dtype for p in built.parameters()} == {expected}


def test_the_flow_has_the_options_of_the_stage():
    built = build_on_meta(
        stage_config(
            2, ode_steps=7, dt=0.25, integrator="yoshida4", gradient="reversible", potential_width=31
        ),
        model_config("tiny"),
        50,
    )
    for i, block in enumerate(built.blocks):
        assert len(block.flow.odes) == 2
        for j, ode in enumerate(block.flow.odes):
            assert (ode.steps, ode.dt, ode.integrator, ode.gradient) == (7, 0.25, "yoshida4", "reversible")
            assert ode.potential.w1.shape == (31, 96)
            assert ode.potential.context_weight.shape == (31, 192)
            assert ode.name == f"blocks.{i}.flow.{j}"


@pytest.mark.parametrize(
    "options", [{"flows": 1}, {"context": False}, {"flows": 3, "context": False}], ids=str
)
def test_flows_have_as_many_parameters_as_a_feed_forward_block(options):
    model = model_config("tiny")
    counts = [
        count_parameters(build_on_meta(stage, model, 50))
        for stage in (stage_config(1), stage_config(2, **options))
    ]
    assert abs(counts[1] / counts[0] - 1) < 0.001, counts


def test_a_block_adds_what_its_flows_change():
    model = build_model(stage_config(2, precision="fp32"), model_config("tiny"), 50)
    flow = model.blocks[0].flow
    z = torch.randn(3, 7, 2, 96)
    first, second = flow.odes
    q, p = first(*z.unbind(-2))
    q, p = second(-p, q)
    assert torch.equal(flow(z), torch.stack((p, -q), -2) - z)
