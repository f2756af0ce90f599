from __future__ import annotations

import dataclasses

import pytest
import torch

from muse.benchmarks import mera
from muse.benchmarks.suite import check_benchmark
from muse.benchmarks.workload import settle
from muse.errors import ConfigError
from muse.layers import MeraRouter

CPU = torch.device("cpu")


@pytest.fixture
def config(bench_config):
    built = bench_config(3, name="mera", seq_len=64, repeats=2)
    built = dataclasses.replace(built, stage=dataclasses.replace(built.stage, mera="replace"))
    return settle(built, mera.workload(built))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
def test_it_measures_a_causal_router_and_an_attention(config, precision):
    config = dataclasses.replace(config, stage=dataclasses.replace(config.stage, precision=precision))
    measured = mera.measure_mera(config, CPU)
    assert measured["causal"] is True
    assert measured["time_ms"] > 0
    assert measured["time_ratio"] > 0
    for name in ("times", "attention_times"):
        assert [tokens for tokens, _ in measured[name]] == [8, 16, 32, 64]
        assert all(time > 0 for _, time in measured[name])
    assert measured["times"][-1][1] == measured["time_ms"]
    assert measured["attention_times"][-1][1] == measured["attention_time_ms"]
    assert mera.plot({"stage 3": measured}) is not None


def test_a_router_that_sees_later_tokens_has_no_time(config, monkeypatch):
    forward = MeraRouter.forward
    monkeypatch.setattr(
        MeraRouter, "forward", lambda self, z, cache=None: forward(self, z, cache) + z.flip(1) * 1e-3
    )
    measured = mera.measure_mera(config, CPU)
    assert measured == {"causal": False, "time_ms": None, "time_ratio": None}
    assert mera.plot({"stage 3": measured}) is None


def test_the_time_is_that_of_a_window_over_that_of_half(config, monkeypatch):
    def times(functions, warmup, repeats, device):
        return [[function.args[0].shape[1] * (1 + round_) for round_ in range(3)] for function in functions]

    monkeypatch.setattr(mera, "times_in_turns", times)
    measured = mera.measure_mera(config, CPU)
    assert measured["time_ratio"] == 2
    assert measured["time_ms"] == 2 * 64e3


def test_without_routers_it_is_refused(bench_config):
    with pytest.raises(ConfigError, match=r"needs stage\.mera=replace or stage\.mera=add"):
        check_benchmark(bench_config(3, name="mera"), ())
    with pytest.raises(ConfigError, match="about what stage 3 adds; it needs stage=3"):
        check_benchmark(bench_config(2, name="mera"), ())
