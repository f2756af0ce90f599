"""Tokenised splits, kept as memory-mapped files that are found again by content hash."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from muse.config import DataConfig, TokenizerConfig
from muse.data.building import Written, build, building, written
from muse.data.cache import atomic_write
from muse.data.corpus import Corpus, count_words
from muse.data.files import REPAIR, FileCorpus
from muse.data.interleaving import Mix
from muse.data.mix import MixCorpus, about_source, corpus_of, find_mix
from muse.data.packing import PackedText, pack
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
            fits and uint32 otherwise; of ``data=mix`` those of each source.
        valid: tokens of the validation split.
        test: tokens of the test split.
        vocab_size: entries of the vocabulary; every token is below it.
        tokenizer: the tokenizer; None for synthetic data.
        counts: sizes by the name of the split.
    """

    train: np.ndarray | Mix
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
    cache = Path(data.cache)
    corpus = find_mix(data) if data.name == "mix" else corpus_of(data)
    built = build_tokenizer(tokenizer, corpus, cache) if made is None else made
    if isinstance(corpus, MixCorpus):
        return _mixed(corpus, built, cache)
    tokens, counts = _tokenised(corpus, built, cache)
    return TokenData(**tokens, vocab_size=built.vocab_size, tokenizer=built, counts=counts)


@lru_cache(maxsize=1)
def packed_text(data: TokenData, seq_len: int) -> PackedText | Mix:
    """The training split of ``data.packing=documents``, in windows of so many places; logs their padding.

    Raises:
        ConfigError: no token ends the documents.
    """
    tokenizer = data.tokenizer
    if tokenizer is None or tokenizer.of_words:
        what = "tokenizer=word ends lines" if tokenizer is not None else "data=synthetic has none"
        raise ConfigError(
            f"data.packing=documents needs an end of text after each document, and {what}; choose "
            "tokenizer=bpe, gpt2, file or bytes and some text, or data.packing=stream"
        )
    if not isinstance(data.train, Mix):
        return _packed(data.train, tokenizer.end_id, seq_len, "training split")
    of_source = zip(data.train.tokens, data.train.names, strict=True)
    packed = tuple(_packed(tokens, tokenizer.end_id, seq_len, name) for tokens, name in of_source)
    return dataclasses.replace(data.train, tokens=packed)


def _packed(tokens: np.ndarray | PackedText, end: int, seq_len: int, name: str) -> PackedText:
    assert not isinstance(tokens, PackedText)
    packed = pack(tokens, end, seq_len)
    padding = 1 - len(packed) / (packed.windows * seq_len)
    log.info("%s: windows of documents %d, padding %.2g %%", name, packed.windows, 100 * padding)
    return packed


def _mixed(corpus: MixCorpus, tokenizer: Tokenizer, cache: Path) -> TokenData:
    """Sources by weight to train on; to evaluate on, one after the other, as they are."""
    tokens: dict[str, list[np.memmap]] = {split: [] for split in SPLITS}
    counts: dict[str, list[Counts]] = {split: [] for split in SPLITS}
    for name, weight in corpus.weights.items():
        log.info("data.sources.%s, %.4g %% of the training windows:", name, 100 * weight)
        with about_source(name):
            of_source, sizes = _tokenised(corpus.corpora[name], tokenizer, cache)
        for split in SPLITS:
            tokens[split].append(of_source[split])
            counts[split].append(sizes[split])
    return TokenData(
        train=Mix(
            names=tuple(f"data.sources.{name}" for name in corpus.weights),
            tokens=tuple(tokens["train"]),
            weights=tuple(corpus.weights.values()),
        ),
        valid=_joined(tokens["valid"], "valid", cache),
        test=_joined(tokens["test"], "test", cache),
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer,
        counts={split: _summed(counts[split]) for split in SPLITS},
    )


def _tokenised(
    corpus: Corpus | FileCorpus, tokenizer: Tokenizer, cache: Path
) -> tuple[dict[str, np.memmap], dict[str, Counts]]:
    """The tokens of each split, from the cache or written there, and their sizes, which are logged."""
    if isinstance(corpus, FileCorpus):
        tokens, counts = _tokenised_files(corpus, tokenizer, cache)
    else:
        tokens, counts = _tokenised_text(corpus, tokenizer, cache)
    sizes = {split: counts[split].bytes or 0 for split in SPLITS}
    if sizes["train"] < sizes["valid"]:
        log.warning(
            "the training split (%d bytes) is smaller than the validation split (%d bytes)",
            *(sizes["train"], sizes["valid"]),
        )
    return tokens, counts


def _tokenised_text(
    corpus: Corpus, tokenizer: Tokenizer, cache: Path
) -> tuple[dict[str, np.memmap], dict[str, Counts]]:
    tokens: dict[str, np.memmap] = {}
    counts: dict[str, Counts] = {}
    for split in SPLITS:
        documents = corpus.split(split)
        tokens[split] = _cached_tokens(corpus, split, tokenizer, cache)
        size = sum(len(document.encode()) for document in documents)
        counts[split] = Counts(len(tokens[split]), sum(map(count_words, documents)), size)
        _log_sizes(split, len(documents), counts[split])
    return tokens, counts


def _tokenised_files(
    corpus: FileCorpus, tokenizer: Tokenizer, cache: Path
) -> tuple[dict[str, np.memmap], dict[str, Counts]]:
    tokens: dict[str, np.memmap] = {}
    counts: dict[str, Counts] = {}
    skipped: dict[str, int] = {}
    for split in SPLITS:
        tokens[split], there = _built_tokens(corpus, split, tokenizer, cache)
        counts[split] = Counts(there.tokens, there.words, there.bytes)
        if there.skipped:
            # What is held out of the training text is read where that is.
            skipped[there.first_skipped] = there.skipped
        _log_sizes(split, there.documents, counts[split])
    for first, count in skipped.items():
        log.warning("left out what is broken: %d rows or rests of files, the first one %s", count, first)
    return tokens, counts


def _summed(counts: list[Counts]) -> Counts:
    return Counts(
        tokens=sum(part.tokens for part in counts),
        words=sum(part.words or 0 for part in counts),
        bytes=sum(part.bytes or 0 for part in counts),
    )


def _joined(parts: list[np.memmap], split: str, cache: Path) -> np.ndarray:
    """The tokens of cache files, one after the other, in another one; each is named after what is in it."""
    names = [Path(str(part.filename)).name for part in parts]
    path = cache / f"tokens-{split}-{hashlib.sha256(' '.join(names).encode()).hexdigest()[:16]}.bin"
    tokens = _map_if_whole(path, parts[0].dtype)
    if tokens is not None:
        return tokens
    pieces = (part[begin : begin + _BLOCK] for part in parts for begin in range(0, len(part), _BLOCK))
    _write_tokens(path, pieces)
    return _mapped(path, parts[0].dtype)


def _built_tokens(
    corpus: FileCorpus, split: str, tokenizer: Tokenizer, cache: Path
) -> tuple[np.memmap, Written]:
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


def _log_sizes(split: str, documents: int, counts: Counts) -> None:
    log.info(
        "%s split: documents %d, bytes %d, tokens %d",
        *(FULL_NAMES[split], documents, counts.bytes, counts.tokens),
    )


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


def _cached_tokens(corpus: Corpus, split: str, tokenizer: Tokenizer, cache: Path) -> np.memmap:
    dtype = _dtype(tokenizer.vocab_size)
    path = _token_path(corpus.digest(split), split, tokenizer, cache)
    if path.is_file():
        tokens = _map_if_whole(path, dtype)
        if tokens is not None:
            return tokens
        log.warning("%s is damaged; tokenising the %s split again", path, split)
    encoded = tokenizer.encode_documents(corpus.split(split))
    _write_tokens(path, (piece.astype(dtype) for piece in encoded))
    return _mapped(path, dtype)


def _write_tokens(path: Path, pieces: Iterable[np.ndarray]) -> None:
    digest = hashlib.sha256()
    with atomic_write(path) as file:
        for piece in pieces:
            encoded = piece.tobytes()
            digest.update(encoded)
            file.write(encoded)
        file.write(digest.digest())


def _mapped(path: Path, dtype: np.dtype) -> np.memmap:
    return np.memmap(path, dtype, mode="r", shape=((path.stat().st_size - _DIGEST_BYTES) // dtype.itemsize,))


def _map_if_whole(path: Path, dtype: np.dtype) -> np.memmap | None:
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
