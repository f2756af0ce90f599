"""Token files that are written part by part, and go on where they were interrupted."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from muse.data.cache import remove_stale, write_errors
from muse.data.corpus import count_words
from muse.data.files import Documents
from muse.data.tokenizer import Tokenizer, progress_lines
from muse.files import claimed, fsync, read_json, write_json

log = logging.getLogger(__name__)

# Characters of documents that are in memory at once, and then on the disk for good.
PART_CHARACTERS = 1 << 22


@dataclass
class Written:
    """What is in a token file.

    Attributes:
        documents: whole ones.
        tokens: their tokens, end tokens included.
        words: words between white space plus one end of line a line.
        bytes: bytes of their text in UTF-8.
        skipped: broken rows and rests of files that are not in it.
        first_skipped: what was wrong with the first of these.
    """

    documents: int = 0
    tokens: int = 0
    words: int = 0
    bytes: int = 0
    skipped: int = 0
    first_skipped: str = ""


def written(path: Path) -> Written | None:
    """What the token file ``path`` holds, as ``build`` has told it; None where that is not known."""
    try:
        told = Written(**read_json(_told(path)))
    except (OSError, ValueError, TypeError):
        return None
    return told if told.documents else None


@contextmanager
def building(path: Path) -> Iterator[None]:
    """Hold the right to build ``path``, once those processes are done that build it now."""
    with write_errors(path.parent):
        remove_stale(path.parent)
        lock = path.with_name(f".{path.name}.lock")
        with claimed(lock, wait=True):
            yield
            # Who waits for it finds the token file.
            lock.unlink(missing_ok=True)


def build(path: Path, documents: Documents, tokenizer: Tokenizer, dtype: np.dtype, name: str) -> Written:
    """Write the tokens of documents, followed by the SHA-256 of their bytes, within ``building``.

    The file appears when it is whole. Until then its tokens are in another one, to which parts of
    ``PART_CHARACTERS`` are added; what an interrupted call left there is kept for a day.

    Args:
        path: the file.
        documents: what is tokenised.
        tokenizer: by which.
        dtype: of the tokens in the file.
        name: of the split, for the lines that tell how far it is.

    Returns:
        What is in the file, which is not there if that is nothing.

    Raises:
        ConfigError: documents are broken, or the folder cannot be written.
    """
    journal, partial = (path.with_name(f".{path.name}.{kind}.tmp") for kind in ("journal", "partial"))
    done = _interrupted(journal, partial, dtype)
    if done.documents:
        log.info("the tokens of %d documents of the %s split are there; going on", done.documents, name)
    with open(partial, "r+b" if done.documents else "w+b") as file:
        file.truncate(done.tokens * dtype.itemsize)
        file.seek(0, os.SEEK_END)
        for part in _told_how_far(_parts(islice(documents, done.documents, None)), documents, name):
            for tokens in tokenizer.encode_pieces(part):
                file.write(tokens.astype(dtype).tobytes())
                done.tokens += len(tokens)
            done.documents += len(part)
            done.words += sum(map(count_words, part))
            done.bytes += sum(len(document.encode()) for document in part)
            file.flush()
            os.fsync(file.fileno())
            write_json(journal, asdict(done))
        done.skipped, done.first_skipped = documents.skipped, documents.first_skipped
        if not done.documents:
            partial.unlink()
            return done
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").digest()
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())
    write_json(_told(path), asdict(done))
    os.replace(partial, path)
    fsync(path.parent)
    journal.unlink(missing_ok=True)
    return done


def _told(path: Path) -> Path:
    return path.with_suffix(".json")


def _interrupted(journal: Path, partial: Path, dtype: np.dtype) -> Written:
    """How far an earlier call came for good."""
    try:
        done = Written(**read_json(journal))
        if partial.stat().st_size >= done.tokens * dtype.itemsize:
            return done
    except (OSError, ValueError, TypeError):
        pass
    return Written()


def _parts(documents: Iterable[str]) -> Iterator[list[str]]:
    part: list[str] = []
    characters = 0
    for document in documents:
        part.append(document)
        characters += len(document)
        if characters >= PART_CHARACTERS:
            yield part
            part, characters = [], 0
    if part:
        yield part


def _told_how_far(parts: Iterator[list[str]], documents: Documents, name: str) -> Iterator[list[str]]:
    """The same parts; how much of the files was read for them, and how long the rest will take, is shown."""
    begun = time.monotonic()
    first: int | None = None

    def line() -> str:
        new = documents.read - (first or 0)
        left = (documents.size - documents.read) * (time.monotonic() - begun) / new if first and new else None
        told = f"tokenising the {name} split: {documents.read / 1e6:,.1f} of {documents.size / 1e6:,.1f} MB"
        return told + (f", about {left:,.0f} s to go" if left is not None else "")

    with (
        tqdm(
            total=documents.size, desc=f"tokenising the {name} split", unit="B", unit_scale=True, disable=None
        ) as progress,
        progress_lines(line),
    ):
        for part in parts:
            if first is None:
                # Before it what is written was read again, which takes less time.
                begun, first = time.monotonic(), documents.read
            yield part
            progress.update(documents.read - progress.n)
