from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.configs import VOCAB
from support.runs import read_json
from support.training import run_config

from muse.models import build_model
from muse.training.memory_snapshot import memory_snapshot
from muse.training.optim import ModelOptimizer


def model_and_optimizer():
    config = run_config()
    model = build_model(config.stage, config.model, VOCAB)
    return model, ModelOptimizer(model, config.optim)


def test_a_cpu_snapshot_tells_what_holds_the_peak(tmp_path):
    model, optimizer = model_and_optimizer()
    size = sum(parameter.nbytes for parameter in model.parameters())
    with memory_snapshot(tmp_path, model, optimizer, torch.device("cpu")):
        kept = torch.ones(1000)
        torch.ones(500).sum()
        del kept
    told = read_json(tmp_path / "memory.json")
    start = told["start of the step"]
    assert (start["parameters"], start["optimiser state"], start["total"]) == (size, 2 * size, 3 * size)
    assert told["peak"]["parameters"] == size
    assert 4 * 1500 <= told["peak"]["activations and other tensors of the step"] <= 4 * 1500 + 64
    assert told["peak"]["total"] == sum(size for kind, size in told["peak"].items() if kind != "total")


def test_a_step_that_fails_leaves_its_snapshot(tmp_path):
    model, optimizer = model_and_optimizer()
    with pytest.raises(ZeroDivisionError), memory_snapshot(tmp_path, model, optimizer, torch.device("cpu")):
        1 / 0
    assert read_json(tmp_path / "memory.json")["peak"]["total"] > 0


@pytest.mark.parametrize("fails", [False, True])
def test_on_cuda_the_history_is_written_and_then_recorded_no_more(tmp_path, monkeypatch, fails):
    calls: list[object] = []

    def record(enabled: str | None = "all", **options: object) -> None:
        calls.append(enabled)

    def dump(path: str) -> None:
        calls.append("dump")
        Path(path).write_bytes(b"snapshot")

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    model, optimizer = model_and_optimizer()
    try:
        with memory_snapshot(tmp_path, model, optimizer, torch.device("cuda")):
            calls.append("step")
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert calls == ["all", "step", "dump", None]
    assert [path.name for path in tmp_path.iterdir()] == ["memory_snapshot.pickle"]
