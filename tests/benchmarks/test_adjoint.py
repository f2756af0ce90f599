import dataclasses
import json
import sys

import pytest
import torch

from muse.benchmarks.adjoint import measure_adjoint
from muse.benchmarks.suite import settled
from muse.config import GRADIENTS
from muse.errors import RunError

CPU = torch.device("cpu")
THEIRS = [f"torchdiffeq {scheme}{label}" for label in ("", ", every state") for scheme in ("midpoint", "rk4")]


@pytest.fixture(scope="module")
def adjoint_config(bench_config):
    def build(integrator="yoshida4", **benchmark):
        options = {"ode_steps": 6, "dt": 0.5, **benchmark}
        config = settled(bench_config(2, name="adjoint", **options), "adjoint")
        return dataclasses.replace(config, stage=dataclasses.replace(config.stage, integrator=integrator))

    return build


@pytest.fixture
def torchdiffeq():
    return pytest.importorskip("torchdiffeq")


@pytest.mark.usefixtures("torchdiffeq")
def test_ours_are_the_gradients_of_the_steps_and_the_adjoint_is_not(adjoint_config):
    measured = measure_adjoint(adjoint_config(), CPU)
    json.dumps(measured, allow_nan=False)
    rows = measured["methods"]
    ours = [f"{integrator} {mode}" for integrator in ("leapfrog", "yoshida4") for mode in GRADIENTS]
    assert list(rows) == [*ours, *THEIRS]
    for name in ours:
        assert rows[name]["gradient_error"] <= 1e-5
    for name in THEIRS:
        assert rows[name]["gradient_error"] > 10 * max(rows[name]["gradient_error"] for name in ours)
    assert rows["torchdiffeq midpoint"]["gradient_error"] > 1e-3
    assert measured["exact_gradient_error"] == rows["leapfrog exact"]["gradient_error"]
    assert measured["adjoint_gradient_error_rk4"] == rows["torchdiffeq rk4"]["gradient_error"]
    assert measured["adjoint_time_ratio_midpoint"] == rows["torchdiffeq midpoint"]["time_ratio"] > 0
    assert rows["leapfrog exact"]["time_ratio"] == 1
    assert measured["fallback_count"] == 0
    assert (measured["tokens"], measured["channels"]) == (32, 16)


@pytest.fixture(scope="module")
def by_steps(adjoint_config):
    """Of the same time in few steps and in many."""
    pytest.importorskip("torchdiffeq")
    return {
        steps: measure_adjoint(adjoint_config("leapfrog", ode_steps=steps, dt=2 / steps), CPU)
        for steps in (3, 9)
    }


def test_forces_and_memory_are_those_of_the_schemes(by_steps):
    few, many = by_steps.values()
    assert list(few["methods"]) == [*(f"leapfrog {mode}" for mode in GRADIENTS), *THEIRS]
    for steps, measured in by_steps.items():
        forces = {name: row["force_evaluations"] for name, row in measured["methods"].items()}
        assert forces["leapfrog backprop"] == steps + 1
        for mode in ("exact", "reversible", "checkpoint"):
            assert forces[f"leapfrog {mode}"] == 2 * (steps + 1)
        for label in ("", ", every state"):
            assert forces[f"torchdiffeq midpoint{label}"] == 4 * steps
            assert forces[f"torchdiffeq rk4{label}"] == 8 * steps
    growth = {name: many["methods"][name]["peak_gb"] / row["peak_gb"] for name, row in few["methods"].items()}
    # What keeps nothing on the way needs as much for any number of steps.
    for name in ("leapfrog exact", "leapfrog reversible", "torchdiffeq midpoint", "torchdiffeq rk4"):
        assert growth[name] == pytest.approx(1, abs=0.1)
    assert growth["leapfrog backprop"] > 2
    assert growth["torchdiffeq midpoint, every state"] > 1.1
    assert many["exact_peak_gb"] == many["methods"]["leapfrog exact"]["peak_gb"] > 0
    assert many["adjoint_peak_gb"] == many["methods"]["torchdiffeq midpoint"]["peak_gb"]


def test_the_error_of_the_adjoint_falls_with_its_order(by_steps):
    coarse, fine = by_steps.values()
    # Of order 2 and 4; steps a third as long leave a ninth and an eighty-first.
    for scheme, factor in (("midpoint", 5), ("rk4", 30)):
        key = f"adjoint_gradient_error_{scheme}"
        assert coarse[key] > factor * fine[key]


def test_without_torchdiffeq_the_error_says_what_to_install(adjoint_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(RunError, match=r"pip install -e \.\[dev\]"):
        measure_adjoint(adjoint_config(), CPU)
