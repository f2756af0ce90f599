"""Files of text to evaluate on, beside the splits of a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from muse.data.corpus import count_words
from muse.data.documents import RECORDS, Broken, rows_of, suffixes
from muse.data.reading import NotTextError, read_text
from muse.data.tokenizer import Tokenizer
from muse.data.tokens import Counts
from muse.errors import ConfigError


def tokens_of_files(
    tokenizer: Tokenizer, paths: list[Path], option: str = "--text"
) -> tuple[np.ndarray, Counts]:
    """The tokens of files, each document with its end, and how many words and bytes they are of.

    Args:
        tokenizer: of the model.
        paths: see ``read_documents``.
        option: that gave them.

    Raises:
        ConfigError: a file cannot be read, or there are too few tokens.
    """
    documents = read_documents(paths, option)
    pieces: list[Any] = list(tokenizer.encode_documents(documents))
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.uint32)
    if len(tokens) < 2:
        raise ConfigError(f"{option} {' '.join(map(str, paths))} has too little text; it needs two tokens")
    return tokens, counts_of(len(tokens), documents)


def read_documents(paths: list[Path], option: str = "--text") -> list[str]:
    """The documents of files: one of plain text in UTF-8 is one, one of records has many.

    Args:
        paths: of the files; records are what ``data=files`` reads, packed or not.
        option: that gave them.

    Raises:
        ConfigError: a file cannot be read; names it, and the row that is broken.
    """
    documents = []
    for path in paths:
        try:
            documents += _records(path, option) if suffixes(path)[0] in RECORDS else [read_text(path)]
        except NotTextError as error:
            raise ConfigError(f"{option} {path} is {error}") from error
        except OSError as error:
            raise ConfigError(f"{option} {path} is not readable ({error.strerror})") from error
    return documents


def _records(path: Path, option: str) -> list[str]:
    documents = []
    with open(path, "rb") as raw:
        for row, item in rows_of(raw, path, None):
            if isinstance(item, Broken):
                raise ConfigError(f"{option} {path}, row {row}: {item.reason}")
            if item.strip():
                documents.append(item)
    return documents


def counts_of(tokens: int, documents: list[str]) -> Counts:
    """The sizes of documents that are so many tokens."""
    size = sum(len(document.encode()) for document in documents)
    return Counts(tokens, sum(map(count_words, documents)), size)
