"""Files that are replaced whole or not at all, and disks that are full."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from muse.errors import RunError

# A disk, a user's share of it, or a limit on files is used up.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_full_as_run_error(folder: Path | str) -> Iterator[None]:
    """Around what writes below ``folder``, or what is called so.

    Raises:
        RunError: naming the file, when the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise RunError(
            f"no space is left for {error.filename or folder} ({error.strerror}); free some, or write to "
            "another disk with output_root=<folder>"
        ) from error


@contextmanager
def disk_full_names(path: Path) -> Iterator[None]:
    """Let the error of a full disk name the file ``path``; by itself a write does not say where it was."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            error.filename = str(path)
        raise


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` that takes its name, for good, when the block ends without an error.

    Several processes may replace the same file at once; the last one to finish wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with disk_full_names(path):
            yield temporary
            os.replace(temporary, path)
            fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def claimed(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone holds the file ``path`` within the block; False where another one does.

    What a process held is free when it ends, however it ends. With ``wait`` that is waited for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def fsync(path: Path) -> None:
    """Have what is written of a file, or the names in a folder, outlive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace the file at ``path`` by ``text``; a reader sees the old text or the new, never a part."""
    with replacement(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def find_files(root: Path, name: str) -> list[Path]:
    """All files called ``name`` below ``root``; folders that vanish meanwhile are left out."""
    # Path.glob raises where a folder vanishes between its listing and its reading.
    return [Path(folder) / name for folder, _, names in os.walk(root) if name in names]


def write_json(path: Path, value: Any) -> None:
    """Replace the file at ``path`` by ``value`` as JSON; infinities and NaN become null, as JSON has none."""
    write_atomically(path, json.dumps(finite(value), indent=2) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds; an empty dict where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def finite(value: Any) -> Any:
    """``value`` with None in place of infinities and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
