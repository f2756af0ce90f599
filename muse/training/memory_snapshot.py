"""What holds the memory of a training step: the allocator's history on CUDA, the peak by kind on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from muse.files import write_json
from muse.measure.peak_memory import peak_memory
from muse.models import LanguageModel
from muse.runs.folder import MEMORY_FILE
from muse.training.optim import ModelOptimizer

CUDA_FILE = "memory_snapshot.pickle"
# MemTracker's kinds: it sees who makes a tensor, and the optimiser's state is handed to it.
KINDS = {
    "Parameter": "parameters",
    "Buffer": "buffers",
    "Gradient": "gradients",
    "Other": "optimiser state",
    "Activation": "activations and other tensors of the step",
    "Temp": "temporaries of the backward pass",
    "Optstate": "temporaries of the optimiser",
}


def memory_file(device: torch.device) -> str:
    """Name of the file that ``memory_snapshot`` writes for a device."""
    return CUDA_FILE if device.type == "cuda" else MEMORY_FILE


@contextmanager
def memory_snapshot(
    run: Path, model: LanguageModel, optimizer: ModelOptimizer, device: torch.device
) -> Iterator[None]:
    """Record the memory of the training step that runs inside, also of one that fails, below ``run``.

    On CUDA ``memory_snapshot.pickle`` holds every allocation with its stack, for
    https://docs.pytorch.org/memory_viz. On a CPU ``memory.json`` holds the bytes of all tensors by kind
    when the step began and at its peak, counted by MemTracker; the step's numbers stay the same.
    """
    path = run / memory_file(device)
    temporary = path.with_name(f".{path.name}.tmp")
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(stacks="python")
        try:
            yield
        finally:
            try:
                torch.cuda.memory._dump_snapshot(str(temporary))
                os.replace(temporary, path)
            finally:
                torch.cuda.memory._record_memory_history(enabled=None)
        return
    with peak_memory(device, model, optimizer.state_tensors()) as meter:
        begun = meter.kinds("current")
        try:
            yield
        finally:
            told = {"start of the step": begun, "peak": meter.kinds("peak")}
            write_json(path, {"unit": "bytes", **{when: _named(kinds) for when, kinds in told.items()}})


def _named(kinds: dict[str, int]) -> dict[str, int]:
    return {**{KINDS[kind]: size for kind, size in kinds.items()}, "total": sum(kinds.values())}
