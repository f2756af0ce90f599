"""Checkpoints: a folder with the weights as safetensors and the rest of the state, written atomically.

``checkpoints/step_00000200/`` appears only when it is complete; ``checkpoints/last`` and
``checkpoints/best`` are one-line files that name a folder and are replaced, never rewritten.
"""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from muse.errors import RunError
from muse.files import write_atomically

WEIGHTS = "model.safetensors"
STATE = "state.pt"


@dataclass
class TrainingState:
    """Everything beside the weights that the next step depends on.

    Attributes:
        step: finished optimiser steps.
        optimizers: their state dicts.
        scaler: state of the loss scaler, empty without one.
        random: states of PyTorch's generators.
        best_loss: lowest validation loss so far.
        wandb_id: id of the W&B run.
    """

    step: int
    optimizers: list[dict[str, Any]]
    scaler: dict[str, Any]
    random: dict[str, Tensor]
    best_loss: float
    wandb_id: str | None


def random_state() -> dict[str, Tensor]:
    """States of PyTorch's random generators, which dropout and sampling draw from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Tensor]) -> None:
    """Set PyTorch's random generators to states from ``random_state``."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(folder: Path, model: nn.Module, state: TrainingState, best: bool) -> Path:
    """Write a checkpoint, make it the last (and, if ``best``, the best) one, drop those of no use.

    A checkpoint of this step that is there already is left as it is: a step has one state.

    Raises:
        RunError: when the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    name = f"step_{state.step:08d}"
    target = folder / name
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    try:
        if not target.exists():
            temporary.mkdir(parents=True)
            weights = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
            save_file(weights, temporary / WEIGHTS)
            torch.save(vars(state), temporary / STATE)
            for path in (temporary / WEIGHTS, temporary / STATE, temporary):
                _sync(path)
            os.rename(temporary, target)
        write_atomically(folder / "last", name)
        if best:
            write_atomically(folder / "best", name)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        why = "no space is left on the disk" if full or "No space left" in str(error) else str(error)
        raise RunError(
            f"the checkpoint of step {state.step} could not be written to {folder}: {why}; "
            "earlier checkpoints are kept, free space or set output_root=<folder> and use resume=auto"
        ) from error
    kept = {read_pointer(folder, "last"), read_pointer(folder, "best")}
    for old in folder.glob("step_*"):
        if old.name not in kept:
            shutil.rmtree(old, ignore_errors=True)
    return target


def read_pointer(folder: Path, which: str) -> str | None:
    """Name of the folder that ``last`` or ``best`` points at."""
    try:
        return (folder / which).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def find_checkpoint(run: Path, which: str = "last") -> Path | None:
    """The last or best checkpoint of a run folder; None if there is none."""
    name = read_pointer(run / "checkpoints", which)
    path = run / "checkpoints" / name if name else None
    return path if path is not None and path.is_dir() else None


def adopt_checkpoints(previous: Path, run: Path) -> None:
    """Give ``run``, which continues ``previous``, the last and best checkpoints of that folder.

    Files are linked where the file system can, since checkpoints are never rewritten.
    """

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    for which in ("last", "best"):
        checkpoint = find_checkpoint(previous, which)
        if checkpoint is not None:
            target = run / "checkpoints" / checkpoint.name
            if not target.exists():
                shutil.copytree(checkpoint, target, copy_function=link)
            write_atomically(run / "checkpoints" / which, checkpoint.name)


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint into ``model``, in the model's own dtype and device.

    Raises:
        RunError: when the file is missing or corrupted, or belongs to another model.
    """
    try:
        weights = load_file(checkpoint / WEIGHTS, device="cpu")
    except (OSError, SafetensorError) as error:
        raise RunError(f"the checkpoint {checkpoint} cannot be read, it is damaged: {error}") from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"the checkpoint {checkpoint} is of another model; give the stage and model options it was "
            f"trained with ({reason})"
        ) from error


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
        raise RunError(f"the checkpoint {checkpoint} cannot be read, it is damaged: {reason}") from error
