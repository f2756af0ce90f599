import dataclasses

import pytest
import torch
from support.commands import default_stage, measured_here
from support.configs import small_width

from muse.benchmarks import vram
from muse.benchmarks.baseline import baseline_of
from muse.benchmarks.model import benchmark_model
from muse.benchmarks.results import Results
from muse.benchmarks.suite import settled
from muse.benchmarks.vram import measure_memory
from muse.launch.bench import composed_stage
from muse.measure.peak_memory import GB
from muse.options import changed

CPU = torch.device("cpu")


@pytest.mark.parametrize(("number", "precision", "size"), [(0, "fp32", 4), (1, "fp32", 4), (1, "bf16", 2)])
def test_memory_is_parameters_twice_their_moments_and_more(bench_config, number, precision, size):
    measured = measure_memory(bench_config(number, precision), CPU)
    parameters = measured["parameter_count"] * size / GB
    assert measured["parameters"] == pytest.approx(parameters, rel=1e-9)
    assert measured["gradients"] == pytest.approx(parameters, rel=1e-9)
    assert measured["optimiser"] == pytest.approx(2 * parameters, rel=1e-9)
    parts = ("parameters", "optimiser", "activations", "gradients and temporaries")
    assert measured["peak"] == pytest.approx(sum(measured[part] for part in parts), rel=1e-9)
    assert all(measured[part] > 0 for part in parts)


def test_activations_grow_in_proportion_to_the_batch(bench_config):
    small, large = (measure_memory(bench_config(batch_size=batch), CPU)["activations"] for batch in (2, 8))
    assert large == pytest.approx(4 * small, rel=0.05)


def test_half_precision_halves_parameters_and_activations(bench_config):
    full, half = (measure_memory(bench_config(1, precision), CPU) for precision in ("fp32", "bf16"))
    assert half["parameters"] == full["parameters"] / 2
    assert half["activations"] < 0.65 * full["activations"]


def test_the_step_never_holds_the_logits(bench_config):
    config = bench_config(batch_size=8, seq_len=32)
    config.model.vocab_size = 50_000
    logits = 8 * 32 * 50_000 * 4 / GB
    measured = measure_memory(config, CPU)
    assert measured["activations"] < logits / 20


def test_the_peak_does_not_grow_with_the_steps_of_an_exact_flow(bench_config):
    def peak(gradient, steps):
        config = bench_config(2, seq_len=64, ode_steps=steps)
        config = dataclasses.replace(config, stage=dataclasses.replace(config.stage, gradient=gradient))
        return measure_memory(settled(config, "vram"), CPU)["peak"]

    few, many = peak("exact", 2), peak("exact", 10)
    assert many == pytest.approx(few, rel=0.05)
    assert many < peak("backprop", 10) / 2


def test_the_baseline_differs_in_the_stage_only(bench_config):
    config = bench_config(1, "bf16")
    baseline = baseline_of(config, composed_stage("0"))
    assert (baseline.stage.number, baseline.stage.precision) == ("0", "fp32")
    assert (baseline.model, baseline.optim, baseline.seed) == (config.model, config.optim, config.seed)
    assert baseline_of(config, composed_stage("0"), "bf16").stage.precision == "bf16"


def test_the_benchmark_model_is_the_configured_one(bench_config):
    assert {p.dtype for p in benchmark_model(bench_config(1, "bf16"), CPU).parameters()} == {torch.bfloat16}


def test_a_reversible_trunk_takes_less_of_stage_3_and_its_tokens_may_be_one_window(bench_config, tmp_path):
    """As it is judged; at this size parameters and the loss hold most."""
    config = changed(
        bench_config(3, name="vram", seq_len=64),
        stage={"koopman": "replace"},
        model={"complex": small_width(d_model=16, kv_heads=2, d_ff=32, layers=4)},
    )
    results = Results(tmp_path, measured_here, default_stage)
    vram.judge(settled(config, "vram"), results)
    values = results.values
    assert results.failures == results.unjudged == {}
    assert list(results.details["vram"]) == [
        *("exact", "reversible", "checkpoint", "backprop", "exact, verified"),
        *("1 x 128", "exact, reversible trunk"),
    ]
    assert values["vram_gb"] == results.details["vram"]["1 x 128"]["peak"] < 1
    assert values["vram_reversible_trunk_reduction"] > values["vram_reduction_ratio"] > 0.5
    assert values["reconstruction_error"] == 0
    assert values["reconstruction_pass"] is values["vram_gb_pass"] is True
