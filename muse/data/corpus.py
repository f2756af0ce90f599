"""The text of a corpus, split into training, validation and test documents."""

from __future__ import annotations

import hashlib
import logging
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from muse.config import DataConfig
from muse.data import hub
from muse.data.reading import PACKED, RECORDS, FolderText, NotTextError, read_folder, read_text, visible
from muse.data.splits import FULL_NAMES, HELD_OUT, MIN_CHARACTERS, MIN_FILES, SPLITS, find_splits, hold_out
from muse.errors import ConfigError

log = logging.getLogger(__name__)

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

    def sample(self, characters: int | None = None) -> list[str]:
        """What a tokenizer is trained on: all of the training split, or the beginning of each document."""
        total = sum(map(len, self.train))
        if characters is None or total <= characters:
            return self.train
        return [document[: len(document) * characters // total] for document in self.train]

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
    """Read the text that ``data`` and ``data.path`` name, and log how it is split and what is left out.

    - ``stdlib``: the modules and text files of the running Python's standard library without its
      tests, split by a hash of their relative path.
    - ``wikitext2``: the published splits, from the folder ``data.path`` or from the hub.
    - ``text``: files and folders named after splits (muse/data/splits.py) are those splits, and of the others
      5 % each is held out of the training text; where there are none, all text is training text.

    Raises:
        ConfigError: when the text is missing, not plain text or too short to be split, when names of splits
            contradict each other, when the hub is needed and does not answer, or for ``synthetic``, which
            has no text.
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
        for name, text in read_folder(root, EXCLUDED_FOLDERS, (".py", ".txt", ".rst")).texts.items()
        # What the build of this one interpreter wrote.
        if not name.startswith(("config-", "_sysconfigdata"))
    }
    parts = hold_out(files, 2) if len(files) >= 3 else None
    if parts is None:
        raise ConfigError(
            f"data=stdlib found no sources in {root}; use data=text with data.path=<file or folder>"
        )
    return Corpus(*parts)


def _load_wikitext2(config: DataConfig) -> Corpus:
    if config.path is None:
        return _download_wikitext2(config.variant)
    folder, source = Path(config.path).expanduser(), f"data.path={config.path}"
    found = _named_splits(folder, source) if folder.is_dir() else {}
    for split in SPLITS:
        if split not in found:
            raise ConfigError(
                f"{source} has no {split}.txt; data=wikitext2 needs a folder with train.txt, valid.txt and "
                "test.txt"
            )
    return Corpus(*(list(_read_split(folder, found[split], source).texts.values()) for split in SPLITS))


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
    path, source = Path(config.path or "").expanduser(), f"data.path={config.path}"
    if not config.path or not path.exists():
        raise ConfigError(f"{source} does not exist; give a file or a folder of text files")
    if path.is_dir():
        named = _named_splits(path, source)
        read = {split: _read_split(path, paths, source) for split, paths in named.items()}
        if not named:
            read = {"train": _require_text(read_folder(path), source)}
        _log_left_out(path, named, read, source)
        files = {split: text.texts for split, text in read.items()}
    else:
        files = {"train": {path.name: _read_file(path, source)}}
    missing = [split for split in SPLITS if split not in files]
    parts = hold_out(files["train"], len(missing))
    if parts is None:
        raise ConfigError(
            f"{source} has a training text of {sum(map(len, files['train'].values())):,} characters; to hold "
            f"{' and '.join(FULL_NAMES[split] for split in missing)} text out of it takes at least "
            f"{MIN_CHARACTERS}"
        )
    if missing:
        log.info(
            "%s names no %s split: %d %% of the training text for each, %s",
            *(source, " and no ".join(FULL_NAMES[split] for split in missing), HELD_OUT),
            f"by a hash of the names of its {len(files['train']):,} files"
            if len(files["train"]) >= MIN_FILES
            else "from its end",
        )
    splits = {split: list(texts.values()) for split, texts in files.items()}
    return Corpus(**{**splits, **dict(zip(["train", *missing], parts, strict=True))})


def _named_splits(folder: Path, source: str) -> dict[str, list[Path]]:
    try:
        return find_splits(folder, source)
    except OSError as error:
        raise ConfigError(f"{source} cannot be read ({error.strerror})") from error


def _read_file(path: Path, source: str) -> str:
    try:
        return read_text(path)
    except NotTextError as error:
        raise ConfigError(f"{source} cannot be trained on: {error}") from error


def _read_split(root: Path, paths: list[Path], source: str) -> FolderText:
    """The text of a split's files, each of which must be text, or of its folders."""
    texts = {}
    left_out: dict[str, list[str]] = {}
    for path in paths:
        name = path.relative_to(root).as_posix()
        if path.is_file():
            texts[name] = _read_file(path, f"{source}: {name}")
            continue
        read = _require_text(read_folder(path), f"{source}: {name}")
        texts |= {f"{name}/{inner}": text for inner, text in read.texts.items()}
        for reason, names in read.left_out.items():
            left_out.setdefault(reason, []).extend(f"{name}/{inner}" for inner in names)
    return FolderText(texts, left_out)


def _require_text(read: FolderText, source: str) -> FolderText:
    """What was read of a folder, unless that is nothing, or little beside what could be its real text."""
    records = [name for reason in (RECORDS, PACKED) for name in read.left_out.get(reason, [])]
    if read.texts and read.record_bytes <= read.bytes:
        return read
    if records:
        suffixes = ", ".join(sorted({Path(name).suffix for name in records}))
        raise ConfigError(
            f"{source} holds mostly {suffixes} ({records[0]}), which are no plain text; unpack them, or "
            "write the text of their records into .txt files"
        )
    example = next((f" ({names[0]}: {reason})" for reason, names in read.left_out.items()), "")
    raise ConfigError(f"{source} holds no text{example}; give a file or a folder of plain text in UTF-8")


def _log_left_out(root: Path, named: dict[str, list[Path]], read: dict[str, FolderText], source: str) -> None:
    left_out: dict[str, list[str]] = {}
    for text in read.values():
        for reason, names in text.left_out.items():
            left_out.setdefault(reason, []).extend(names)
    if named:
        taken = {path.name for paths in named.values() for path in paths}
        beside = sorted(path.name for path in root.iterdir() if visible(path.name) and path.name not in taken)
        if beside:
            left_out["beside the splits"] = beside
    log_left_out(source, left_out)


def log_left_out(source: str, left_out: Mapping[str, list[str]]) -> None:
    """Warn of files that are not read, which are given by what they are."""
    for reason, names in left_out.items():
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        log.warning("%s: %d left out, %s: %s", source, len(names), reason, shown)
