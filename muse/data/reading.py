"""What of a file or folder is plain text, and why the rest is not."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

RECORDS = "records, not plain text"
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
PACKED = "compressed"
PACKED_SUFFIXES = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar", ".tar")
EMPTY = "no text"
OTHER_ENCODING = "no text in UTF-8"
# UTF-32's mark for little-endian machines begins with that of UTF-16, but then neither is UTF-8.
UTF_16 = "text in UTF-16, not in UTF-8"
MARKS_OF_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

REMEDIES = {
    RECORDS: "write the text of each record into a file of its own, or all into one",
    PACKED: "unpack it",
    UTF_16: "convert it, for example with iconv -f UTF-16 -t UTF-8",
}


class NotTextError(ValueError):
    """A file that is no plain text.

    Attributes:
        reason: what it is.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; {REMEDIES.get(reason, 'give plain text in UTF-8')}")
        self.reason = reason


@dataclass(frozen=True)
class FolderText:
    """The text of a folder.

    Attributes:
        texts: text by path relative to the folder, sorted by path.
        left_out: paths of the visible files that are no text, empty ones excepted, by what they are.
        bytes: size of the files that were read.
        record_bytes: size of the files left out that hold or may hold the records of a data set.
    """

    texts: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    bytes: int = 0
    record_bytes: int = 0


def read_text(path: Path) -> str:
    """The text of a file, without a byte-order mark and with line feeds as line ends.

    Raises:
        NotTextError: where it is empty, no text in UTF-8, or by its name records or compressed.
    """
    suffix = path.suffix.lower()
    if suffix in RECORD_SUFFIXES:
        raise NotTextError(RECORDS)
    if suffix in PACKED_SUFFIXES:
        raise NotTextError(PACKED)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise NotTextError(_unreadable(error)) from error
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise NotTextError(UTF_16 if content.startswith(MARKS_OF_UTF_16) else OTHER_ENCODING) from error
    if "\0" in text:
        raise NotTextError(OTHER_ENCODING)
    if not text.strip():
        raise NotTextError(EMPTY)
    return text


def read_folder(root: Path, excluded: Iterable[str] = (), suffixes: tuple[str, ...] = ("",)) -> FolderText:
    """The text of each visible file below ``root``, but for folders named in ``excluded``."""
    paths = []
    unread: list[OSError] = []
    for folder, folders, names in os.walk(root, onerror=unread.append):
        folders[:] = [name for name in folders if name not in excluded and not name.startswith(".")]
        paths += [Path(folder, name) for name in names if visible(name) and name.endswith(suffixes)]
    texts: dict[str, str] = {}
    left_out: dict[str, list[str]] = {}
    for error in unread:
        left_out.setdefault(_unreadable(error), []).append(Path(error.filename).relative_to(root).as_posix())
    read = records = 0
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths if path.is_file()):
        try:
            texts[name] = read_text(path)
            read += path.stat().st_size
        except NotTextError as error:
            if error.reason != EMPTY:
                left_out.setdefault(error.reason, []).append(name)
            if error.reason in (RECORDS, PACKED):
                records += path.stat().st_size
    return FolderText(texts, left_out, read, records)


def _unreadable(error: OSError) -> str:
    return f"not readable ({error.strerror})"


def visible(name: str) -> bool:
    """Whether a file or folder is not hidden."""
    return not name.startswith(".")
