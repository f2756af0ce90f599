"""Checkpoints: folders written by torch.distributed.checkpoint, which load on any number of ranks.

``checkpoints/step_00000200/`` appears only when it is complete, with the SHA-256 of every file in it;
``checkpoints/best`` is a one-line file that names a folder and its loss, and is replaced, never rewritten.
The last two checkpoints and the best one are kept.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import random
import shutil
import warnings
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
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from muse.distributed import first_rank_does, gathered, rank, ranks, same
from muse.errors import RunError, of_all_ranks
from muse.files import sync, write_atomically

STATE = "state.pt"
HASHES = "hashes.json"
FOLDERS = "step_*"
BEST = "best"

# torch.distributed.checkpoint warns of a single process that it was told about, also from its own threads.
warnings.filterwarnings("ignore", "torch.distributed is disabled")


@dataclass
class TrainingState:
    """What the next step depends on beside the tensors of model and optimiser.

    The position in the data is a function of the step.

    Attributes:
        step: finished optimiser steps.
        scaler: state of the loss scaler, empty without one.
        random: of each rank, states of its random generators.
        best_loss: lowest validation loss so far.
        wandb_id: id of the W&B run.
        best: whether the model had that loss when it was saved.
    """

    step: int
    scaler: dict[str, Any]
    random: list[dict[str, Any]]
    best_loss: float
    wandb_id: str | None
    best: bool = False


def random_state() -> dict[str, Any]:
    """States of the random generators of Python, NumPy and PyTorch in this process."""
    name, keys, *position = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *position),
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the random generators of this process to states from ``random_state``."""
    random.setstate(state["python"])
    name, keys, *position = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *position))
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@dataclass
class _Pending:
    """A checkpoint whose tensors are being written; ``best_loss`` is that of the best one."""

    written: Future[Any]
    temporary: Path
    step: int
    best_loss: float | None


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
            best: whether the model is the best so far, and ``state.best_loss`` its loss.

        Raises:
            RunError: when the disk is full or cannot be written; earlier checkpoints are untouched.
        """
        self.finish()
        name = f"step_{state.step:08d}"
        best_loss = state.best_loss if best else None
        temporary = self.folder / f".{name}.tmp"
        randoms = gathered(random_state())
        exists = same((self.folder / name).exists())

        def start() -> None:
            if rank() == 0 and not exists:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                # Written to a file torch.save does not say that a disk is full.
                buffer = io.BytesIO()
                torch.save({**vars(state), "random": randoms, "best": best}, buffer)
                (temporary / STATE).write_bytes(buffer.getvalue())
                sync(temporary / STATE)

        self._together(state.step, start)
        if exists:
            self._together(state.step, lambda: self._counts(name, best_loss) if rank() == 0 else None)
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
            self._pending = _Pending(saving, temporary, state.step, best_loss)

        self._together(state.step, write)
        if self._pending is None:
            self._pending = _Pending(written, temporary, state.step, best_loss)
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
                    own[path.name] = _digest(path)

        self._together(pending.step, hash_files)
        hashes = {file: digest for part in gathered(own) for file, digest in part.items()}

        def count() -> None:
            if rank() != 0:
                return
            (pending.temporary / HASHES).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
            for path in (pending.temporary / HASHES, pending.temporary):
                sync(path)
            os.rename(pending.temporary, self.folder / name)
            sync(self.folder)
            self._counts(name, pending.best_loss)

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

    def _counts(self, name: str, best_loss: float | None) -> None:
        if best_loss is not None:
            write_atomically(self.folder / BEST, f"{name} {best_loss!r}")
        for old in _newest_first(self.folder)[2:]:
            if old.name != _best(self.folder)[0]:
                shutil.rmtree(old, ignore_errors=True)

    def _together(self, step: int, act: Callable[[], None]) -> None:
        """Do a part of the writing; where it fails on one rank, it fails on all."""
        reason = None
        try:
            act()
        # CheckpointException is no Exception.
        except (OSError, RuntimeError, CheckpointException) as error:
            reason = _cause(error)
        reason = next((found for found in gathered(reason) if found is not None), None)
        if reason is not None:
            if rank() == 0:
                shutil.rmtree(self.folder / f".step_{step:08d}.tmp", ignore_errors=True)
            raise of_all_ranks(
                f"the checkpoint of step {step} could not be written to {self.folder}: {reason}; "
                "earlier checkpoints are kept; free space and use resume=auto, or resume="
                f"{self.folder.parent} and output_root=<folder> on another disk"
            )


def _cause(error: BaseException | None) -> str:
    """What went wrong below what torch.distributed.checkpoint says of it."""
    first: BaseException | None = None
    while error is not None:
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
            continue
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return "no space is left on the disk"
        first = first or error
        error = error.__cause__ or error.__context__
    text = " ".join(str(first).split())[:300]
    # PyTorch's writer of tensors hides the error of the system.
    if "unexpected pos" in text:
        return "a file ended early, because no space is left on the disk or by a limit (File too large)"
    return text or type(first).__name__


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob(FOLDERS), reverse=True)


def _best(folder: Path) -> tuple[str | None, float]:
    """Name and loss of the best checkpoint; the loss is infinite where it is not known."""
    try:
        name, *loss = (folder / BEST).read_text(encoding="utf-8").split()
        return name, float(loss[0]) if loss else math.inf
    except (OSError, ValueError):
        return None, math.inf


def find_checkpoint(run: Path, which: str = "last") -> Path | None:
    """The last or best checkpoint of a run folder; None if there is none."""
    folder = run / "checkpoints"
    if which == "last":
        return next(iter(_newest_first(folder)), None)
    name, _ = _best(folder)
    return folder / name if name and (folder / name).is_dir() else None


def find_sound_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run folder whose files are what was written; None if there is none at all.

    Warns of each that is damaged.

    Raises:
        RunError: all are.
    """
    candidates = _newest_first(run / "checkpoints")
    for path in candidates:
        damage = find_damage(path)
        if damage is None:
            return path
        warnings.warn(f"the checkpoint {path} is damaged: {damage}; it is left out", stacklevel=2)
    if candidates:
        raise RunError(f"every checkpoint of {run} is damaged; resume=never starts afresh")
    return None


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, None where each has the hash that was written with it."""
    try:
        hashes = json.loads((checkpoint / HASHES).read_text(encoding="utf-8"))
        for name, digest in hashes.items():
            if _digest(checkpoint / name) != digest:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"{HASHES} or a file that it names cannot be read ({error})"
    return None


def adopt_checkpoints(previous: Path, checkpoint: Path, run: Path, same_evaluation: bool = True) -> None:
    """Give ``run``, which continues ``checkpoint`` of ``previous``, that one, the one before and the best.

    Files are linked where the file system can, since checkpoints are never rewritten. So what damages the
    continued one damages it in both runs, and the one before is what is left.

    Args:
        previous: folder of the run that is continued.
        checkpoint: of that run.
        run: folder of the run that continues it.
        same_evaluation: whether the losses of ``run`` can be compared with that of the best checkpoint.

    Warns of a best one that is damaged, and leaves it out.
    """

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    def adopt(path: Path) -> None:
        if not (folder / path.name).exists():
            temporary = folder / f".{path.name}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(path, temporary, copy_function=link)
            os.rename(temporary, folder / path.name)

    folder = run / "checkpoints"
    # A process may have ended when its best checkpoint was complete, but not yet called so.
    state = load_state(checkpoint)
    best = checkpoint if state.best else find_checkpoint(previous, "best")
    # The best one first: a run that can be continued must not lack it.
    if best is not None and best.name <= checkpoint.name:
        # The continued one was found sound.
        damage = find_damage(best) if best.name < checkpoint.name else None
        if damage is None:
            adopt(best)
            loss = f" {state.best_loss!r}" if same_evaluation and math.isfinite(state.best_loss) else ""
            write_atomically(folder / BEST, best.name + loss)
        else:
            warnings.warn(
                f"the best checkpoint {best} is damaged: {damage}; the run goes on without it", stacklevel=2
            )
    before = next(
        (path for path in _newest_first(previous / "checkpoints") if path.name < checkpoint.name), None
    )
    if before is not None:
        adopt(before)
    adopt(checkpoint)


def load_tensors(checkpoint: Path, tensors: dict[str, Any]) -> None:
    """Load the tensors of a checkpoint into those of ``tensors``, in place, whatever their dtype.

    Args:
        checkpoint: folder.
        tensors: state dicts as given to ``CheckpointWriter.save``, or some of them.

    Raises:
        RunError: on every rank, when the files are damaged, cannot be read, or hold other tensors.
    """
    damage = first_rank_does(lambda: find_damage(checkpoint))
    if damage is not None:
        raise of_all_ranks(f"the checkpoint {checkpoint} cannot be read, it is damaged: {damage}")
    try:
        groups = tuple(f"{group}." for group in tensors)
        stored = {name: kept for name, kept in stored_tensors(checkpoint).items() if name.startswith(groups)}
        wanted = {name: tensor.shape for name, tensor in _flat(tensors)}
        differing = [
            name
            for name in (*stored, *wanted)
            if name not in stored or name not in wanted or stored[name][0] != wanted[name]
        ]
        if not differing:
            dcp.load(tensors, checkpoint_id=checkpoint, no_dist=ranks() == 1)
    # CheckpointException is no Exception.
    except (OSError, RuntimeError, ValueError, CheckpointException) as error:
        raise of_all_ranks(f"the checkpoint {checkpoint} cannot be read: {_cause(error)}") from error
    if differing:
        raise _of_another_model(checkpoint, f"{differing[0]} is not in both, or not of one size")


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of nested state dicts under the names that torch.distributed.checkpoint gives them."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _of_another_model(checkpoint: Path, reason: str) -> RunError:
    return of_all_ranks(
        f"the checkpoint {checkpoint} is of another model; give the stage and model options it was trained "
        f"with ({' '.join(reason.split())[:300]})"
    )


def stored_tensors(checkpoint: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Names, sizes and dtypes of the tensors in a checkpoint, as ``group.name``."""
    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {
        name: (kept.size, kept.properties.dtype)
        for name, kept in stored.items()
        if isinstance(kept, TensorStorageMetadata)
    }


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint into ``model``, in the model's own dtype and device.

    Args:
        checkpoint: its folder, or a safetensors file that ``muse.export`` wrote.
        model: of the same options.

    Raises:
        RunError: when the files are damaged, or belong to another model.
    """
    if checkpoint.suffix == ".safetensors":
        try:
            weights = load_file(checkpoint)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{checkpoint} cannot be read, it is damaged: {error}") from error
    else:
        weights = model.state_dict()
        load_tensors(checkpoint, {"model": weights})
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise _of_another_model(checkpoint, str(error)) from error


def load_state(checkpoint: Path) -> TrainingState:
    """Read the training state of a checkpoint onto the CPU.

    At the end of a run its best loss is found after the last checkpoint, which is left as it is. It stands
    beside it, for a run that goes on from there.

    Raises:
        RunError: when the file is missing or corrupted.
    """
    try:
        state = TrainingState(**torch.load(checkpoint / STATE, map_location="cpu", weights_only=True))
    # Damaged bytes make torch.load raise nearly anything: UnicodeDecodeError, KeyError, struct.error.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise of_all_ranks(f"the checkpoint {checkpoint} cannot be read, it is damaged: {reason}") from error
    best, loss = _best(checkpoint.parent)
    if best is not None and best <= checkpoint.name:
        state.best_loss = min(state.best_loss, loss)
    return state
