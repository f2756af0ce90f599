"""What a run leaves in its folder, and whether two of them are the same to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from muse.files import find_files
from muse.report.metrics import read_metrics
from muse.runs.checkpoints import load_state, load_tensors, stored_tensors


class CrashError(Exception):
    """Stands for the end of a process."""


def crash_at(step: int) -> Callable[[int], None]:
    """End a training after a step as if its process had ended."""
    return partial(_crash, step)


def _crash(step: int, reached: int) -> None:
    if reached == step:
        raise CrashError


def read_json(path: Path) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def run_folders(root: Path) -> list[Path]:
    """Folders of the runs below ``root``, the oldest first."""
    files = find_files(root, "run.json")
    return [path.parent for path in sorted(files, key=lambda path: path.stat().st_mtime_ns)]


def logged(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run without the speed, which is never the same twice."""
    return [{key: value for key, value in line.items() if "second" not in key} for line in read_metrics(run)]


def stored(checkpoint: Path, *groups: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, or of some of its groups, by their names in it."""
    tensors = {
        name: torch.empty(size, dtype=dtype)
        for name, (size, dtype) in stored_tensors(checkpoint).items()
        if not groups or name.startswith(tuple(f"{group}." for group in groups))
    }
    nested: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        nested.setdefault(group, {})[rest] = tensor
    load_tensors(checkpoint, nested)
    return tensors


def contents(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Everything in a checkpoint: its tensors and the rest of the state."""
    return stored(checkpoint), vars(load_state(checkpoint))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same(first: Any, second: Any) -> bool:
    """Equality to the last bit through dicts, lists and tensors."""
    if isinstance(first, torch.Tensor):
        alike = isinstance(second, torch.Tensor) and first.dtype == second.dtype
        return alike and first.shape == second.shape and torch.equal(bits(first), bits(second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def errors(text: str) -> list[str]:
    """The sentences in which a command says why it ends."""
    return [line for line in text.splitlines() if line.startswith("error: ")]
