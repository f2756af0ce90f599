"""Sweeps of very small cells, as a user runs them, and what they leave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save

from muse.export import export_run
from muse.files import find_files
from support.configs import run_options
from support.processes import ROOT, environment_apart
from support.waiting import PATIENCE, wait_until

STEPS = 16
# Of which a process and all that it starts can be told.
MARK = "MUSE_TEST_SWEEP"
TWO = ["seed=0,1", f"train.steps={STEPS}", "train.checkpoint_every=4", "resume=auto"]

# Lets every cell wait after so many steps until it is sent a signal, or has been since its first step.
HELD = """
import signal, time
from muse.report.metrics import MetricsLog

log, sent = MetricsLog.__call__, []

def log_and_wait(self, step, metrics):
    if step == 1:
        handle = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *given: (sent.append(given), handle(*given)))
    log(self, step, metrics)
    while step == {steps} and not sent:
        time.sleep(0.01)

MetricsLog.__call__ = log_and_wait
"""


def options(place: Path, root: str) -> list[str]:
    """Of a sweep of very small runs that log every step."""
    return [*run_options(place, root), "train.eval_every=0", "train.sample_tokens=0"]


def start(place: Path, root: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start a sweep below the folder ``root``; its processes may be found by ``processes_of(root)``."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "-m", *options(place, root), *arguments],
        cwd=place,
        # submitit starts processes that know nothing of train.py's folder.
        env={**environment_apart(), MARK: str(place / root), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def sweep(place: Path, root: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a sweep; nothing may ever show a traceback."""
    process = start(place, root, *arguments, **environment)
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert "Traceback" not in out + err, err
    return process.returncode, out, err


def sweeps(place: Path, root: str) -> list[Path]:
    """Folders of the sweeps below ``root``, the oldest first."""
    found = (place / root / "train" / "sweep").glob("*/summary.json")
    return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime_ns)]


def summary(folder: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads((folder / "summary.json").read_text())
    return cells


def outcomes(folder: Path, option: str) -> list[tuple[str, str]]:
    return [(cell["options"][option], cell["status"]) for cell in summary(folder)]


def weights(folder: Path, place: Path) -> list[bytes]:
    """Final weights of each cell of a sweep."""
    found = []
    for cell in summary(folder):
        export_run(folder / cell["folder"], place / "weights.safetensors", "last")
        # Without the metadata, which name the cell's options.
        found.append(save(load_file(place / "weights.safetensors")))
    return found


def processes_of(mark: Path) -> list[int]:
    """Processes that a sweep below ``mark`` has started, and that still run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def wait_for_steps(process: subprocess.Popen[str], root: Path, steps: int, cells: int) -> None:
    """Wait until so many cells have made so many steps."""

    def count(path: Path) -> int:
        return path.read_text(encoding="utf-8").count("\n")

    def made() -> bool:
        logs = find_files(root / "train", "metrics.jsonl")
        return sum(count(log) >= steps for log in logs) >= cells

    try:
        wait_until(made, lambda: process.poll() is None)
    except AssertionError as error:
        process.kill()
        raise AssertionError(process.communicate()) from error


def wait_until_alone(root: Path) -> None:
    wait_until(lambda: not processes_of(root))
