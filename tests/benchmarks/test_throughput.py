import pytest
import torch

from muse.benchmarks.throughput import measure_throughput


def test_the_figures_of_a_training_step_fit_together(bench_config):
    measured = measure_throughput(bench_config(), torch.device("cpu"))
    assert measured["products_ratio"] > 0
    assert measured["step_ms_p20"] <= measured["step_ms_p50"] <= measured["step_ms_p80"]
    assert measured["tokens_per_second"] == pytest.approx(2 * 16 / (measured["step_ms_p50"] / 1e3))
