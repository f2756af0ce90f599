"""Which files of a folder are which split, and what is held out of the training text for the others."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

from muse.data.reading import visible
from muse.errors import ConfigError

SPLITS = ("train", "valid", "test")

ALIASES = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
}
FULL_NAMES = {"train": "training", "valid": "validation", "test": "test"}
# Programs and their settings, which are named train and test as well.
PROGRAMS = (
    *(".py", ".pyi", ".ipynb", ".sh", ".bat", ".ps1", ".c", ".cc", ".cpp", ".cu", ".h", ".hpp", ".cs", ".go"),
    *(".java", ".jl", ".js", ".jsx", ".ts", ".tsx", ".kt", ".lua", ".m", ".php", ".pl", ".r", ".rb", ".rs"),
    *(".scala", ".sql", ".swift", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".html", ".css", ".log"),
)
# A name between dots that is a split's, perhaps with the number of a shard: train, train-00000-of-00002.
_PLAIN = re.compile(rf"({'|'.join(ALIASES)})(?:[-_]?\d+(?:[-_]of[-_]\d+)?)?", re.IGNORECASE)
# A split's name that is one of several words: stories-train.txt, train_clean.txt.
_WORD = re.compile(rf"(?<![^-_ .])({'|'.join(ALIASES)})(?![^-_ .])", re.IGNORECASE)

# Percent of the training text, for each split that is missing.
HELD_OUT = 5
# Documents that can be held out whole; of fewer it is their ends.
MIN_FILES = 3
# Characters of a text whose end can be held out.
MIN_CHARACTERS = 100


def find_splits(root: Path, source: str) -> dict[str, list[Path]]:
    """The files or the folder of each split of the folder ``root``; see ``splits_by_name``."""
    return splits_by_name(sorted(root.iterdir()), source)


def splits_by_name(paths: Iterable[Path], source: str) -> dict[str, list[Path]]:
    """The files or folders of each split among sorted ones; empty where none is named after a split.

    A file or folder is a split's when a part of its name between dots is train, training, valid,
    validation, val, dev, test or testing in any case, perhaps followed by the number of a shard
    (train.txt, wiki.valid.tokens, train-00000-of-00002.txt). Names that have more words (stories-train.txt)
    count where train and another split have the same name but for that word. Programs never count.

    Args:
        paths: the files and folders.
        source: what messages call it.

    Raises:
        ConfigError: where two names are one split's, or there is a validation or test split, but none to
            train on.
    """
    named: dict[str, list[Path]] = defaultdict(list)
    alike: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        if not visible(path.name) or (path.is_file() and path.suffix.lower() in PROGRAMS):
            continue
        plain = [match for part in path.name.split(".") if (match := _PLAIN.fullmatch(part))]
        words = list(_WORD.finditer(path.name))
        if len(plain) == 1:
            named[ALIASES[plain[0][1].lower()]].append(path)
        elif len(words) == 1:
            (word,) = words
            frame = f"{path.name[: word.start()]}*{path.name[word.end() :]}"
            alike[_without_numbers(frame)][ALIASES[word[1].lower()]].append(path)
    for splits in alike.values():
        if "train" in splits and len(splits) > 1:
            for split, paths in splits.items():
                named[split] += paths
    for split, paths in named.items():
        names = {_without_numbers(path.name): path for path in paths}
        if len(names) > 1:
            first, second = sorted(path.name for path in names.values())[:2]
            raise ConfigError(
                f"{source} holds {first} and {second}, both the {FULL_NAMES[split]} split by their names; "
                "leave one there (the names of a split's parts may differ in numbers only)"
            )
    if named and "train" not in named:
        found = sorted(path.name for paths in named.values() for path in paths)[0]
        raise ConfigError(
            f"{source} holds {found}, by its name the {FULL_NAMES[next(iter(named))]} split, but no training "
            "split; add train.txt or a folder train, or rename it"
        )
    return {split: named[split] for split in SPLITS if split in named}


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "0", name)


def position(name: str) -> float:
    """A place between 0 and 1 that depends on nothing but a name or a text."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little") / 2**48


def hold_out(files: Mapping[str, str], count: int) -> list[list[str]] | None:
    """Split documents into training documents and ``count`` parts of about 5 % each.

    From three documents on a part holds those whose names have certain hashes, at least one; of fewer
    it is cut off their ends.

    Args:
        files: documents by name.
        count: parts to hold out, 0 to 2.

    Returns:
        The documents of training and of each part; None where the text is too short.
    """
    if count == 0:
        return [list(files.values())]
    if len(files) < MIN_FILES:
        return _cut_ends(list(files.values()), count)

    names = sorted(files, key=position)
    positions = [position(name) for name in names]
    # A small folder may have no hash that high; every part gets at least one document all the same.
    cuts = [len(names)]
    for part in range(1, count + 1):
        cut = bisect_left(positions, (100 - part * HELD_OUT) / 100)
        cuts.insert(0, min(max(cut, count + 1 - part), cuts[0] - 1))
    return [[files[name] for name in sorted(names[start:stop])] for start, stop in pairwise([0, *cuts])]


def _cut_ends(documents: list[str], count: int) -> list[list[str]] | None:
    parts: list[list[str]] = [[] for _ in range(count + 1)]
    for document in documents:
        cuts = [0, *(_cut(document, 100 - part * HELD_OUT) for part in range(count, 0, -1)), len(document)]
        pieces = [document[start:stop] for start, stop in pairwise(cuts)]
        if len(document) < MIN_CHARACTERS or not all(piece.strip() for piece in pieces):
            pieces = [document, *([""] * count)]
        for part, piece in zip(parts, pieces, strict=True):
            if piece:
                part.append(piece)
    return parts if all(parts) else None


def _cut(text: str, percent: int) -> int:
    """A place near ``percent`` of a text: a line's end, else white space, else between any two characters."""
    start = len(text) * percent // 100
    near = start + len(text) * HELD_OUT // 200
    if (line := text.find("\n", start, near)) >= 0:
        return line + 1
    if space := re.compile(r"\s").search(text, start, near):
        return space.end()
    while start < near and unicodedata.combining(text[start]):
        start += 1
    return start
