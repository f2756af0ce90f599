"""One run of bench.py: measurements, and everything it leaves in its folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from muse.benchmarks.checkpoint import with_checkpoint_options
from muse.benchmarks.presentation import CRITERION, METRICS, curves, save_figures, tables, text
from muse.benchmarks.suite import check_benchmark, run_suite
from muse.config import CONF, BenchConfig, StageConfig, register_schemas
from muse.errors import ConfigError
from muse.files import find_files, write_json
from muse.hardware import machine, restored_threads, use_hardware
from muse.launch.composition import Loader
from muse.launch.presets import tell_what_gave_way
from muse.launch.sweep import given_options, record, sweep_folder
from muse.processes.torchrun import launched_ranks
from muse.report.metrics import MetricsLog, require_trackers
from muse.report.sweep import record_metrics
from muse.runs.folder import RESULT_FILE, read_result
from muse.runs.provenance import identity, provenance, source_hash


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
    composed, config = config, with_checkpoint_options(config, given_options())
    tell_what_gave_way(composed, config, f"benchmark.checkpoint={config.benchmark.checkpoint}")
    if config.benchmark.checkpoint is not None:
        print(
            f"stage {config.stage.number}, {config.model.name}, {config.stage.precision} of "
            f"{config.benchmark.checkpoint}"
        )
    check_benchmark(config, given_options())
    require_trackers(config.logger)
    here = machine(config.hardware, use_hardware(config.hardware))
    sweep = sweep_folder()
    if sweep is not None:
        record_metrics(sweep, METRICS)
    finished = _finished(config, here) if sweep is not None and not config.benchmark.rerun else None
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


def composed_stage(number: str) -> StageConfig:
    """The options of a stage as Hydra composes them where a command gives none but its number."""
    hydra = GlobalHydra.instance()
    if hydra.is_initialized():
        loader = hydra.config_loader()
    else:
        register_schemas()
        loader = Loader(create_config_search_path(str(CONF)))
    composed = loader.load_configuration("bench", [f"stage='{number}'"], RunMode.RUN)
    stage = OmegaConf.to_object(composed.stage)
    assert isinstance(stage, StageConfig)
    return stage


def _measure(config: BenchConfig, run: Path, here: dict[str, Any]) -> dict[str, Any]:
    results = run_suite(config, run, composed_stage)
    result = {
        **results.values,
        "values": results.values,
        "criteria": [dict(zip(CRITERION, row, strict=True)) for row in results.criteria],
        "details": results.details,
        "failures": results.failures,
        "unjudged": results.unjudged,
        "source": source_hash(),
        "machine": here,
        **provenance(config),
    }
    # Hours of measuring must not hang on a plot.
    write_json(run / RESULT_FILE, result)
    pictures = save_figures(results)
    log = MetricsLog(run, config)
    log(0, {key: value for key, value in results.values.items() if isinstance(value, int | float)})
    for step, losses in curves(results):
        log(step, losses)
    log.add_results(results.values, pictures, tables(results))
    print(text(results))
    print(f"\neverything is in {run}")
    log.close()
    return result


def _finished(config: BenchConfig, here: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """Folder and result of the newest finished run with the same options, code and machine."""
    wanted = {"identity": identity(config), "source": source_hash(), "machine": here}
    found = find_files(Path(config.output_root) / "bench", RESULT_FILE)
    paths = sorted(found, key=lambda path: -path.stat().st_mtime_ns)
    for path in paths:
        try:
            result = read_result(path.parent)
        except (OSError, ValueError):
            continue
        same = all(result.get(key) == value for key, value in wanted.items())
        if same and not result.get("failures"):
            return Path(os.path.normpath(path.parent / result.get("reused_from", "."))), result
    return None
