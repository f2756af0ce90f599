import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from muse.benchmarks import energy
from muse.benchmarks.energy import measure_energy, measure_trained_energy
from muse.benchmarks.model import benchmark_model
from muse.benchmarks.suite import settled
from muse.config import DataConfig, TokenizerConfig
from muse.errors import ConfigError, RunError

CPU = torch.device("cpu")
LISTS = ("times", "energy_trajectory", "drift_trajectory", "leapfrog_drift_trajectory")


@pytest.fixture(scope="module")
def energy_config(bench_config):
    def build(stage=None, **benchmark):
        config = bench_config(2, **{"name": "energy", "ode_steps": 40, "dt": 0.1, **benchmark})
        return settled(
            dataclasses.replace(config, stage=dataclasses.replace(config.stage, **stage or {})), "energy"
        )

    return build


@pytest.fixture
def text_config(energy_config, tmp_path):
    """A benchmark on a text of three words."""

    def build(**benchmark):
        text = tmp_path / "text"
        text.mkdir(exist_ok=True)
        for number in range(20):
            (text / f"{number}.txt").write_text(f"the cat sat {number} " * 200)
        return dataclasses.replace(
            energy_config(**benchmark),
            data=DataConfig(name="text", path=str(text), cache=str(tmp_path / "cache")),
            tokenizer=TokenizerConfig(name="word"),
        )

    return build


@pytest.fixture(scope="module")
def measured(energy_config):
    """Of the benchmark as it is."""
    return measure_energy(energy_config(), CPU)


def drift_of(energies):
    return [abs(now - energies[0]) / energies[0] for now in energies]


def test_the_energy_is_kept_and_leapfrog_keeps_it_less_well(measured):
    json.dumps(measured, allow_nan=False)
    assert {name for name, value in measured.items() if isinstance(value, list)} == set(LISTS)
    assert all(len(measured[name]) == 41 for name in LISTS)
    assert measured["times"][-1] == pytest.approx(4.0)
    assert (measured["layers"], measured["tokens"]) == (4, 32)
    assert measured["trained"] == "untrained"
    assert 0 < measured["mean_drift"] < measured["max_drift"] < 5e-6
    assert max(measured["drift_trajectory"]) == measured["max_drift"]
    assert measured["energy_trajectory"][0] == measured["mean_energy"] > 0
    assert max(drift_of(measured["energy_trajectory"])) <= measured["max_drift"]
    assert measured["leapfrog_max_drift"] > 20 * measured["max_drift"]
    assert max(measured["leapfrog_drift_trajectory"]) == measured["leapfrog_max_drift"]
    assert measured["leapfrog_mean_drift"] < measured["leapfrog_max_drift"]
    # Its own, modified energy explains it.
    assert measured["leapfrog_modified_drift"] < measured["leapfrog_max_drift"] / 20
    assert measured["curvature_dt2"] == pytest.approx(0.01 * measured["curvature_max"])
    assert 0.1 < measured["curvature_max"] < 10
    # Rounding moves the energy up and down, for a token or two of 32 by chance one way; a loss would for all.
    assert measured["monotone_share"] <= 4 / 32


@pytest.mark.parametrize(("own", "other"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_half_precision_forces_keep_the_energy_less_well(energy_config, own, other):
    measured = measure_energy(energy_config({"force_precision": own}), CPU)
    drifts = {own: measured["max_drift"], measured["other_precision"]: measured["other_precision_max_drift"]}
    assert measured["other_precision"] == other
    assert drifts["bf16"] > 10 * drifts["fp32"]


def test_a_potential_without_products_has_one_precision(energy_config):
    measured = measure_energy(energy_config({"potential": "duffing"}), CPU)
    assert measured["other_precision"] is measured["other_precision_max_drift"] is None
    assert measured["max_drift"] < 5e-6


def test_the_own_step_covers_the_same_time(energy_config):
    equal = measure_energy(energy_config({"dt": 0.1}, ode_steps=4), CPU)
    assert equal["own_dt_max_drift"] == equal["max_drift"]
    coarse = measure_energy(energy_config({"dt": 0.8}), CPU)
    assert coarse["own_dt_max_drift"] > 2 * coarse["max_drift"]
    assert len(coarse["times"]) == 41


def test_the_figures_beside_the_criterion_are_of_some_tokens(energy_config, measured, monkeypatch):
    monkeypatch.setattr(energy, "SAMPLE", 5)
    whole, part = measured, measure_energy(energy_config(), CPU)
    assert (whole["sample_tokens"], part["sample_tokens"]) == (32, 5)
    assert part["leapfrog_max_drift"] <= whole["leapfrog_max_drift"]
    assert part["max_drift"] == whole["max_drift"]


def test_another_integrator_follows_the_same_states(energy_config, measured):
    own, other = measured, measure_energy(energy_config(integrator="leapfrog"), CPU)
    assert (own["integrator"], other["integrator"]) == ("blanes_moan_rkn4", "leapfrog")
    assert own["curvature_max"] == other["curvature_max"]
    assert other["max_drift"] == other["leapfrog_max_drift"] > 20 * own["max_drift"]


def test_a_model_stored_in_half_precision_is_measured_as_it_is(energy_config):
    measured = measure_energy(energy_config({"precision": "bf16"}), CPU)
    assert measured["max_drift"] < 5e-6


def test_a_checkpoint_is_measured_on_the_text(text_config, tmp_path):
    trained = measure_trained_energy(text_config(train_steps=2), CPU)
    assert trained["trained"] == "2 steps in this run"
    assert trained["max_drift"] < 5e-6
    config = text_config()
    size = energy.load_tokens(config.data, config.tokenizer, config.model.vocab_size).vocab_size
    assert size != config.model.vocab_size
    vocabulary = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
    model = benchmark_model(vocabulary, CPU)
    for flow in (ode for block in model.blocks for ode in block.flow.odes):
        flow.potential.w2.data *= 4
    file = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), file)
    measured = measure_energy(text_config(checkpoint=str(file)), CPU)
    assert measured["trained"] == f"checkpoint {file}"
    assert math.isfinite(measured["max_drift"])
    assert measured["curvature_max"] > 2 * trained["curvature_max"]


def test_a_state_that_is_lost_names_the_layer_and_the_step(energy_config):
    # Far outside the region in which steps of this size are stable.
    with pytest.raises(RunError, match=r"blocks\.0\.flow\.0: the state .* by step \d+"):
        measure_energy(energy_config(dt=1e3), CPU)


def test_a_state_that_is_lost_beside_the_criterion_hides_nothing(energy_config, monkeypatch):
    follow = energy.trajectory

    def lost(flow, q, p, steps, dt, *args, **options):
        if dt == flow.dt:
            raise RunError("lost")
        return follow(flow, q, p, steps, dt, *args, **options)

    monkeypatch.setattr(energy, "trajectory", lost)
    measured = measure_energy(energy_config({"dt": 0.8}), CPU)
    assert measured["own_dt_max_drift"] is None
    assert measured["max_drift"] < 5e-6


@pytest.mark.parametrize("layer", [0, 3])
def test_an_energy_that_is_no_number_is_seen_in_any_layer(energy_config, monkeypatch, layer):
    follow, followed = energy.trajectory, []

    def broken(flow, *args, **options):
        path = follow(flow, *args, **options)
        if flow.name not in followed:
            followed.append(flow.name)
        if followed.index(flow.name) == layer:
            path.energy[-1, 3] = math.nan
        return path

    monkeypatch.setattr(energy, "trajectory", broken)
    measured = measure_energy(energy_config(ode_steps=4), CPU)
    for key in ("max_drift", "mean_drift", "monotone_share", "leapfrog_max_drift", "leapfrog_mean_drift"):
        assert math.isnan(measured[key]), key
    assert measured["worst_layer"] == followed[layer]


def test_only_a_flow_has_an_energy(bench_config):
    config = settled(bench_config(1, name="energy", ode_steps=2, dt=0.1), "energy")
    with pytest.raises(ConfigError, match="stage=2"):
        measure_energy(config, CPU)
