"""Checkpoints are written: whole or not at all, by all ranks together (runs/checkpoints.py reads them)."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from muse.errors import RunError, of_all_ranks
from muse.files import fsync, write_atomically
from muse.hardware import restore_torch_random_state, torch_random_state
from muse.processes.ranks import all_gathered, broadcast, rank, ranks
from muse.runs.checkpoints import (
    BEST,
    HASHES,
    STATE,
    TrainingState,
    best_name,
    cause_of,
    file_hash,
    newest_first,
)


def random_state() -> dict[str, Any]:
    """States of the random generators of Python, NumPy and PyTorch in this process."""
    name, keys, *position = np.random.get_state(legacy=True)
    numpy = (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *position)
    return {"python": random.getstate(), "numpy": numpy, **torch_random_state()}


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the random generators of this process to states from ``random_state``."""
    random.setstate(state["python"])
    name, keys, *position = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *position))
    restore_torch_random_state(state)


@dataclass
class _Pending:
    """A checkpoint whose tensors are being written."""

    written: Future[Any]
    temporary: Path
    step: int
    best: bool


class CheckpointWriter:
    """Writes the checkpoints of a run; every rank calls the same methods in the same order.

    Args:
        folder: ``checkpoints`` of the run, seen by all ranks.
        asynchronous: whether tensors are copied and then written while training goes on. Such a checkpoint
            counts from the next call of ``save`` or ``finish`` on.
    """

    def __init__(self, folder: Path, asynchronous: bool = False) -> None:
        self.folder = folder
        self.asynchronous = asynchronous
        # Collectives of the writing thread must not meet those of the training.
        self._group = dist.new_group(backend="gloo") if asynchronous and ranks() > 1 else None
        self._pending: _Pending | None = None
        if rank() == 0:
            for leftover in folder.glob(".step_*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)

    def save(self, tensors: dict[str, Any], state: TrainingState, best: bool) -> None:
        """Write a checkpoint, make it the last (and, if ``best``, the best) one, drop those of no use.

        A checkpoint of this step that is there already is left as it is: a step has one state.

        Args:
            tensors: state dicts; DTensors are written by the ranks that hold their parts.
            state: of this process; random states are taken from all, and ``best`` from the argument.
            best: whether the model is the best so far.

        Raises:
            RunError: when the disk is full or cannot be written; earlier checkpoints are untouched.
        """
        self.finish()
        name = f"step_{state.step:08d}"
        temporary = self.folder / f".{name}.tmp"
        randoms = all_gathered(random_state())
        exists = broadcast((self.folder / name).exists())

        def start() -> None:
            if rank() == 0 and not exists:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                # Written to a file torch.save does not say that a disk is full.
                buffer = io.BytesIO()
                torch.save({**vars(state), "random": randoms, "best": best}, buffer)
                (temporary / STATE).write_bytes(buffer.getvalue())
                fsync(temporary / STATE)

        self._together(state.step, start)
        if exists:
            self._together(state.step, lambda: self._counts(name, best) if rank() == 0 else None)
            return
        alone = ranks() == 1
        written: Future[Any] = Future()

        def write() -> None:
            if not self.asynchronous:
                dcp.save(tensors, checkpoint_id=temporary, no_dist=alone)
                written.set_result(None)
                return
            saving = dcp.async_save(
                tensors, checkpoint_id=temporary, process_group=self._group, no_dist=alone
            )
            assert isinstance(saving, Future)
            self._pending = _Pending(saving, temporary, state.step, best)

        self._together(state.step, write)
        if self._pending is None:
            self._pending = _Pending(written, temporary, state.step, best)
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and let it count.

        Raises:
            RunError: it could not be written.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        name = f"step_{pending.step:08d}"
        own: dict[str, str] = {}

        def hash_files() -> None:
            pending.written.result()
            # A rank's files begin with its number; the first rank writes all others, too.
            for path in pending.temporary.iterdir():
                writer = path.name.removeprefix("__").partition("_")[0] if path.suffix == ".distcp" else "0"
                if int(writer) == rank():
                    own[path.name] = file_hash(path)

        self._together(pending.step, hash_files)
        hashes = {file: digest for part in all_gathered(own) for file, digest in part.items()}

        def count() -> None:
            if rank() != 0:
                return
            (pending.temporary / HASHES).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
            for path in (pending.temporary / HASHES, pending.temporary):
                fsync(path)
            os.rename(pending.temporary, self.folder / name)
            fsync(self.folder)
            self._counts(name, pending.best)

        self._together(pending.step, count)

    @contextmanager
    def finished_on_error(self) -> Iterator[None]:
        """Around training: what is being written counts also when this process fails, if it is the only one.

        Several ranks would have to fail together; ``finish`` is called where they do.
        """
        try:
            yield
        except (RunError, OSError):
            if ranks() == 1:
                # The first error is the one to be told.
                with suppress(RunError):
                    self.finish()
            raise

    def _counts(self, name: str, best: bool) -> None:
        if best:
            write_atomically(self.folder / BEST, name)
        for old in newest_first(self.folder)[2:]:
            if old.name != best_name(self.folder):
                shutil.rmtree(old, ignore_errors=True)

    def _together(self, step: int, act: Callable[[], None]) -> None:
        """Do a part of the writing; where it fails on one rank, it fails on all."""
        reason = None
        try:
            act()
        # CheckpointException is no Exception.
        except (OSError, RuntimeError, CheckpointException) as error:
            reason = cause_of(error)
        reason = next((found for found in all_gathered(reason) if found is not None), None)
        if reason is not None:
            if rank() == 0:
                shutil.rmtree(self.folder / f".step_{step:08d}.tmp", ignore_errors=True)
            raise of_all_ranks(
                f"the checkpoint of step {step} could not be written to {self.folder}: {reason}; "
                "earlier checkpoints are kept; free space and use resume=auto, or resume="
                f"{self.folder.parent} and output_root=<folder> on another disk"
            )
