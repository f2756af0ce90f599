"""The corpus of ``data=files``: which files are which split, and their documents, never all in memory."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from muse.config import DataConfig
from muse.data.corpus import log_left_out
from muse.data.documents import LONGEST_TEXT, RECORDS, Broken, Row, is_text, rows_of, suffixes
from muse.data.reading import OTHER_ENCODING, visible
from muse.data.splits import FULL_NAMES, HELD_OUT, SPLITS, position, splits_by_name
from muse.errors import ConfigError

log = logging.getLogger(__name__)

# Characters that a tokenizer is trained on, at most.
SAMPLE_CHARACTERS = 1 << 25
# What the documents of a file depend on beside it.
RULES = f"files 1 {LONGEST_TEXT} {SAMPLE_CHARACTERS} {HELD_OUT}"

REPAIR = "repair it, or leave out what is broken with data.skip_bad=true"
ARCHIVES = (".tar", ".tgz", ".zip", ".7z", ".rar")
ARCHIVE = "an archive of several files, which must be unpacked"
BESIDE_RECORDS = "plain text beside more bytes of records"
BESIDE_TEXT = "records beside more bytes of plain text"


@dataclass
class Documents:
    """The documents of files, read anew by each loop over them.

    Attributes:
        files: in their order.
        source: what messages call them.
        column: of records, which holds the text; None to look for it.
        skip_bad: whether what is broken is counted in place of an error.
        share: which documents are among them, as an interval of the positions of their texts, half open.
        characters: most that are taken, from the beginning of each file in proportion to its size.
        read: bytes of the files that the present loop has read.
        skipped: rows and rests of files that it has left out.
        first_skipped: what is wrong with the first of these; empty if there is none.
    """

    files: tuple[Path, ...]
    source: str
    column: str | None = None
    skip_bad: bool = False
    share: tuple[float, float] = (0.0, 1.0)
    characters: int | None = None
    read: int = field(default=0, init=False)
    skipped: int = field(default=0, init=False)
    first_skipped: str = field(default="", init=False)

    @cached_property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(map(_size, self.files))

    def __iter__(self) -> Iterator[str]:
        """The documents that hold more than white space.

        Raises:
            ConfigError: a row or file is broken and ``skip_bad`` is false; names both.
        """
        self.read, self.skipped, self.first_skipped = 0, 0, ""
        for path in self.files:
            begin, size, taken = self.read, _size(path), 0
            most = None if self.characters is None else self.characters * size / max(1, self.size)
            for row, item, place in self._rows(path):
                self.read = begin + place
                if isinstance(item, Broken):
                    self._leave_out(path, row, item)
                elif item.strip() and self._has(item):
                    taken += len(item)
                    yield item
                    if most is not None and taken >= most:
                        break
            self.read = begin + size

    def _rows(self, path: Path) -> Iterator[tuple[*Row, int]]:
        """The rows of a file, and how many of its bytes are read."""
        try:
            raw = open(path, "rb")  # noqa: SIM115
        except OSError as error:
            yield 1, Broken(f"it cannot be read ({error.strerror})"), 0
            return
        with raw:
            for row, item in rows_of(raw, path, self.column):
                # Some readers close a file at its end.
                yield row, item, 0 if raw.closed else raw.tell()

    def _has(self, text: str) -> bool:
        return self.share == (0.0, 1.0) or self.share[0] <= position(text) < self.share[1]

    def _leave_out(self, path: Path, row: int, broken: Broken) -> None:
        told = f"{self.source}: {path.name}, row {row}: {broken.reason}"
        if not self.skip_bad:
            raise ConfigError(f"{told}; {REPAIR}")
        self.skipped += 1
        self.first_skipped = self.first_skipped or told


@dataclass(frozen=True)
class FileCorpus:
    """The documents of each split.

    Attributes:
        splits: by name.
    """

    splits: Mapping[str, Documents]

    def split(self, name: str) -> Documents:
        """The documents of ``train``, ``valid`` or ``test``."""
        return self.splits[name]

    def sample(self, characters: int | None = None) -> Documents:
        """What a tokenizer is trained on: the beginning of each training file."""
        train, characters = self.splits["train"], characters or SAMPLE_CHARACTERS
        return Documents(train.files, train.source, train.column, train.skip_bad, train.share, characters)

    @cached_property
    def _contents(self) -> dict[Path, str]:
        """SHA-256 of each file."""
        paths = {path for documents in self.splits.values() for path in documents.files}
        return {path: _sha256(path) for path in paths}

    def digest(self, name: str) -> str:
        """SHA-256 (hexadecimal) of all that a split's documents depend on but where files are."""
        documents = self.splits[name]
        state = [RULES, repr(documents.column), repr(documents.share)]
        state += [f"{suffixes(path)} {self._contents[path]}" for path in documents.files]
        return hashlib.sha256("\n".join(state).encode()).hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        # Reading it tells of it, too, and whether that matters.
        return f"unreadable {error.errno}"


def find_corpus(config: DataConfig) -> FileCorpus:
    """Which files ``data.path``, ``data.valid`` and ``data.test`` name; none is read but for its beginning.

    Files and folders of ``data.path`` that are named after splits are these (muse/data/splits.py); where
    there are none, all is training text. A split that is named nowhere is held out of the training text, by
    a hash of each document. What is left out is logged.

    Raises:
        ConfigError: a path leads nowhere or to nothing that can be read, or names contradict each other.
    """
    source = f"data.path={config.path}"
    given = {"valid": config.valid, "test": config.test}
    sources = {split: f"data.{split}={path}" for split, path in given.items() if path}
    found = {split: _matches(path, sources[split]) for split, path in given.items() if path}
    taken = {path.resolve() for paths in found.values() for path in paths}
    paths = _matches(config.path or "", source)
    if len(paths) == 1 and paths[0].is_dir():
        paths = sorted(path for path in paths[0].iterdir() if visible(path.name))
    paths = [path for path in paths if path.resolve() not in taken]
    named = splits_by_name(paths, source) if len(paths) > 1 else {}
    if named:
        beside = [path.name for path in paths if not any(path in parts for parts in named.values())]
        log_left_out(source, {"beside the splits": beside} if beside else {})
    found = {**(named or {"train": paths}), **found}
    files = {split: _readable(found[split], sources.get(split, source)) for split in SPLITS if split in found}
    missing = [split for split in SPLITS if split not in files]
    if missing:
        log.info(
            "%s names no %s split: %d %% of the documents for each, by a hash of their text",
            *(source, " and no ".join(FULL_NAMES[split] for split in missing), HELD_OUT),
        )
    # The last parts of the positions, in the order of the splits.
    edges = [(100 - HELD_OUT * left) / 100 for left in range(len(missing), -1, -1)]
    shares = {"train": (0.0, edges[0])}
    shares |= {split: (edges[index], edges[index + 1]) for index, split in enumerate(missing)}
    return FileCorpus(
        {
            split: Documents(
                files=files.get(split, files["train"]),
                source=sources.get(split, source),
                column=config.column,
                skip_bad=config.skip_bad,
                share=shares.get(split, (0.0, 1.0)),
            )
            for split in SPLITS
        }
    )


def _matches(path: str, source: str) -> list[Path]:
    """The file or folder at a path, or those that it matches as a pattern."""
    place = Path(path).expanduser()
    if path and place.exists():
        return [place]
    matched = [Path(match) for match in sorted(glob.glob(str(place), recursive=True))] if path else []
    if not matched:
        raise ConfigError(
            f"{source} does not exist; give a file, a folder or a pattern such as 'texts/*.jsonl.gz'"
        )
    return matched


def _readable(paths: list[Path], source: str) -> tuple[Path, ...]:
    """The files at paths, and below them, that hold text or records, whichever have more bytes."""
    files = list(dict.fromkeys(file for path in paths for file in _files_below(path)))
    kinds: dict[str, list[Path]] = {}
    for file in files:
        kinds.setdefault(_kind(file), []).append(file)
    records, texts = kinds.pop("records", []), kinds.pop("text", [])
    if records and texts:
        sizes = [sum(map(_size, some)) for some in (records, texts)]
        if sizes[0] >= sizes[1]:
            kinds[BESIDE_RECORDS], texts = texts, []
        else:
            kinds[BESIDE_TEXT], records = records, []
    if not records and not texts:
        example = next((f" ({some[0].name}: {kind})" for kind, some in kinds.items() if some), "")
        raise ConfigError(
            f"{source} holds nothing that can be read{example}; give plain text in UTF-8 or "
            f"{', '.join(RECORDS)}, as they are or packed as .gz, .bz2, .xz or .zst"
        )
    log_left_out(source, {kind: [file.name for file in some] for kind, some in kinds.items()})
    return tuple(records or texts)


def _files_below(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if visible(name)]
        files += [Path(folder, name) for name in names if visible(name)]
    return sorted(file for file in files if file.is_file())


def _kind(path: Path) -> str:
    suffix = suffixes(path)[0]
    if suffix in RECORDS:
        return "records"
    if suffix in ARCHIVES:
        return ARCHIVE
    return "text" if is_text(path) else OTHER_ENCODING
