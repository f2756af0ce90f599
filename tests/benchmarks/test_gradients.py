import pytest
import torch

from muse.benchmarks import gradients
from muse.benchmarks.model import benchmark_model
from muse.options import changed

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [0, 1])
def test_a_new_model_has_sane_gradients(bench_config, number):
    measured = gradients.measure_gradients(bench_config(number), CPU)
    assert 1e-6 <= measured["grad_norm_min"] <= measured["grad_norm_max"] <= 1e3
    assert measured["left_out"] == []


@pytest.mark.parametrize("kind", ["mlp", "hamiltonian"])
def test_what_a_new_antithesis_lets_no_gradient_through_to_is_left_out_until_it_has_learned(
    bench_config, monkeypatch, kind
):
    config = changed(bench_config(3), stage={"dialectic": kind, "dialectic_rounds": 2})
    measured = gradients.measure_gradients(config, CPU)
    assert 1e-6 <= measured["grad_norm_min"] <= measured["grad_norm_max"] <= 1e3
    names = ("state_weight", "token_weight", "mean_weight", "bias")
    assert measured["left_out"] == [f"antithesis.{name}" for name in names]

    def learned(config, device):
        model = benchmark_model(config, device)
        torch.nn.init.ones_(model.antithesis.readout)
        return model

    monkeypatch.setattr(gradients, "benchmark_model", learned)
    measured = gradients.measure_gradients(config, CPU)
    assert measured["left_out"] == []
    assert measured["grad_norm_min"] > 0


def test_a_parameter_without_gradient_is_the_smallest(bench_config, monkeypatch):
    def poisoned(config, device):
        model = benchmark_model(config, device)
        with torch.no_grad():
            model.blocks[1].ffn.down.weight.zero_()
        return model

    monkeypatch.setattr(gradients, "benchmark_model", poisoned)
    measured = gradients.measure_gradients(bench_config(), CPU)
    assert measured["grad_norm_min"] == 0
    assert measured["grad_norm_min_parameter"].startswith("blocks.1.ffn")
