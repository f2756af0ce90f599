import pytest
import torch

from muse.benchmarks import stability
from muse.benchmarks.model import benchmark_model

CPU = torch.device("cpu")


def poison(monkeypatch, change):
    def poisoned(config, device):
        model = benchmark_model(config, device)
        with torch.no_grad():
            change(model)
        return model

    monkeypatch.setattr(stability, "benchmark_model", poisoned)


@pytest.mark.parametrize("number", [0, 1])
def test_a_new_model_is_stable_and_has_sane_gradients(bench_config, number):
    found = stability.measure_stability(bench_config(number), CPU)
    assert (found["nan_count"], found["inf_count"]) == (0, 0)
    gradients = stability.measure_gradients(bench_config(number), CPU)
    assert 1e-6 <= gradients["grad_norm_min"] <= gradients["grad_norm_max"] <= 1e3


def test_every_bad_logit_is_counted(bench_config, monkeypatch):
    poison(monkeypatch, lambda model: model.norm.gain.fill_(float("nan")))
    config = bench_config(seq_len=1, inputs=4)
    assert stability.measure_stability(config, CPU)["nan_count"] == 4 * config.model.vocab_size


def test_a_parameter_without_gradient_is_the_smallest(bench_config, monkeypatch):
    poison(monkeypatch, lambda model: model.blocks[1].ffn.down.weight.zero_())
    gradients = stability.measure_gradients(bench_config(), CPU)
    assert gradients["grad_norm_min"] == 0
    assert gradients["grad_norm_min_parameter"].startswith("blocks.1.ffn")
