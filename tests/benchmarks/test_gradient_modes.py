import dataclasses
import json
import math

import pytest
import torch

from kernels import symplectic
from muse.benchmarks import gradient_modes
from muse.benchmarks.adjoint import measure_adjoint
from muse.benchmarks.energy import measure_energy
from muse.benchmarks.gradient_modes import gradient_errors, measure_modes
from muse.benchmarks.suite import settled
from muse.benchmarks.vram import measure_memory
from muse.config import GRADIENTS
from muse.dynamics import MLPPotential, hamiltonian_ode
from muse.measure.gradient_error import full_precision, joined, relative_error

CPU = torch.device("cpu")


@pytest.fixture
def modes_config(bench_config):
    def build(**stage):
        config = bench_config(2, name="throughput", ode_steps=4)
        config = dataclasses.replace(config, stage=dataclasses.replace(config.stage, **stage))
        return settled(config, "throughput")

    return build


def test_every_mode_is_right_and_timed(modes_config):
    measured = measure_modes(modes_config(dropout=0.1), CPU)
    json.dumps(measured, allow_nan=False)
    assert None not in measured.values()
    assert measured["gradients_correct"] is True
    assert [measured[f"fallbacks_{mode}"] for mode in ("exact", "reversible", "checkpoint")] == [0, 0, 0]
    for mode in GRADIENTS:
        assert 0 < measured[f"gradient_error_{mode}"] <= 1e-5
        assert measured[f"step_ms_p50_{mode}"] > 0
    for mode in ("exact", "reversible", "checkpoint"):
        # One round: its ratio is that of its times.
        ratio = measured[f"step_ms_p50_{mode}"] / measured["step_ms_p50_backprop"]
        assert measured[f"ratio_{mode}_to_backprop"] == pytest.approx(ratio)
    assert measured["step_ms_p20_exact"] <= measured["step_ms_p50_exact"] <= measured["step_ms_p80_exact"]
    assert measured["tokens_per_second"] == pytest.approx(32e3 / measured["step_ms_p50_exact"])


def test_a_wrong_gradient_has_no_speed(modes_config, monkeypatch):
    class TwiceTooLarge(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    build = gradient_modes.build_model

    def wrong(stage, *args):
        model = build(stage, *args)
        if stage.gradient == "exact":
            model.blocks[0].register_forward_hook(lambda *call: TwiceTooLarge.apply(call[-1]))
        return model

    monkeypatch.setattr(gradient_modes, "build_model", wrong)
    measured = measure_modes(modes_config(), CPU)
    assert measured["gradients_correct"] is False
    assert measured["gradient_error_exact"] > 0.1
    assert measured["gradient_error_reversible"] <= 1e-5
    speeds = [v for k, v in measured.items() if k.startswith(("step_ms", "ratio", "tokens", "fallbacks"))]
    assert speeds
    assert set(speeds) == {None}


@pytest.mark.filterwarnings("ignore:blocks:UserWarning")
def test_half_precision_forces_are_held_against_backprop_in_half_precision(modes_config):
    # The reversible mode falls back: a wrong last bit of q may round to another half-precision number.
    measured = measure_modes(modes_config(force_precision="bf16"), CPU)
    assert measured["gradient_error_allowed"] == 2 * measured["gradient_error_backprop"] > 1e-5
    assert measured["gradients_correct"] is True
    assert measured["step_ms_p50_exact"] > 0


def test_one_model_takes_the_steps_of_all_modes_each_by_its_own_way(modes_config, monkeypatch):
    """Four models with their optimisers do not fit where one does."""
    built, taken = [], []
    build, step = gradient_modes.benchmark_model, gradient_modes.random_training_step

    def noting(config, device):
        built.append(build(config, device))
        return built[-1]

    def steps(config, model, device):
        optimizer, take = step(config, model, device)
        flow = model.blocks[0].flow.odes[0]

        def taking():
            taken.append((flow.gradient, flow.scale, flow.fallen_back))
            return take()

        return optimizer, taking

    monkeypatch.setattr(gradient_modes, "benchmark_model", noting)
    monkeypatch.setattr(gradient_modes, "random_training_step", steps)
    config = modes_config()
    gradient_modes._step_seconds(
        dataclasses.replace(config, benchmark=dataclasses.replace(config.benchmark, warmup=1)), CPU
    )
    assert len(built) == 1
    scales = [build_of(config, mode).scale for mode in GRADIENTS]
    assert taken == 2 * [(mode, scale, False) for mode, scale in zip(GRADIENTS, scales, strict=True)]


def build_of(config, mode):
    stage = dataclasses.replace(config.stage, gradient=mode)
    return gradient_modes.build_model(stage, config.model, 97).blocks[0].flow.odes[0]


@pytest.mark.filterwarnings("ignore:blocks:UserWarning")
def test_a_mode_that_falls_back_has_no_time(modes_config, monkeypatch):
    # Every state leaves this range.
    for module in (symplectic, hamiltonian_ode):
        monkeypatch.setattr(module, "LIMIT", 1.0)
    measured = measure_modes(modes_config(), CPU)
    assert measured["fallbacks_exact"] == 4
    assert measured["ratio_exact_to_backprop"] is measured["tokens_per_second"] is None
    assert measured["step_ms_p50_exact"] is measured["step_ms_p20_exact"] is None
    assert measured["fallbacks_reversible"] == measured["fallbacks_checkpoint"] == 0
    assert measured["ratio_checkpoint_to_backprop"] > 0


def test_gradients_are_compared_in_float32_whatever_the_model_is_stored_in(modes_config):
    single, half = (gradient_errors(modes_config(precision=precision), CPU) for precision in ("fp32", "bf16"))
    assert single == half


def test_the_error_of_a_gradient():
    exact = joined([torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])])
    assert exact.dtype == torch.float64
    assert relative_error(exact, exact) == 0
    assert relative_error(joined([torch.tensor([3.0, 0.0, 5.0])]), exact) == pytest.approx(0.2)
    assert relative_error(exact * math.nan, exact) == relative_error(exact * math.inf, exact) == math.inf


@pytest.fixture
def coarse():
    """As on a GPU, where float32 products are TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("measure", [measure_modes, measure_memory, measure_energy, measure_adjoint])
def test_modes_are_compared_and_energies_measured_in_full_precision(modes_config, monkeypatch, measure):
    """The fused flow takes no TF32 products, so the others must not either."""
    if measure is measure_adjoint:
        pytest.importorskip("torchdiffeq")
    seen = set()
    field = MLPPotential.field

    def watched(self, *coefficients):
        seen.add(torch.get_float32_matmul_precision())
        return field(self, *coefficients)

    monkeypatch.setattr(MLPPotential, "field", watched)
    measured = measure(modes_config(gradient="checkpoint"), CPU)
    assert measured["matmul_precision"] == "highest"
    assert seen == {"highest"}
    assert torch.get_float32_matmul_precision() == "high"


def test_full_precision_ends_with_the_block():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
