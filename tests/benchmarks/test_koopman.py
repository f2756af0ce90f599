import dataclasses
import math

import pytest
import torch

from muse.benchmarks import koopman
from muse.benchmarks.model import benchmark_model
from muse.benchmarks.suite import check_benchmark
from muse.benchmarks.workload import Workload, settle
from muse.errors import ConfigError
from muse.layers import KoopmanOperator
from muse.options import changed

CPU = torch.device("cpu")


@pytest.fixture
def config(bench_config):
    built = bench_config(3, name="koopman")
    return settle(
        dataclasses.replace(built, stage=dataclasses.replace(built.stage, koopman="replace")), Workload()
    )


def test_operators_are_linear_and_their_eigenvalues_are_told(config):
    measured = koopman.measure_koopman(config, CPU)
    assert measured["linearity_error"] < 1e-5
    assert list(measured["eigenvalues"]) == ["blocks.0.mixer"]
    moduli = sorted(math.hypot(*value) for value in measured["eigenvalues"]["blocks.0.mixer"])
    assert len(moduli) == 16
    assert moduli[-1] < 1
    # A half-life is the time in which a modulus becomes a half.
    for modulus, half_life in zip(moduli, measured["half_lives"], strict=True):
        assert modulus**half_life == pytest.approx(0.5, rel=1e-6)


def test_an_evolution_that_is_not_linear_is_noticed(config, monkeypatch):
    evolve = KoopmanOperator.evolve

    def forced(self, observables, steps, rate):
        return evolve(self, observables, steps, rate) + 1e-2

    monkeypatch.setattr(KoopmanOperator, "evolve", forced)
    assert koopman.measure_koopman(config, CPU)["linearity_error"] > koopman.LINEARITY_TARGET


def test_the_time_is_that_of_four_steps_over_one(config, monkeypatch):
    def times(functions, warmup, repeats, device):
        calls = []
        monkeypatch.setattr(KoopmanOperator, "evolve", lambda self, g, n, rate: calls.append(n) or g)
        counted = []
        for function in functions:
            calls.clear()
            function()
            counted.append([float(len(calls))])
        return counted

    model = benchmark_model(config, CPU)
    assert any(isinstance(module, KoopmanOperator) for module in model.modules())
    monkeypatch.setattr(koopman, "times_in_turns", times)
    assert koopman.measure_koopman(config, CPU)["speedup"] == koopman.STEPS


def test_without_operators_it_is_refused(bench_config):
    with pytest.raises(ConfigError, match=r"needs stage\.koopman=replace or stage\.koopman=add"):
        check_benchmark(bench_config(3, name="koopman"), ())
    with pytest.raises(ConfigError, match="about what stage 3 adds; it needs stage=3"):
        check_benchmark(bench_config(2, name="koopman"), ())


@pytest.mark.parametrize("stage", [{}, {"koopman": "add", "koopman_every": 1, "loops": 2}])
def test_states_of_operators_are_as_large_after_any_number_of_tokens(config, stage):
    config = changed(config, stage=stage)
    measured = koopman.measure_koopman(config, CPU)
    operators = sum(isinstance(m, KoopmanOperator) for m in benchmark_model(config, CPU).modules())
    # A window's observables and three u before them, float32, of 16 channels with two planes each.
    state = 2 * (1 + 3) * 2 * 16 * 4
    assert measured["state_bytes"] == operators * config.stage.loops * state
    assert measured["state_growth"] == 0


def test_a_state_that_keeps_more_of_a_longer_text_is_noticed(config, monkeypatch):
    convolved = KoopmanOperator._convolved

    def keeping(self, u, cache):
        out = convolved(self, u, cache)
        if cache is not None:
            # A view keeps what it is of.
            cache.recent = torch.cat((u.new_zeros(u.shape[0], 3, *u.shape[2:]), u), 1)[:, -3:]
        return out

    monkeypatch.setattr(KoopmanOperator, "_convolved", keeping)
    assert koopman.measure_koopman(config, CPU)["state_growth"] > 0
