"""One run of bench.py: measurements, and everything it leaves in its folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from muse.benchmarks.checkpoint import check_baseline, of_checkpoint
from muse.benchmarks.criteria_decoder import VRAM_TARGET
from muse.benchmarks.criteria_flow import DRIFT_TARGET, VRAM_REDUCTION
from muse.benchmarks.results import Report
from muse.benchmarks.suite import run_suite
from muse.benchmarks.workload import check_flow, check_updates
from muse.config import BENCHMARKS, BenchConfig
from muse.errors import ConfigError
from muse.files import find_files, write_json
from muse.hardware import machine, restored_threads, use_hardware
from muse.launch.sweep import given_options, record, sweep_folder
from muse.processes.torchrun import launched_ranks
from muse.report.metrics import MetricsLog
from muse.report.plots import draw_lines, draw_ratios, draw_stacked, save, subtracted
from muse.report.table import show, table
from muse.report.wandb_tables import HOLDERS, drift_lines, result_tables
from muse.runs.options import RESULT_FILE
from muse.runs.provenance import identity, provenance, source_hash

# Benchmarks that no weights change.
UNTRAINED = ("adjoint", "kernels", "speedup")
CRITERION = ("criterion", "measured", "target", "pass")


@restored_threads()
def run_benchmark(config: BenchConfig, run: Path) -> int:
    """Measure as configured, write the results into the folder ``run`` and return the exit status.

    The status is 1 where a measurement failed; what the others found is written all the same.
    In a multirun a cell that an earlier sweep has finished with the same options and the same code on the
    same hardware is taken from there, and goes into the summary of the sweep like every other.
    With ``benchmark.checkpoint`` the options of the model, the text and the tokenizer are the checkpoint's.
    """
    if launched_ranks():
        raise ConfigError(
            "torchrun starts the processes of hardware.parallel=ddp or fsdp, which are options of train.py; "
            "bench.py measures in one process, so start it with python"
        )
    config = of_checkpoint(config, given_options())
    if config.benchmark.checkpoint is not None:
        print(
            f"stage {config.stage.number}, {config.model.name}, {config.stage.precision} of "
            f"{config.benchmark.checkpoint}"
        )
    if (
        (config.benchmark.seq_len or 0) > config.model.seq_len
        and config.stage.mixer == "none"
        and config.benchmark.name != "kernels"
    ):
        raise ConfigError(
            f"benchmark.seq_len={config.benchmark.seq_len} is longer than the learned positions of "
            f"stage.mixer=none; it must be at most model.seq_len={config.model.seq_len}"
        )
    if config.benchmark.name in ("energy", "adjoint") and config.stage.number != "2":
        raise ConfigError(f"benchmark={config.benchmark.name} is about the flow; it needs stage=2")
    stacked = config.stage.number == "3a"
    allowed = ("speedup", "all", "kernels") if stacked else tuple(set(BENCHMARKS) - {"speedup"})
    if config.benchmark.name not in allowed:
        raise ConfigError(
            f"benchmark={config.benchmark.name} does not go with stage={config.stage.number}; stage=3a has "
            "benchmark=speedup, and only stage=3a has it"
        )
    if config.benchmark.checkpoint is not None and (stacked or config.benchmark.name in UNTRAINED):
        raise ConfigError(
            f"benchmark.checkpoint changes nothing in benchmark={config.benchmark.name} of "
            f"stage={config.stage.number}, which does not measure trained weights; leave it out"
        )
    check_flow(config, given_options())
    check_updates(config)
    check_baseline(config)
    here = machine(config.hardware, use_hardware(config.hardware))
    finished = _finished(config, here) if sweep_folder() is not None and not config.benchmark.rerun else None
    status = "measured" if finished is None else "reused"
    if finished is None:
        result = _measure(config, run, here)
    else:
        folder, result = finished
        print(f"already measured in {folder}; benchmark.rerun=true measures again")
        # Paths in it are relative to that folder.
        write_json(run / RESULT_FILE, {**result, "reused_from": os.path.relpath(folder, run)})
    failures = [f"{name}: {reason}" for name, reason in result["failures"].items()]
    if failures:
        record({**result["values"], "error": "; ".join(failures)}, "failed")
    else:
        record(result["values"], status)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return int(bool(failures))


def _measure(config: BenchConfig, run: Path, here: dict[str, Any]) -> dict[str, Any]:
    report = run_suite(config, run)
    result = {
        **report.values,
        "values": report.values,
        "criteria": [dict(zip(CRITERION, row, strict=True)) for row in report.criteria],
        "details": report.details,
        "failures": report.failures,
        "unjudged": report.unjudged,
        "source": source_hash(),
        "machine": here,
        **provenance(config),
    }
    # Hours of measuring must not hang on a plot.
    write_json(run / RESULT_FILE, result)
    plots = _plots(report, run)
    log = MetricsLog(run, config)
    log(0, {key: value for key, value in report.values.items() if isinstance(value, int | float)})
    for step, losses in _curves(report):
        log(step, losses)
    log.add_results(report.values, plots, result_tables(report.details, report.criteria, DRIFT_TARGET))
    print(_tables(report))
    print(f"\neverything is in {run}")
    log.close()
    return result


def _curves(report: Report) -> list[tuple[int, dict[str, float]]]:
    """Losses of the trainings of ``speedup`` by step, for the log."""
    by_step: dict[int, dict[str, float]] = {}
    for name, values in report.details.get("speedup", {}).items():
        for step, loss in values["curve"]:
            by_step.setdefault(step, {})[f"loss/{name}"] = loss
    return sorted(by_step.items())


def _tables(report: Report) -> str:
    parts = []
    for measurement, models in report.details.items():
        if measurement == "kernels":
            parts += _kernel_tables(models)
            continue
        values = next(iter(models.values()))
        keys = [k for k, v in values.items() if k != "device" and not isinstance(v, list | dict)]
        rows = [[key, *(values.get(key) for values in models.values())] for key in keys]
        parts.append(table((measurement, *models), rows))
    if report.criteria:
        parts.append(table(CRITERION, report.criteria))
    parts += [f"{key} is open: {reason}" for key, reason in report.unjudged.items()]
    parts.append(f"all pass: {show(report.values['all_pass'])}")
    return "\n" + "\n\n".join(parts)


def _kernel_tables(rows: dict[str, dict[str, Any]]) -> list[str]:
    """A table for each family, whose operations have much the same alternatives."""
    parts = [
        "alternatives: their time / ours, forward + backward (eager fwd: forward alone)\n"
        "memory: peak of eager / ours; peak fwd, bwd: share of the rate of a large product"
    ]
    for family in dict.fromkeys(row["family"] for row in rows.values()):
        members = {name: row for name, row in rows.items() if row["family"] == family}
        names = dict.fromkeys(name for row in members.values() for name in row.get("alternatives", {}))
        others = [name for name in names if name not in ("ours", "eager")]
        header = (family, "dtype", "fwd ms", "fwd+bwd", "eager fwd", "eager", *others, "memory")
        header += ("peak fwd", "bwd")
        parts.append(table(header, [_kernel_cells(row, others) for row in members.values()]))
        remarks = [f"{name}: {row['error']}" for name, row in members.items() if row["error"] is not None]
        remarks += [
            f"{name}: {figures['note']}"
            for name, row in members.items()
            for figures in row.get("alternatives", {}).values()
            if "note" in figures
        ]
        if remarks:
            parts.append("\n".join(remarks))
    return parts


def _kernel_cells(row: dict[str, Any], others: list[str]) -> list[object]:
    def of(name: str, key: str) -> object:
        return row.get("alternatives", {}).get(name, {}).get(key)

    def short(value: object) -> object:
        return f"{value:.2f}" if isinstance(value, float) else value

    ratios = [of("eager", "forward_ratio"), *(of(name, "training_ratio") for name in ("eager", *others))]
    shares = [row.get(f"{part}_share_of_peak") for part in ("forward", "backward")]
    return [
        row.get("operation", row["family"]),
        row.get("dtype"),
        of("ours", "forward_ms_p50"),
        of("ours", "training_ms_p50"),
        *map(short, (*ratios, of("eager", "peak_ratio"), *shares)),
    ]


def _plots(report: Report, run: Path) -> list[Path]:
    figures = _figures(report)
    for name, figure in figures.items():
        save(figure, run / f"{name}.png")
    return [run / f"{name}.png" for name in figures]


def _figures(report: Report) -> dict[str, Any]:
    """A figure for each measurement that has one, by its name."""
    figures = {}
    if memory := report.details.get("vram"):
        bars = {name: {part: values[part] for part in HOLDERS} for name, values in memory.items()}
        baseline = memory.get("stage 0 fp32")
        limit = (f"{VRAM_TARGET:.0%} of stage 0 fp32", VRAM_TARGET * baseline["peak"]) if baseline else None
        if full := memory.get("backprop"):
            allowed = 1 - VRAM_REDUCTION
            limit = (f"{allowed:.0%} of full backpropagation", allowed * full["peak"])
        figures["vram"] = draw_stacked("peak memory of a training step", "GB", bars, limit)
    if speed := report.details.get("throughput"):
        bars = {
            name: {
                "matrix products": values["products_ms"],
                "everything else": max(0.0, values["step_ms_p50"] - values["products_ms"]),
            }
            for name, values in speed.items()
        }
        figures["throughput"] = draw_stacked("time of a training step", "ms", bars)
    if energies := report.details.get("energy"):
        figures["energy"] = draw_lines(
            "energy drift of the worst token of the worst layer",
            "time",
            "|E - E0| / |E0|",
            drift_lines(energies),
            log=True,
            limit=(f"allowed: {DRIFT_TARGET:g}", DRIFT_TARGET),
        )
    if kernels := report.details.get("kernels"):
        ratios = {
            name: {
                other: figures_of["training_ratio"]
                for other, figures_of in row["alternatives"].items()
                if other != "ours" and "training_ratio" in figures_of
            }
            for name, row in kernels.items()
            if "alternatives" in row
        }
        label = "time of the alternative / ours, forward + backward (above 1: ours is faster)"
        figures["kernels"] = draw_ratios("operations of kernels/", label, ratios)
    if runs := report.details.get("speedup"):
        curves = {name: values["curve"] for name, values in runs.items()}
        plain = {name: curves.get(name.replace("stack", "plain", 1)) for name in curves}
        figures["speedup"] = draw_lines(
            "training loss, plainly and with the stack",
            "batch",
            "loss [nats per token]",
            curves,
            differences=("difference to plain", _differences(curves, plain)),
        )
    if perplexity := report.details.get("perplexity"):
        curves = {name: values["curve"] for name, values in perplexity.items()}
        baseline = next(reversed(curves))
        figures["perplexity"] = draw_lines(
            "training loss on the same tokens",
            "step",
            "loss [nats per token]",
            curves,
            differences=(
                f"difference to {baseline}",
                _differences(curves, dict.fromkeys(curves, curves[baseline])),
            ),
        )
    return figures


def _differences(curves: dict[str, Any], references: dict[str, Any]) -> dict[str, Any]:
    """Each curve less its reference, where that is there and another curve."""
    return {
        name: subtracted(curve, references[name])
        for name, curve in curves.items()
        if references[name] is not None and references[name] is not curve
    }


def _finished(config: BenchConfig, here: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """Folder and result of the newest finished run with the same options, code and machine."""
    wanted = {"identity": identity(config), "source": source_hash(), "machine": here}
    found = find_files(Path(config.output_root) / "bench", RESULT_FILE)
    paths = sorted(found, key=lambda path: -path.stat().st_mtime_ns)
    for path in paths:
        try:
            result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        same = all(result.get(key) == value for key, value in wanted.items())
        if same and not result.get("failures"):
            return Path(os.path.normpath(path.parent / result.get("reused_from", "."))), result
    return None
