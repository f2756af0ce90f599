from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.runs import CrashError, crash_at, read_json, same, stored
from support.training import Recorder, prepare_model, run_config, run_train
from torch.autograd import DeviceType
from torch.utils._python_dispatch import _get_current_dispatch_mode

from muse.config import RunConfig
from muse.errors import ConfigError, RunError
from muse.training import profile as module
from muse.training.profile import STEPS, TOP, Operation, idle_share, rank_operations, require_steps


@pytest.fixture(autouse=True)
def small_peak_product(monkeypatch):
    monkeypatch.setattr("muse.measure.matrix_products.PEAK_SIDE", {"cpu": 64})


def profiled_config(number: int = 1, precision: str = "fp32", **train: Any) -> RunConfig:
    config = run_config(number, precision, **{"steps": STEPS + 2, **train})
    return dataclasses.replace(config, profile=True)


def trace_names(run: Path) -> list[str]:
    """Names of all events of the trace, which must be JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = gzip.decompress((run / "trace.json.gz").read_bytes())
    return [event.get("name", "") for event in json.loads(text, parse_constant=refuse)["traceEvents"]]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "precision"), [(0, "fp32"), (1, "fp16-mixed"), (2, "bf16")])
def test_profiling_changes_no_bit_of_a_training(tmp_path, number, precision):
    profiled = profiled_config(number, precision)
    ends = []
    for name, config in (("plain", dataclasses.replace(profiled, profile=False)), ("profiled", profiled)):
        log = Recorder()
        _, result = run_train(config, tmp_path / name, log)
        ends.append((log.losses(), stored(result.checkpoint), result.valid))
    assert same(*ends)
    assert len(ends[0][0]) == STEPS + 2
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["checkpoints"]


def test_a_profile_is_complete(tmp_path, capsys):
    run_train(profiled_config(), tmp_path)
    told = read_json(tmp_path / "profile.json")
    names = trace_names(tmp_path)
    assert sum(name.startswith("ProfilerStep#") for name in names) == told["recorded_steps"] == 3
    assert told["steps"] == STEPS
    assert {"aten::mm", "muse::complex_product"} <= set(names)

    operations = told["operations"]
    assert len(operations) == TOP
    assert {operation["name"] for operation in operations} <= set(names)
    times = [operation["self_ms"] for operation in operations]
    assert times == sorted(times, reverse=True)
    assert 0 < sum(operation["share"] for operation in operations) + told["outside_operations"] < 1

    used = told["utilisation"]
    assert used["step_seconds"] == sorted(told["step_seconds"])[2]
    flops, peak = used["model_flops"]["fp32"], used["measured_peak"]["fp32"]
    assert used["mfu_of_measured_peak"] == pytest.approx(flops / peak / used["step_seconds"])
    assert used["mfu_of_data_sheet"] is None
    assert read_json(tmp_path / "memory.json")["peak"]["parameters"] > 0

    out = capsys.readouterr().out
    assert all(operation["name"] in out for operation in operations)
    assert "of the peak measured here" in out
    assert "MFU of a data sheet: none" in out
    assert f"profile in {tmp_path}: profile.json, memory.json, trace.json.gz" in out
    assert "ended after" not in out


@pytest.mark.parametrize(("step", "recorded"), [(1, None), (3, None), (8, None), (9, 0), (10, 1), (11, 2)])
def test_a_signal_leaves_what_was_recorded(tmp_path, capsys, step, recorded):
    def send(reached: int) -> None:
        if reached == step:
            os.kill(os.getpid(), signal.SIGTERM)

    _, result = run_train(profiled_config(), tmp_path, Recorder(react=send))
    assert result.step == step
    told = read_json(tmp_path / "profile.json")
    assert told["steps"] == step
    assert f"ended after {step} of the {STEPS} steps" in capsys.readouterr().out
    assert (tmp_path / "memory.json").exists() == (step > 1)
    assert (told["utilisation"] is not None) == (step >= 8)
    assert told["recorded_steps"] == (recorded or 0)
    assert (tmp_path / "trace.json.gz").exists() == (recorded is not None)
    if recorded:
        assert "aten::mm" in trace_names(tmp_path)
        assert told["operations"]
    assert _get_current_dispatch_mode() is None


@pytest.mark.parametrize("step", [3, 11])
def test_a_loss_that_is_not_finite_leaves_what_was_recorded(tmp_path, monkeypatch, step):
    def poison(model: torch.nn.Module) -> None:
        loss, calls = model.loss, []

        def poisoned(*arguments: torch.Tensor, **options: Any) -> torch.Tensor:
            calls.append(1)
            return loss(*arguments, **options) * (math.nan if len(calls) == step else 1.0)

        model.loss = poisoned

    prepare_model(monkeypatch, poison)
    with pytest.raises(RunError, match=rf"not finite in step {step}\b"):
        run_train(profiled_config(), tmp_path)
    told = read_json(tmp_path / "profile.json")
    assert told["steps"] == step - 1
    assert read_json(tmp_path / "memory.json")["peak"]["activations and other tensors of the step"] > 0
    if step == 11:
        assert told["recorded_steps"] == 1
        assert "aten::mm" in trace_names(tmp_path)
    assert _get_current_dispatch_mode() is None


def test_a_crash_while_the_memory_is_recorded_is_not_hidden(tmp_path):
    with pytest.raises(CrashError):
        run_train(profiled_config(), tmp_path, Recorder(react=crash_at(2)))
    assert read_json(tmp_path / "profile.json")["files"] == ["memory.json"]
    assert _get_current_dispatch_mode() is None


def test_a_training_without_profile_never_enters_the_profiler(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_look_at_steps", None)
    run_train(dataclasses.replace(profiled_config(steps=2), profile=False), tmp_path)
    assert not (tmp_path / "profile.json").exists()


@pytest.mark.parametrize("done", [0, 100])
def test_a_run_that_is_too_short_is_told_how_many_steps_it_takes(done):
    require_steps(profiled_config(steps=done + STEPS), done)
    short = profiled_config(steps=done + STEPS - 1)
    with pytest.raises(ConfigError, match=rf"train\.steps of at least {done + STEPS}\b") as caught:
        require_steps(short, done)
    assert f"train.steps={done + STEPS - 1} " in str(caught.value)
    assert f"needs {STEPS} steps" in str(caught.value)
    require_steps(dataclasses.replace(short, profile=False), done)


def test_compiled_on_a_cpu_the_memory_is_left_out_and_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    config = profiled_config()
    config.hardware.compile = True
    run_train(config, tmp_path)
    assert not (tmp_path / "memory.json").exists()
    assert read_json(tmp_path / "profile.json")["files"] == ["trace.json.gz"]
    assert "the memory is not recorded" in capsys.readouterr().out


def event(key: str, cpu: float, gpu: float, device: DeviceType = DeviceType.CPU) -> SimpleNamespace:
    return SimpleNamespace(
        key=key,
        self_cpu_time_total=cpu,
        self_device_time_total=gpu,
        count=2,
        self_cpu_memory_usage=10**6,
        self_device_memory_usage=2 * 10**6,
        device_type=device,
    )


def test_operations_are_ranked_by_the_time_of_the_device():
    events = [
        event("ProfilerStep*", 5000, 1000),
        event("aten::mm", 1000, 6000),
        event("aten::add", 4000, 3000),
        event("a_kernel", 0, 9000, DeviceType.CUDA),
    ]
    on_cpu, outside = rank_operations(events, on_gpu=False)
    assert [(o.name, o.self_ms, o.share, o.memory_mb) for o in on_cpu] == [
        ("aten::add", 4.0, 0.4, 1.0),
        ("aten::mm", 1.0, 0.1, 1.0),
    ]
    assert outside == 0.5
    on_gpu, outside = rank_operations(events, on_gpu=True)
    assert [(o.name, o.self_ms, o.share, o.memory_mb) for o in on_gpu] == [
        ("aten::mm", 6.0, 0.6, 2.0),
        ("aten::add", 3.0, 0.3, 2.0),
    ]
    assert outside == 0.1


def test_a_device_is_idle_for_what_its_kernels_leave_of_a_step():
    """All kernels together: the one that is told took 60 % of 4.5 ms in 3 steps, of 2 ms each."""
    operations = [Operation("aten::mm", 2.7, 0.6, 3, 0.0)]
    assert idle_share(operations, 3, [0.004, 0.002, 0.001]) == pytest.approx(0.25)
    assert idle_share(operations, 3, [0.001]) == 0
    assert idle_share([], 3, [0.001]) is idle_share(operations, 0, [0.001]) is None
