"""Files that appear in the cache folder whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from muse.errors import ConfigError
from muse.files import replacement

STALE_SECONDS = 24 * 3600


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a replacement of ``path``; those that killed processes left are removed after a day.

    Raises:
        ConfigError: naming ``data.cache``, when the folder cannot be written or the disk is full.
    """
    with write_errors(path.parent):
        remove_stale(path.parent)
        with replacement(path) as temporary, open(temporary, "xb") as file:
            yield file


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Around what writes to the cache ``folder``.

    Raises:
        ConfigError: naming ``data.cache``, when the folder cannot be written or the disk is full.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"data.cache={folder} cannot be written ({error.strerror or error}); "
            "free some space there or choose another folder"
        ) from error


def remove_stale(folder: Path) -> None:
    """Remove what killed processes left unfinished in a folder a day ago."""
    for temporary in folder.glob("*.tmp"):
        # Another process may be writing a younger one, or be removing this one.
        with suppress(OSError):
            if time.time() - temporary.stat().st_mtime > STALE_SECONDS:
                temporary.unlink()
