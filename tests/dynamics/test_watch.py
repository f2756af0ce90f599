"""What is measured of flows while their model is evaluated."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from support.configs import small_width
from torch import Tensor, nn

from muse.config import StageConfig
from muse.dynamics import HamiltonianNeuralODE, flows_of, recorded_flows, watched_flows
from muse.dynamics.energy import curvature, drift, energy, trajectory
from muse.dynamics.watch import TOKENS
from muse.models import LanguageModel
from muse.models.hamiltonian import hamiltonian_decoder

WIDTH = small_width(kv_heads=2)
STAGE = StageConfig(number="2", precision="fp32", ode_steps=3, dt=0.5, integrator="leapfrog")
NAMES = [f"blocks_{block}_flow_{flow}" for block in (0, 1) for flow in (0, 1)]


def decoder(**options: object) -> LanguageModel:
    torch.manual_seed(0)
    return hamiltonian_decoder(dataclasses.replace(STAGE, **options), WIDTH, 13)


def some_tokens(count: int = 24) -> Tensor:
    return torch.randint(13, (2, count // 2), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def watched(model: nn.Module, tokens: Tensor) -> dict[str, float]:
    with watched_flows(model) as metrics:
        model(tokens)
        # Later calls do not count.
        model(tokens * 0)
    return metrics


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"potential": "duffing", "gradient": "checkpoint"},
        {"context": False, "gradient": "reversible"},
        {"precision": "bf16", "gradient": "backprop"},
    ],
    ids=str,
)
def test_metrics_are_of_the_first_call_and_of_each_flow(options):
    model, tokens = decoder(**options), some_tokens()
    inputs: dict[str, list[Tensor]] = {}

    def note(flow: HamiltonianNeuralODE, given: tuple[Tensor, ...]) -> None:
        inputs.setdefault(flow.name.replace(".", "_"), [x.flatten(0, 1) for x in given])

    for flow in flows_of(model):
        flow.register_forward_pre_hook(note)
    metrics = watched(model, tokens)
    assert list(inputs) == NAMES
    worst = []
    for name, flow in zip(NAMES, flows_of(model), strict=True):
        q, p = (x.float() for x in inputs[name])
        context = flow.potential.context(q, p)
        found = {key: metrics[f"flow/{name}/{key}"] for key in ("energy", "drift_max", "drift_mean")}
        assert found["energy"] == pytest.approx(energy(flow.potential, q, p, context).mean().item(), rel=1e-4)
        drifts = drift(trajectory(flow, q, p, 3).energy)
        assert found["drift_max"] == drifts.max() > 0
        assert found["drift_mean"] == pytest.approx(drifts.mean().item(), rel=1e-12)
        stiffness = curvature(flow.potential, q, context, 1000).max().item() * 0.5**2
        assert metrics[f"flow/{name}/curvature_dt2"] == pytest.approx(stiffness, rel=0.05)
        assert metrics[f"flow/{name}/fallen_back"] == 0
        worst.append(found["drift_max"])
    assert metrics["flow/drift_max"] == max(worst)
    assert metrics["flow/fallback_share"] == 0
    assert {key.split("/")[1] for key in metrics if key.count("/") == 2} == set(NAMES)


def test_fallen_back_flows_are_counted():
    model = decoder()
    flow = flows_of(model)[3]
    with pytest.warns(UserWarning, match="goes on with"):
        flow.fall_back("for a test")
    metrics = watched(model, some_tokens())
    assert [metrics[f"flow/{name}/fallen_back"] for name in NAMES] == [0, 0, 0, 1]
    assert metrics["flow/fallback_share"] == 0.25


def test_a_state_out_of_range_has_no_drift_and_does_no_harm():
    model = decoder(fraction_bits=28)
    model.blocks[1].flow_norm.gain.data.fill_(9.0)
    with pytest.warns(UserWarning, match="left the range"):
        metrics = watched(model, some_tokens())
    drifts = [metrics[f"flow/{name}/drift_max"] for name in NAMES]
    assert [math.isnan(value) for value in drifts] == [False, False, True, True]
    assert math.isnan(metrics["flow/drift_max"])
    assert metrics["flow/blocks_1_flow_0/curvature_dt2"] > 0


def test_only_some_tokens_are_followed(monkeypatch):
    followed = []

    def count(flow, q, *arguments, **options):
        followed.append(len(q))
        return trajectory(flow, q, *arguments, **options)

    monkeypatch.setattr("muse.dynamics.watch.trajectory", count)
    for tokens in (2, TOKENS, 10 * TOKENS + 6):
        followed.clear()
        watched(decoder(), some_tokens(tokens))
        assert len(followed) == 4
        assert all(0.8 * min(tokens, TOKENS) < count <= min(tokens, TOKENS) for count in followed)


def test_nothing_is_left_and_nothing_is_changed():
    model, tokens = decoder(), some_tokens()
    with torch.no_grad():
        expected = model(tokens)
    state = torch.get_rng_state()
    with torch.no_grad(), watched_flows(model):
        found = model(tokens)
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ZeroDivisionError), watched_flows(model):
        raise ZeroDivisionError
    assert all(flow.watch is None for flow in flows_of(model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_flows_has_no_metrics():
    assert watched(nn.Embedding(13, 2), some_tokens()) == {}


@torch.no_grad()
def test_the_last_token_of_each_call_is_recorded_and_nothing_is_changed():
    model, tokens = decoder(), some_tokens()[:1]
    inputs: dict[str, list[Tensor]] = {}

    def note(flow: HamiltonianNeuralODE, given: tuple[Tensor, ...]) -> None:
        inputs.setdefault(flow.name, []).append(torch.stack([x[0, -1].float() for x in given]))

    hooks = [flow.register_forward_pre_hook(note) for flow in flows_of(model)]
    expected = [model(tokens), model(tokens[:, :3])]
    for hook in hooks:
        hook.remove()
    with recorded_flows(model) as starts:
        found = [model(tokens), model(tokens[:, :3])]
    assert all(map(torch.equal, found, expected))
    assert list(starts) == list(inputs) == [flow.name for flow in flows_of(model)]
    for name, kept in starts.items():
        assert len(kept) == 2
        assert all(map(torch.equal, kept, inputs[name]))
    with pytest.raises(ZeroDivisionError), recorded_flows(model):
        raise ZeroDivisionError
    assert all(flow.watch is None for flow in flows_of(model))
