import pytest
import torch

from muse.benchmarks import stability
from muse.benchmarks.model import benchmark_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [0, 1])
def test_a_new_model_is_stable(bench_config, number):
    measured = stability.measure_stability(bench_config(number), CPU)
    assert (measured["nan_count"], measured["inf_count"]) == (0, 0)


def test_every_bad_logit_is_counted(bench_config, monkeypatch):
    def poisoned(config, device):
        model = benchmark_model(config, device)
        with torch.no_grad():
            model.norm.gain.fill_(float("nan"))
        return model

    monkeypatch.setattr(stability, "benchmark_model", poisoned)
    config = bench_config(seq_len=1, inputs=4)
    assert stability.measure_stability(config, CPU)["nan_count"] == 4 * config.model.vocab_size
