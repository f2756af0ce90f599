import dataclasses
from itertools import product

import pytest

from muse.benchmarks.suite import check_benchmark, settled
from muse.errors import ConfigError


def changed(config, **stage):
    return dataclasses.replace(config, stage=dataclasses.replace(config.stage, **stage))


@pytest.mark.parametrize(
    ("benchmark", "option"),
    [
        *product(("vram", "throughput", "all"), ("ode_steps", "dt", "integrator")),
        *product(("perplexity", "adjoint"), ("ode_steps", "dt")),
    ],
)
def test_an_option_of_the_flow_that_would_change_nothing_is_refused(bench_config, benchmark, option):
    """Also where its value is the default: a sweep over it would be a flat line."""
    config = bench_config(2, name=benchmark)
    with pytest.raises(ConfigError, match=rf"stage\.{option} changes nothing .* benchmark\.{option}; give"):
        check_benchmark(config, {f"stage.{option}"})
    value = {"ode_steps": 3, "dt": 0.5, "integrator": "yoshida4"}[option]
    check_benchmark(
        bench_config(2, name=benchmark, **{option: value}), {f"stage.{option}", f"benchmark.{option}"}
    )


@pytest.mark.parametrize("benchmark", ["energy", "stability", "gradients"])
def test_what_is_allowed_reaches_the_model(bench_config, benchmark):
    check_benchmark(bench_config(2, name=benchmark), {"stage.ode_steps", "stage.dt", "stage.integrator"})
    config = changed(bench_config(2, name=benchmark), ode_steps=3, dt=0.5, integrator="yoshida4")
    assert settled(config, benchmark).stage == config.stage


@pytest.mark.parametrize("benchmark", ["perplexity", "adjoint"])
def test_the_integrator_of_the_stage_is_taken_where_the_benchmark_has_none(bench_config, benchmark):
    check_benchmark(bench_config(2, name=benchmark), {"stage.integrator"})
    config = changed(bench_config(2, name=benchmark), integrator="yoshida4")
    assert settled(config, benchmark).stage.integrator == "yoshida4"


def test_energy_follows_another_integrator_without_changing_the_model(bench_config):
    config = settled(bench_config(2, name="energy", integrator="yoshida4"), "energy")
    assert config.stage.integrator == "leapfrog"
    assert config.benchmark.integrator == "yoshida4"


def test_a_checkpoint_has_the_flow_it_was_trained_with(bench_config):
    config = changed(bench_config(2, name="perplexity", checkpoint="run"), ode_steps=3, dt=0.5)
    check_benchmark(config, {"stage.ode_steps", "stage.dt"})
    assert settled(config, "perplexity").stage == config.stage
    with pytest.raises(ConfigError, match=r"benchmark\.dt changes nothing in the perplexity of a checkpoint"):
        check_benchmark(bench_config(2, name="perplexity", checkpoint="run", dt=0.5), set())
    # Of benchmark=all it is the memory's.
    check_benchmark(bench_config(2, name="all", checkpoint="run", dt=0.5), set())
