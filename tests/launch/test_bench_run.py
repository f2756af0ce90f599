"""What a run of bench.py leaves, whatever goes wrong on the way."""

import csv
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from muse import hardware
from muse.benchmarks import suite
from muse.benchmarks.energy import DRIFT_TARGET
from muse.benchmarks.presentation import figures
from muse.benchmarks.results import Results
from muse.config import BenchConfig, BenchmarkConfig, HardwareConfig, LoggerConfig, RunConfig, StageConfig
from muse.errors import ConfigError, RunError
from muse.hardware import machine
from muse.launch import bench as bench_run

CONFIG = BenchConfig(
    benchmark=BenchmarkConfig(),
    hardware=HardwareConfig(device="cpu"),
    logger=LoggerConfig(mode="disabled"),
)
MEASURED = {
    "vram": {"peak": 1.0, **dict.fromkeys(("parameters", "optimiser", "activations"), 0.3)},
    "stability": {"nan_count": 0, "inf_count": 0},
    "gradients": {"grad_norm_min": 1e-3, "grad_norm_max": 1.0},
    "perplexity": {"ppl": 20.0, "trained": "untrained", "parameters": 10, "curve": [(1, 3.0)]},
}
ENERGY = {
    **dict.fromkeys(("max_drift", "leapfrog_max_drift", "mean_drift", "mean_energy", "curvature_dt2"), 1e-6),
    **{key: [1e-6, 1e-6] for key in ("energy_trajectory", "drift_trajectory", "leapfrog_drift_trajectory")},
    "monotone_share": 0.0,
    "times": [0.0, 0.1],
    "integrator": "leapfrog",
}
MEASURED["vram"]["gradients and temporaries"] = 0.1


def measure(name, config):
    if name not in MEASURED:
        raise RunError("it broke")
    return MEASURED[name]


@pytest.fixture
def recorded(monkeypatch):
    """A run outside of Hydra, and what it would put into the summary of a sweep."""
    cells = []
    monkeypatch.setattr(suite, "measure_isolated", measure)
    monkeypatch.setattr(bench_run, "sweep_folder", lambda: None)
    monkeypatch.setattr(bench_run, "record", lambda *cell: cells.append(cell))
    return cells


def test_a_measurement_that_fails_costs_the_exit_status_and_nothing_else(tmp_path, recorded, capsys):
    assert bench_run.run_benchmark(CONFIG, tmp_path) == 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["failures"] == dict.fromkeys(
        ("throughput, stage 1 bf16", "throughput, stage 0 fp32"), "it broke"
    )
    assert (result["tokens_per_second"], result["all_pass"]) == (None, None)
    assert (result["vram_gb"], result["ppl"]) == (1.0, 20.0)
    assert {"criterion": "largest gradient norm", "measured": 1.0, "target": "<= 1000", "pass": True} in (
        result["criteria"]
    )
    assert (tmp_path / "vram.png").exists()
    told = capsys.readouterr()
    assert "error: throughput, stage 1 bf16: it broke" in told.err
    assert "peak memory / stage 0 in fp32" in told.out
    ((values, status),) = recorded
    assert (status, values["vram_gb"]) == ("failed", 1.0)
    assert "throughput, stage 1 bf16: it broke" in values["error"]


def test_a_run_without_failures_succeeds(tmp_path, recorded):
    config = dataclasses.replace(CONFIG, benchmark=BenchmarkConfig(name="stability"))
    assert bench_run.run_benchmark(config, tmp_path) == 0
    assert json.loads((tmp_path / "result.json").read_text())["all_pass"] is True
    assert [status for _, status in recorded] == ["measured"]


@pytest.mark.usefixtures("recorded")
def test_the_result_is_written_before_anything_is_drawn(tmp_path, monkeypatch):
    def broken(*arguments):
        raise OSError("no fonts")

    monkeypatch.setattr(bench_run, "save_figures", broken)
    with pytest.raises(OSError, match="no fonts"):
        bench_run.run_benchmark(CONFIG, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["vram_gb"] == 1.0


CURVE = [[1, 5.0], [2, 4.0]]
DETAILS = {
    "energy": {
        "trained": {
            "times": [0.0, 0.1, 0.2],
            "integrator": "yoshida4",
            "drift_trajectory": [0.0, 1e-7, 2e-7],
            "leapfrog_drift_trajectory": [0.0, 1e-6, 2e-6],
        }
    },
    "speedup": {
        name: {"curve": [[step, loss + shift] for step, loss in CURVE]}
        for name, shift in (("plain, 8", 0.0), ("stack, 8", 0.5), ("plain, 1", 1.0), ("stack, 1", 1.25))
    },
    "perplexity": {"stage 2": {"curve": [[1, 5.5], [2, None]]}, "stage 0": {"curve": CURVE}},
    "kernels": {
        "norm": {"alternatives": {"ours": {"training_ratio": 1.0}, "eager": {"training_ratio": 3.0}}},
        "flow": {"error": "wrong"},
    },
}


def drawn(**details):
    """The axes of each figure."""
    results = Results(Path("unused"), measure, bench_run.composed_stage, details=details)
    return {name: figure.axes for name, figure in figures(results).items()}


def test_the_picture_of_the_energy_has_the_drift_that_is_allowed():
    (axes,) = drawn(**DETAILS)["energy"]
    assert [DRIFT_TARGET] * 2 in [list(line.get_ydata()) for line in axes.lines]
    assert axes.get_ylim()[0] < 2e-6 < DRIFT_TARGET < axes.get_ylim()[1]


def test_losses_have_a_panel_of_their_differences_to_the_plain_run_or_the_baseline():
    axes = drawn(**DETAILS)
    differences = {
        line.get_label(): list(line.get_ydata())
        for name in ("speedup", "perplexity")
        for line in axes[name][1].lines
        if not line.get_label().startswith("_")
    }
    assert differences == {"stack, 8": [0.5, 0.5], "stack, 1": [0.25, 0.25], "stage 2": [0.5]}
    assert len(drawn(perplexity={"stage 0": {"curve": CURVE}})["perplexity"]) == 1
    assert len(drawn(speedup={"stack, 1": {"curve": CURVE}})["speedup"]) == 1


def test_the_kernels_stand_beside_their_alternatives_alone():
    (axes,) = drawn(**DETAILS)["kernels"]
    assert [bar.get_width() for bar in axes.patches] == [2.0]


@pytest.fixture
def sweep(tmp_path, monkeypatch, recorded):
    """Runs a cell of a sweep; its status, and the gradient norm that the cell told.

    Each measurement finds a larger norm than the one before.
    """
    numbers = itertools.count(1)

    def measure_next(name, config):
        return {"grad_norm_min": 1e-3, "grad_norm_max": float(next(numbers))}

    monkeypatch.setattr(suite, "measure_isolated", measure_next)
    monkeypatch.setattr(bench_run, "sweep_folder", lambda: tmp_path)

    def cell(benchmark=BenchmarkConfig(name="gradients"), **hardware):
        config = dataclasses.replace(
            CONFIG,
            benchmark=benchmark,
            hardware=HardwareConfig(**{"device": "cpu", **hardware}),
            output_root=str(tmp_path),
        )
        assert bench_run.run_benchmark(config, tmp_path / "bench" / str(len(recorded))) == 0
        values, status = recorded[-1]
        return status, values["grad_norm_max"]

    return cell


def test_cells_that_differ_in_their_hardware_are_all_measured(sweep):
    cells = [{"threads": 1}, {"threads": 2}, {}, {"kernels": "eager"}, {"compile": True}]
    assert [sweep(**cell) for cell in cells] == [("measured", float(n)) for n in range(1, 6)]
    assert [sweep(**cell) for cell in cells[::-1]] == [("reused", float(n)) for n in range(5, 0, -1)]


def test_a_sweep_takes_what_was_measured_again(sweep):
    again = BenchmarkConfig(name="gradients", rerun=True)
    assert [sweep() for _ in range(2)] == [("measured", 1.0), ("reused", 1.0)]
    assert [sweep(again) for _ in range(2)] == [("measured", 2.0), ("measured", 3.0)]
    assert [sweep() for _ in range(2)] == [("reused", 3.0)] * 2


@pytest.mark.parametrize("what", ["describe", "package_version"])
def test_a_result_of_another_device_or_torch_is_not_reused(sweep, monkeypatch, what):
    assert sweep() == ("measured", 1.0)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(hardware, what, lambda _: "another")
        assert sweep() == ("measured", 2.0)
        assert sweep() == ("reused", 2.0)
    assert sweep() == ("reused", 1.0)


@pytest.mark.usefixtures("recorded")
def test_a_result_with_failures_is_not_reused(tmp_path, monkeypatch):
    root = dataclasses.replace(CONFIG, output_root=str(tmp_path))
    here = machine(root.hardware, torch.device("cpu"))
    bench_run.run_benchmark(root, tmp_path / "bench" / "first")
    assert bench_run._finished(root, here) is None
    keys = ("tokens_per_second", "products_ratio", "products_and_sdpa_ratio", "products_ms", "step_ms_p50")
    monkeypatch.setitem(MEASURED, "throughput", dict.fromkeys(keys, 1.0))
    bench_run.run_benchmark(root, tmp_path / "bench" / "second")
    folder, result = bench_run._finished(root, here)
    assert folder == tmp_path / "bench" / "second"
    assert result["tokens_per_second"] == 1.0


def test_a_sweep_that_is_moved_is_whole(tmp_path, sweep):
    """A reused result tells where it was measured from where it is, also if it was reused before."""
    for _ in range(3):
        sweep()
    (tmp_path / "bench").rename(tmp_path / "moved")
    for n in (1, 2):
        told = json.loads((tmp_path / "moved" / str(n) / "result.json").read_text())
        assert (tmp_path / "moved" / str(n) / told["reused_from"]).resolve() == tmp_path / "moved" / "0"
        told.pop("config")
        assert str(tmp_path) not in json.dumps(told)
    assert "reused_from" not in json.loads((tmp_path / "moved" / "0" / "result.json").read_text())


@pytest.mark.usefixtures("recorded")
def test_a_checkpoint_decides_the_stage_that_a_benchmark_needs(tmp_path, monkeypatch):
    """Also where the command's own would do, or not."""
    runs = {}
    for number in ("1", "2"):
        runs[number] = tmp_path / number
        runs[number].mkdir()
        trained = dataclasses.asdict(RunConfig(stage=StageConfig(number=number)))
        (runs[number] / "run.json").write_text(json.dumps({"config": trained}))

    def bench(name, run, given=()):
        monkeypatch.setattr(bench_run, "given_options", lambda: set(given))
        benchmark = BenchmarkConfig(name=name, checkpoint=str(run))
        return bench_run.run_benchmark(dataclasses.replace(CONFIG, benchmark=benchmark), tmp_path / "out")

    with pytest.raises(ConfigError, match="it needs stage=2"):
        bench("energy", runs["1"])
    with pytest.raises(ConfigError, match=r"\(stage: 2 → 1\)"):
        bench("energy", runs["2"], {"stage"})
    with pytest.raises(ConfigError, match="changes nothing in benchmark=kernels"):
        bench("kernels", runs["2"])
    monkeypatch.setitem(MEASURED, "energy", ENERGY)
    assert bench("energy", runs["2"], {"benchmark.checkpoint"}) == 0
    told = json.loads((tmp_path / "out" / "result.json").read_text())
    assert told["config"]["stage"]["number"] == "2"


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_run, "run_suite", lambda *_: pytest.fail("something was measured"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = dataclasses.replace(CONFIG, logger=LoggerConfig(tensorboard=True))
    with pytest.raises(ConfigError, match="logger=tensorboard needs the package tensorboard"):
        bench_run.run_benchmark(config, tmp_path)


def test_a_benchmark_is_in_every_tracker(tmp_path, recorded):
    logger = LoggerConfig(tensorboard=True, csv=True)
    bench_run.run_benchmark(dataclasses.replace(CONFIG, logger=logger), tmp_path)
    with open(tmp_path / "metrics.csv", encoding="utf-8", newline="") as file:
        assert float(next(csv.DictReader(file))["ppl"]) == MEASURED["perplexity"]["ppl"]
    assert list((tmp_path / "tensorboard").glob("events.*"))
