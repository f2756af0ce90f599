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
