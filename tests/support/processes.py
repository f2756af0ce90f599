"""Processes that need not import anything: copies of one that has imported everything."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import runpy
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from muse.launch import train as train_cell
from support.waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[2]


class Copies:
    """Processes and what they print, which is in files.

    Args:
        folder: for these files, of these processes alone.
        environments: what each process finds in its environment beside what is there.
        function: called with ``arguments`` in each of them.
    """

    def __init__(
        self,
        folder: Path,
        environments: list[dict[str, str]],
        function: Callable[..., None],
        *arguments: Any,
    ) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        context = copying_context()
        self.processes: list[BaseProcess] = [
            context.Process(
                target=_be_copy, args=(folder / str(number), environment, function, arguments), daemon=True
            )
            for number, environment in enumerate(environments)
        ]
        for number, process in enumerate(self.processes):
            # One that is ended very early has printed nothing.
            for ending in ("out", "err"):
                (folder / f"{number}.{ending}").touch()
            process.start()

    def alive(self) -> bool:
        """Whether none of them has ended."""
        return all(process.is_alive() for process in self.processes)

    def wait(self, watched: bool = False) -> list[int]:
        """Exit statuses; nothing is left running.

        Args:
            watched: whether the first one that fails ends the others, as torchrun does.
        """
        try:
            deadline = time.monotonic() + PATIENCE
            while watched and not any(process.exitcode for process in self.processes):
                running = [process.sentinel for process in self.processes if process.is_alive()]
                if not wait(running, max(0.0, deadline - time.monotonic())):
                    break
            for process in self.processes:
                if watched:
                    process.terminate()
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in self.processes:
                process.kill()
                process.join()
        return [process.exitcode or 0 for process in self.processes]

    def out(self) -> list[str]:
        """What each has printed."""
        return [(self.folder / f"{number}.out").read_text() for number in range(len(self.processes))]

    def err(self) -> list[str]:
        """What each has printed on standard error."""
        return [(self.folder / f"{number}.err").read_text() for number in range(len(self.processes))]


def copying_context() -> multiprocessing.context.ForkServerContext:
    """For processes that are copies of one that has imported everything."""
    multiprocessing.set_forkserver_preload(["support.preloaded"])
    before = os.environ.get("PYTHONPATH")
    # The server imports before it is told the path of this process.
    there = [before] if before else []
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *there])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return multiprocessing.get_context("forkserver")


def _be_copy(
    output: Path, environment: dict[str, str], function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    for ending, stream in (("out", 1), ("err", 2)):
        file = os.open(output.with_suffix(f".{ending}"), os.O_CREAT | os.O_WRONLY)
        os.dup2(file, stream)
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*arguments)


def be_command(
    script: str, arguments: list[str], folder: Path, prepare: Callable[[], None] | None = None
) -> None:
    """Become train.py or bench.py in ``folder``; ``prepare`` is called before."""
    if prepare is not None:
        prepare()
    os.chdir(folder)
    sys.argv = [str(ROOT / script), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def keep_cells() -> None:
    """Let the cells of a sweep have no processes of their own."""
    train_cell.run_isolated = lambda job, *arguments: job(*arguments)


def environment_apart() -> dict[str, str]:
    """That of a command of the repository in a process that is no copy."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
