"""A training as a cell of a multirun: in a process of its own, and in the summary."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from muse.config import RunConfig
from muse.files import disk_full_as_run_error
from muse.launch.presets import tell_what_gave_way
from muse.launch.sweep import given_options, record, sweep_folder
from muse.options import changed
from muse.processes.isolated import run_isolated
from muse.runs.folder import RUN_FILE, read_result
from muse.runs.options import RETRAINABLE, is_missing_path, may_change, with_options_of
from muse.runs.provenance import UNIDENTIFYING


def run_train(config: RunConfig, run: Path) -> int:
    """Train as configured and return the exit status; the results are in the folder ``run``.

    With ``resume=<run folder>`` every option that the command does not give is that run's; with
    ``train.init`` stage, model and tokenizer are those of the weights.
    """
    composed, config = config, _with_options_of_weights(_with_options_of_run(config))
    named = f"resume={config.resume}" if _is_named(config.resume) else f"train.init={config.train.init}"
    tell_what_gave_way(composed, config, named)
    # submitit starts a process for each cell, and Slurm's signals reach all processes of a job by themselves.
    sweep = sweep_folder()
    if sweep is not None and config.logger.group is None:
        # The process of the cell knows nothing of Hydra.
        config = changed(config, logger={"group": sweep.name})
    if sweep is None or "submitit" in HydraConfig.get().launcher._target_:
        status = _train(config, run, sweep is not None)
    else:
        status = run_isolated(_train, config, run, True)
    if status == 0 and sweep is not None:
        result = read_result(run)
        record(_values(result, run, sweep), "reused" if "reused_from" in result else "trained")
    return status


def _with_options_of_run(config: RunConfig) -> RunConfig:
    # A folder without the file is refused where the run would begin.
    if not _is_named(config.resume) or not (Path(config.resume) / RUN_FILE).exists():
        return config
    groups = {field.name for field in dataclasses.fields(RunConfig)} - {*UNIDENTIFYING}
    return with_options_of(config, "resume", Path(config.resume), given_options(), groups, may_change)


def _with_options_of_weights(config: RunConfig) -> RunConfig:
    # A run that is named has been given them when it began.
    if config.train.init is None or _is_named(config.resume):
        return config
    groups = ("stage", "model", "tokenizer")
    return with_options_of(
        config,
        "train.init",
        Path(config.train.init),
        given_options(),
        groups,
        lambda name, value: name in RETRAINABLE or is_missing_path(name, value),
    )


def _is_named(resume: str) -> bool:
    return resume not in ("never", "auto")


def validation_loss() -> float:
    """Validation loss at the end of the job that Hydra is running; infinite where it did not get there."""
    loss = (read_result(Path(HydraConfig.get().runtime.output_dir)).get("valid") or {}).get("loss")
    return math.inf if loss is None else float(loss)


def _train(config: RunConfig, run: Path, in_sweep: bool) -> int:
    # A process that only waits for another one does not need torch.
    from muse.training.run import run_training

    with disk_full_as_run_error(run):
        return run_training(config, run, in_sweep)


def _values(result: dict[str, Any], run: Path, sweep: Path) -> dict[str, Any]:
    """What the summary of a multirun, in the folder ``sweep``, tells of a training.

    The folder of the run is relative to that of the multirun.
    """
    splits = {
        f"{split}_{key}": (result[split] or {}).get(key)
        for split in ("valid", "test")
        for key in ("loss", "ppl")
        if result[split]
    }
    keys = ("tokens_per_second", "seconds", "parameters", "steps")
    folder = os.path.relpath(run / result.get("reused_from", "."), sweep)
    return {**splits, **{key: result[key] for key in keys}, "folder": folder}
