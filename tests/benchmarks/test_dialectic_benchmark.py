import dataclasses
import json

import pytest
import torch

from muse.benchmarks import dialectic
from muse.benchmarks.suite import check_benchmark
from muse.benchmarks.workload import Workload, settle
from muse.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def config(bench_config):
    def build(**benchmark):
        built = bench_config(3, name="dialectic", **benchmark)
        return settle(
            dataclasses.replace(built, stage=dataclasses.replace(built.stage, dialectic="mlp")), Workload()
        )

    return build


def test_a_training_is_followed(config, monkeypatch):
    from support.configs import token_data

    monkeypatch.setattr(dialectic, "load_tokens", lambda *_: token_data())
    measured = dialectic.measure_dialectic(config(train_steps=20), CPU)
    steps, values = zip(*measured["contradictions"], strict=True)
    assert steps == tuple(range(2, 21, 2))
    assert all(value > 0 for value in values)
    assert measured["peak"] == max(values)
    assert measured["last"] == values[-1]
    assert measured["gain"] == 1 - values[-1] / max(values)
    assert measured["grad_norm"] > dialectic.NORM_TARGET


def test_a_run_has_been_followed(config, tmp_path):
    lines = [
        {"step": step, "dialectic/contradiction": value, "dialectic/grad_norm": 0.1 * step}
        for step, value in ((10, 0.1), (20, 0.4), (30, 0.2))
    ]
    lines.insert(1, {"step": 15, "train/loss": 3.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    measured = dialectic.measure_dialectic(config(checkpoint=str(tmp_path)), CPU)
    assert measured["contradictions"] == [(10, 0.1), (20, 0.4), (30, 0.2)]
    assert measured["gain"] == 0.5
    assert measured["grad_norm"] == 1.0
    with pytest.raises(ConfigError, match="has logged no contradictions"):
        dialectic.measure_dialectic(config(checkpoint=str(tmp_path / "none")), CPU)


def test_what_has_no_loop_or_no_training_is_refused(config, bench_config):
    with pytest.raises(ConfigError, match=r"needs stage\.dialectic=mlp or stage\.dialectic=hamiltonian"):
        check_benchmark(bench_config(3, name="dialectic"), ())
    with pytest.raises(ConfigError, match="about what stage 3 adds; it needs stage=3"):
        check_benchmark(bench_config(2, name="dialectic"), ())
    with pytest.raises(ConfigError, match="trains no dialectic loop"):
        check_benchmark(config(train_steps=0), ())
