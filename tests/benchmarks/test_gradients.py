import pytest
import torch

from muse.benchmarks import gradients
from muse.benchmarks.model import benchmark_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [0, 1])
def test_a_new_model_has_sane_gradients(bench_config, number):
    measured = gradients.measure_gradients(bench_config(number), CPU)
    assert 1e-6 <= measured["grad_norm_min"] <= measured["grad_norm_max"] <= 1e3


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
