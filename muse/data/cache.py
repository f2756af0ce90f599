"""Files that appear in the cache folder whole or not at all."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from muse.errors import ConfigError

STALE_SECONDS = 24 * 3600


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path`` that takes its name when the block ends without an error.

    Several processes may write the same path at once; the last one to finish wins. Temporary files
    that killed processes left behind are removed when they are a day old.

    Raises:
        ConfigError: naming ``data.cache``, when the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent)
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(
            f"data.cache={path.parent} cannot be written ({error.strerror or error}); "
            "free some space there or choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _remove_stale(folder: Path) -> None:
    for temporary in folder.glob("*.tmp"):
        # Another process may be writing a younger one, or be removing this one.
        with suppress(OSError):
            if time.time() - temporary.stat().st_mtime > STALE_SECONDS:
                temporary.unlink()
