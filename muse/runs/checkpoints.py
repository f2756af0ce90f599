"""Checkpoints of a run: found, seen to be sound, read, and adopted by the run that goes on.

``checkpoints/step_00000200/`` appears only when it is complete, with the SHA-256 of every file in it;
``checkpoints/best`` is a one-line file that names a folder and is replaced, never rewritten. Folders are
written by torch.distributed.checkpoint (training/checkpoint.py) and load on any number of ranks.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from muse.errors import RunError, of_all_ranks
from muse.files import write_atomically
from muse.processes.ranks import on_first_rank, ranks
from muse.runs.folder import CHECKPOINTS, run_of
from muse.runs.options import flattened

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
        best_loss: lowest validation loss so far, of the evaluations along the way.
        wandb_id: id of the W&B run.
        best: whether the model had that loss when it was saved.
        best_measure: what ``best_loss`` was measured on, as the trainer describes it; None: not known.
        stale: evaluations since the one with ``best_loss``.
        unlogged: loss, gradient norm and reconstruction error (None: none was compared) of each step since
            the last line of metrics.
        selected: what a selection found in each of them, as ``TakenStep.selected`` has it.
    """

    step: int
    scaler: dict[str, Any]
    random: list[dict[str, Any]]
    best_loss: float
    wandb_id: str | None
    best: bool = False
    best_measure: tuple[int, int, int] | None = None
    stale: int = 0
    unlogged: list[tuple[float, float, float | None]] = field(default_factory=list)
    selected: list[tuple[float, float, float]] = field(default_factory=list)


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder of checkpoints."""
    return sorted(folder.glob(FOLDERS), reverse=True)


def best_name(folder: Path) -> str | None:
    """Name of the best of them; None where none is called so."""
    try:
        return (folder / BEST).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def find_checkpoint(run: Path, which: str = "last") -> Path | None:
    """The last or best checkpoint of a run folder; None if there is none."""
    folder = run / CHECKPOINTS
    if which == "last":
        return next(iter(newest_first(folder)), None)
    name = best_name(folder)
    return folder / name if name and (folder / name).is_dir() else None


def find_weights(place: Path, which: str = "best") -> Path | None:
    """What holds the weights of a run, one of its checkpoints or an exported file; None if nothing does.

    Args:
        place: folder of a run, a checkpoint in it, or a safetensors file.
        which: checkpoint of a run, ``best`` or ``last``; a run without a best one has a last one.
    """
    if place.suffix == ".safetensors" or run_of(place) != place:
        return place
    return find_checkpoint(place, which) or find_checkpoint(place)


def finished_steps(weights: Path) -> int:
    """Steps that a checkpoint, or an exported file, has been trained for; both are sound."""
    if weights.suffix != ".safetensors":
        return load_state(weights).step
    with safe_open(weights, "pt") as opened:
        return int((opened.metadata() or {}).get("step", 0))


def find_sound_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run folder whose files are what was written; None if there is none at all.

    Warns of each that is damaged.

    Raises:
        RunError: all are.
    """
    candidates = newest_first(run / CHECKPOINTS)
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
            if file_hash(checkpoint / name) != digest:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"{HASHES} or a file that it names cannot be read ({error})"
    return None


def adopt_checkpoints(previous: Path, checkpoint: Path, run: Path, is_best: bool) -> None:
    """Give ``run``, which continues ``checkpoint`` of ``previous``, that one, the one before and the best.

    Files are linked where the file system can, since checkpoints are never rewritten. So what damages the
    continued one damages it in both runs, and the one before is what is left.

    Args:
        previous: folder of the run that is continued.
        checkpoint: one of its checkpoints.
        run: folder of the run that continues it.
        is_best: whether the checkpoint is the best one, as its state says.

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

    folder = run / CHECKPOINTS
    # A process may have ended when its best checkpoint was complete, but not yet called so.
    best = checkpoint if is_best else find_checkpoint(previous, "best")
    # The best one first: a run that can be continued must not lack it.
    if best is not None and best.name <= checkpoint.name:
        # The continued one was found sound.
        damage = find_damage(best) if best.name < checkpoint.name else None
        if damage is None:
            adopt(best)
            write_atomically(folder / BEST, best.name)
        else:
            warnings.warn(
                f"the best checkpoint {best} is damaged: {damage}; the run goes on without it", stacklevel=2
            )
    before = next(
        (path for path in newest_first(previous / CHECKPOINTS) if path.name < checkpoint.name), None
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
    damage = on_first_rank(lambda: find_damage(checkpoint))
    if damage is not None:
        raise of_all_ranks(f"the checkpoint {checkpoint} cannot be read, it is damaged: {damage}")
    try:
        groups = tuple(f"{group}." for group in tensors)
        stored = {name: kept for name, kept in stored_tensors(checkpoint).items() if name.startswith(groups)}
        # Under the names that torch.distributed.checkpoint gives them.
        wanted = {name: tensor.shape for name, tensor in flattened(tensors).items()}
        differing = [
            name
            for name in (*stored, *wanted)
            if name not in stored or name not in wanted or stored[name][0] != wanted[name]
        ]
        if not differing:
            dcp.load(tensors, checkpoint_id=checkpoint, no_dist=ranks() == 1)
    # CheckpointException is no Exception.
    except (OSError, RuntimeError, ValueError, CheckpointException) as error:
        raise of_all_ranks(f"the checkpoint {checkpoint} cannot be read: {cause_of(error)}") from error
    if differing:
        raise _of_another_model(checkpoint, f"{differing[0]} is not in both, or not of one size")


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


def stored_vocabulary(checkpoint: Path) -> int | None:
    """Entries of the vocabulary that weights are for; None where that cannot be read.

    Args:
        checkpoint: its folder, or a file that ``muse.export`` wrote.
    """
    try:
        if checkpoint.suffix == ".safetensors":
            with safe_open(checkpoint, "pt") as opened:
                return int(opened.get_slice("embedding.weight").get_shape()[0])
        return int(stored_tensors(checkpoint)["model.embedding.weight"][0][0])
    # Whoever loads the weights says what is wrong with them. Damaged bytes raise nearly anything, and
    # CheckpointException is no Exception.
    except (Exception, CheckpointException):  # noqa: BLE001
        return None


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

    Raises:
        RunError: when the file is missing or corrupted.
    """
    try:
        return TrainingState(**torch.load(checkpoint / STATE, map_location="cpu", weights_only=True))
    # Damaged bytes make torch.load raise nearly anything: UnicodeDecodeError, KeyError, struct.error.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise of_all_ranks(f"the checkpoint {checkpoint} cannot be read, it is damaged: {reason}") from error


def cause_of(error: BaseException | None) -> str:
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
