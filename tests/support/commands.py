"""Commands in this process, which spares them the import of torch."""

from __future__ import annotations

import copy
import functools
import os
import runpy
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import muse.launch.cli
import muse.launch.sweep
import muse.processes.signals
from muse.benchmarks import suite
from muse.benchmarks.suite import MEASUREMENTS
from muse.config import BenchConfig, StageConfig
from muse.hardware import describe, use_hardware
from muse.launch import bench as bench_run
from muse.launch import train as train_cell
from muse.launch.bench import composed_stage
from support.processes import ROOT


def run_here(script: str, arguments: list[str]) -> int:
    """The exit status of a script of the repository, or of a module, run in this process."""
    before = sys.argv, os.getcwd(), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        sys.argv = [script, *arguments]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
        signal.signal(signal.SIGTERM, before[2])
        signal.signal(signal.SIGINT, before[3])
        # As in a process that has just begun.
        muse.launch.cli._statuses.clear()
        muse.launch.sweep._folder = muse.processes.signals._received = None
        muse.processes.signals._is_command, muse.processes.signals._cells_unfinished = False, None
    return 0


def measured_here(measurement: str, *configs: BenchConfig) -> dict[str, Any]:
    """As measure_isolated, but in this process."""
    device = use_hardware(configs[0].hardware)
    return {**MEASUREMENTS[measurement](*configs, device), "device": describe(device)}


# Handlers of a log would outlive the test.
WITHOUT_LOG = ["hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]


def keep_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let measurements and the cells of a sweep start no processes of their own."""
    monkeypatch.setattr(suite, "measure_isolated", measured_here)
    monkeypatch.setattr(bench_run, "composed_stage", default_stage)
    monkeypatch.setattr(train_cell, "run_isolated", lambda job, *arguments: job(*arguments))


def commands_here(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[[str, list[str]], int]:
    """As ``run_here``, for train.py and bench.py in a folder, with all that they would start."""
    keep_here(monkeypatch)
    monkeypatch.chdir(folder)
    return lambda script, arguments: run_here(script, [*arguments, *WITHOUT_LOG])


def default_stage(number: str) -> StageConfig:
    """As ``composed_stage``, which composes each stage once here."""
    return copy.copy(_composed(number))


_composed = functools.cache(composed_stage)
