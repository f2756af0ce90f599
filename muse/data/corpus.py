"""The text of a corpus, split into training, validation and test documents."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from muse.config import DataConfig
from muse.data import hub
from muse.errors import ConfigError

SPLITS = ("train", "valid", "test")

# Tests, and the packages that some distributions of Python leave out: without them the corpus is the
# same wherever the version of Python is.
EXCLUDED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "distutils",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "tkinter",
    "turtledemo",
}


@dataclass(frozen=True)
class Corpus:
    """The documents of each split: files, or for WikiText-2 and single files one document a split."""

    train: list[str]
    valid: list[str]
    test: list[str]

    def split(self, name: str) -> list[str]:
        """The documents of ``train``, ``valid`` or ``test``."""
        return {"train": self.train, "valid": self.valid, "test": self.test}[name]

    def digest(self, name: str) -> str:
        """SHA-256 (hexadecimal) of a split's documents and of the boundaries between them."""
        digest = hashlib.sha256()
        for document in self.split(name):
            encoded = document.encode()
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
        return digest.hexdigest()


def count_words(text: str) -> int:
    """Words between white space, plus one end of line for each line.

    This is how the published word-level results on WikiText-2 count (``<eos>`` is a word); a last
    line without a line feed counts as a line.
    """
    return len(text.split()) + text.count("\n") + (text != "" and not text.endswith("\n"))


def load_corpus(config: DataConfig) -> Corpus:
    """Read the text that ``data`` and ``data.path`` name.

    - ``stdlib``: the modules and text files of the running Python's standard library without its
      tests, split by a hash of their relative path.
    - ``wikitext2``: the published splits, from the folder ``data.path`` or from the hub.
    - ``text``: a folder is split by a hash of the relative paths, a file into consecutive parts;
      both about 90 / 5 / 5.

    Raises:
        ConfigError: when the text is missing or too short to be split, when the hub is needed and
            does not answer, or for ``synthetic``, which has no text.
    """
    if config.name == "stdlib":
        return _load_stdlib()
    if config.name == "wikitext2":
        return _load_wikitext2(config)
    if config.name == "text":
        return _load_text(config)
    raise ConfigError(f"data={config.name} has no text; choose one of stdlib, wikitext2, text")


def _load_stdlib() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = {
        name: text
        for name, text in _read_folder(root, EXCLUDED_FOLDERS, (".py", ".txt", ".rst")).items()
        # What the build of this one interpreter wrote.
        if not name.startswith(("config-", "_sysconfigdata"))
    }
    if len(files) < 3:
        raise ConfigError(
            f"data=stdlib found no sources in {root}; use data=text with data.path=<file or folder>"
        )
    return _split_files(files)


def _load_wikitext2(config: DataConfig) -> Corpus:
    if config.path is None:
        return _download_wikitext2(config.variant)
    folder = Path(config.path).expanduser()
    texts = {}
    for split, names in zip(SPLITS, (("train",), ("valid", "validation"), ("test",)), strict=True):
        candidates = [
            folder / pattern.format(name)
            for name in names
            for pattern in ("{}.txt", "wiki.{}.tokens", "wiki.{}.raw")
        ]
        found = next((path for path in candidates if path.is_file()), None)
        text = None if found is None else _read(found)
        if text is None:
            raise ConfigError(
                f"data.path={config.path} has no readable {split}.txt; data=wikitext2 needs a folder "
                "with train.txt, valid.txt and test.txt"
            )
        texts[split] = [text]
    return Corpus(**texts)


def _download_wikitext2(variant: str) -> Corpus:
    import datasets  # type: ignore[import-untyped, unused-ignore]

    setting = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = setting or not hub.reachable()
    try:
        loaded = datasets.load_dataset("Salesforce/wikitext", variant)
        splits = [_join_rows(loaded[name]["text"]) for name in ("train", "validation", "test")]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data=wikitext2 is not cached and could not be loaded from the hub ({type(error).__name__}); "
            "go online or set data.path=<folder with train.txt, valid.txt and test.txt>"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = setting
    return Corpus(*([text] for text in splits))


def _join_rows(rows: Iterable[str]) -> str:
    # The hub stores a blank line, one space in the published files, as an empty row; putting the
    # space back gives the published number of bytes.
    return "".join((row.removesuffix("\n") or " ") + "\n" for row in rows)


def _load_text(config: DataConfig) -> Corpus:
    path = Path(config.path or "").expanduser()
    if config.path and path.is_dir():
        files = _read_folder(path)
        if len(files) < 3:
            raise ConfigError(
                f"data.path={config.path} holds {len(files)} text files in UTF-8; a folder needs at "
                "least 3 of them to be split, a single file needs 3 lines"
            )
        return _split_files(files)
    if not config.path or not path.is_file():
        raise ConfigError(f"data.path={config.path} does not exist; give a file or a folder of text files")
    text = _read(path)
    if text is None:
        raise ConfigError(f"data.path={config.path} is not text in UTF-8; give a file or a folder of it")
    valid = _line_after(text, len(text) * 90 // 100)
    test = _line_after(text, max(len(text) * 95 // 100, valid))
    parts = text[:valid], text[valid:test], text[test:]
    if not all(part.strip() for part in parts):
        raise ConfigError(
            f"data.path={config.path} is too short to be split into training, validation and test text; "
            "give a file with many lines"
        )
    return Corpus(*([part] for part in parts))


def _line_after(text: str, position: int) -> int:
    newline = text.find("\n", position)
    return len(text) if newline < 0 else newline + 1


def _read(path: Path) -> str | None:
    """The text of a file with line feeds as line ends; None where it is empty or no text in UTF-8."""
    try:
        text = path.read_bytes().decode().replace("\r\n", "\n")
    except (UnicodeDecodeError, PermissionError):
        return None
    return None if "\0" in text or not text.strip() else text


def _read_folder(
    root: Path, excluded: Iterable[str] = (), suffixes: tuple[str, ...] = ("",)
) -> dict[str, str]:
    """The text of each readable, visible file below ``root`` by its relative path, in sorted order."""
    texts = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in excluded and not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or not name.endswith(suffixes) or not path.is_file():
                continue
            text = _read(path)
            if text is not None:
                texts[path.relative_to(root).as_posix()] = text
    return dict(sorted(texts.items()))


def _split_files(files: dict[str, str]) -> Corpus:
    """Split at least three files about 90 / 5 / 5 by the hash of their relative path."""

    def position(name: str) -> float:
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little") / 2**48

    names = sorted(files, key=position)
    positions = [position(name) for name in names]
    # A small folder may have no hash above 0.9; every split gets at least one file all the same.
    test = min(max(bisect_left(positions, 0.95), 2), len(names) - 1)
    valid = min(max(bisect_left(positions, 0.90), 1), test - 1)
    parts = names[:valid], names[valid:test], names[test:]
    return Corpus(*([files[name] for name in sorted(part)] for part in parts))
