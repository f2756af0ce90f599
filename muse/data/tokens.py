"""Tokenised splits, kept as memory-mapped files that are found again by content hash."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from muse.config import DataConfig, TokenizerConfig
from muse.data.building import Written, build, building, written
from muse.data.cache import atomic_write
from muse.data.corpus import Corpus, count_words, load_corpus
from muse.data.files import REPAIR, FileCorpus, find_corpus
from muse.data.splits import FULL_NAMES, SPLITS
from muse.data.tokenizer import Tokenizer, build_tokenizer
from muse.errors import ConfigError

log = logging.getLogger(__name__)

SYNTHETIC_TOKENS = {"train": 1 << 20, "valid": 1 << 16, "test": 1 << 16}

# A cache file is the tokens followed by the SHA-256 of their bytes.
_DIGEST_BYTES = hashlib.sha256().digest_size
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Counts:
    """The sizes of a split, by which a loss becomes a perplexity per token or word, or bits per byte.

    Attributes:
        tokens: tokens, end tokens included.
        words: words between white space plus one end of line a line; None without text.
        bytes: bytes of the text in UTF-8; None without text.
    """

    tokens: int
    words: int | None
    bytes: int | None


@dataclass(frozen=True, eq=False)
class TokenData:
    """A tokenised corpus.

    Attributes:
        train: tokens of the training split, an array of shape (tokens,), uint16 where the vocabulary
            fits and uint32 otherwise.
        valid: tokens of the validation split.
        test: tokens of the test split.
        vocab_size: entries of the vocabulary; every token is below it.
        tokenizer: the tokenizer; None for synthetic data.
        counts: sizes by the name of the split.
    """

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    vocab_size: int
    tokenizer: Tokenizer | None
    counts: dict[str, Counts]


def load_tokens(
    data: DataConfig, tokenizer: TokenizerConfig, vocab_size: int, made: Tokenizer | None = None
) -> TokenData:
    """Load a corpus, build its tokenizer and tokenise every split, or find all that in ``data.cache``.

    The documents, bytes and tokens of each split are logged.

    Args:
        data: the corpus; ``synthetic`` gives uniformly random tokens, the same ones every time.
        tokenizer: the tokenizer; ignored for synthetic data.
        vocab_size: entries of the synthetic vocabulary; ignored for text.
        made: a tokenizer to take in place of the one that ``tokenizer`` says.

    Raises:
        ConfigError: when text or tokenizer cannot be loaded or ``data.cache`` cannot be written.
    """
    if data.name == "synthetic":
        return _synthetic(vocab_size)
    if data.name == "files":
        return _load_files(data, tokenizer, made)
    corpus = load_corpus(data)
    sizes = {split: sum(len(document.encode()) for document in corpus.split(split)) for split in SPLITS}
    _warn_of_little_training_text(sizes)
    cache = Path(data.cache)
    built = build_tokenizer(tokenizer, corpus, cache) if made is None else made
    tokens = {split: _cached_tokens(corpus, split, built, cache) for split in SPLITS}
    counts = {
        split: Counts(
            tokens=len(tokens[split]),
            words=sum(map(count_words, corpus.split(split))),
            bytes=sizes[split],
        )
        for split in SPLITS
    }
    for split in SPLITS:
        _log_sizes(split, len(corpus.split(split)), sizes[split], len(tokens[split]))
    return TokenData(**tokens, vocab_size=built.vocab_size, tokenizer=built, counts=counts)


def _load_files(data: DataConfig, tokenizer: TokenizerConfig, made: Tokenizer | None) -> TokenData:
    corpus, cache = find_corpus(data), Path(data.cache)
    built = build_tokenizer(tokenizer, corpus, cache) if made is None else made
    tokens: dict[str, np.ndarray] = {}
    counts: dict[str, Counts] = {}
    skipped: dict[str, int] = {}
    for split in SPLITS:
        tokens[split], there = _built_tokens(corpus, split, built, cache)
        counts[split] = Counts(there.tokens, there.words, there.bytes)
        if there.skipped:
            # What is held out of the training text is read where that is.
            skipped[there.first_skipped] = there.skipped
        _log_sizes(split, there.documents, there.bytes, there.tokens)
    for first, count in skipped.items():
        log.warning("left out what is broken: %d rows or rests of files, the first one %s", count, first)
    _warn_of_little_training_text({split: counts[split].bytes or 0 for split in SPLITS})
    return TokenData(**tokens, vocab_size=built.vocab_size, tokenizer=built, counts=counts)


def _built_tokens(
    corpus: FileCorpus, split: str, tokenizer: Tokenizer, cache: Path
) -> tuple[np.ndarray, Written]:
    """The tokens of a split, from the cache or written there part by part, and their sizes."""
    dtype, documents = _dtype(tokenizer.vocab_size), corpus.split(split)
    path = _token_path(corpus.digest(split), split, tokenizer, cache)
    there, tokens = written(path), _map_if_whole(path, dtype)
    if there is None or tokens is None:
        with building(path):
            # Another process may have built it meanwhile.
            there, tokens = written(path), _map_if_whole(path, dtype)
            if there is None or tokens is None:
                there = build(path, documents, tokenizer, dtype, FULL_NAMES[split])
                tokens = _map_if_whole(path, dtype)
    if there.skipped and not documents.skip_bad:
        raise ConfigError(f"{there.first_skipped}; {REPAIR}")
    if tokens is None:
        held_out = documents.share != (0.0, 1.0)
        broken = f", and what is broken is left out: {there.first_skipped}" if there.skipped else ""
        raise ConfigError(
            f"{documents.source} has no document for the {FULL_NAMES[split]} split{broken}; give "
            + ("more documents, or data.valid=<path> and data.test=<path>" if held_out else "another path")
        )
    return tokens, there


def _warn_of_little_training_text(sizes: dict[str, int]) -> None:
    if sizes["train"] < sizes["valid"]:
        log.warning(
            "the training split (%d bytes) is smaller than the validation split (%d bytes)",
            *(sizes["train"], sizes["valid"]),
        )


def _log_sizes(split: str, documents: int, size: int, tokens: int) -> None:
    log.info("%s split: documents %d, bytes %d, tokens %d", FULL_NAMES[split], documents, size, tokens)


def _synthetic(vocab_size: int) -> TokenData:
    generator = np.random.default_rng(0)
    tokens = {
        split: generator.integers(vocab_size, size=size, dtype=_dtype(vocab_size))
        for split, size in SYNTHETIC_TOKENS.items()
    }
    counts = {split: Counts(tokens=size, words=None, bytes=None) for split, size in SYNTHETIC_TOKENS.items()}
    return TokenData(**tokens, vocab_size=vocab_size, tokenizer=None, counts=counts)


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _token_path(digest: str, split: str, tokenizer: Tokenizer, cache: Path) -> Path:
    state = f"tokens {digest} {tokenizer.digest} {_dtype(tokenizer.vocab_size).str}"
    return cache / f"tokens-{split}-{hashlib.sha256(state.encode()).hexdigest()[:16]}.bin"


def _cached_tokens(corpus: Corpus, split: str, tokenizer: Tokenizer, cache: Path) -> np.ndarray:
    dtype = _dtype(tokenizer.vocab_size)
    path = _token_path(corpus.digest(split), split, tokenizer, cache)
    if path.is_file():
        tokens = _map_if_whole(path, dtype)
        if tokens is not None:
            return tokens
        log.warning("%s is damaged; tokenising the %s split again", path, split)
    digest = hashlib.sha256()
    with atomic_write(path) as file:
        for piece in tokenizer.encode_documents(corpus.split(split)):
            encoded = piece.astype(dtype).tobytes()
            digest.update(encoded)
            file.write(encoded)
        file.write(digest.digest())
    return _mapped(path, dtype)


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype, mode="r", shape=((path.stat().st_size - _DIGEST_BYTES) // dtype.itemsize,))


def _map_if_whole(path: Path, dtype: np.dtype) -> np.ndarray | None:
    """Map a cache file into memory; None where it is not there or not what was written."""
    try:
        left = path.stat().st_size - _DIGEST_BYTES
        if left <= 0 or left % dtype.itemsize:
            return None
        digest = hashlib.sha256()
        # Read, not mapped, so that what was looked at leaves the memory again.
        with open(path, "rb") as file:
            while left and (block := file.read(min(left, _BLOCK))):
                digest.update(block)
                left -= len(block)
            whole = file.read() == digest.digest()
    except FileNotFoundError:
        return None
    return _mapped(path, dtype) if whole else None
