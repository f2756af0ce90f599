"""Text to tokens and back: byte-level BPE, that of GPT-2 or of a file, whole words, or bytes."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from muse.config import TokenizerConfig
from muse.data import hub
from muse.data.cache import atomic_write
from muse.data.corpus import Corpus
from muse.data.files import SAMPLE_CHARACTERS, FileCorpus
from muse.data.mix import MixCorpus
from muse.errors import ConfigError

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
END_OF_LINE = "<eos>"
UNKNOWN = "<unk>"
# What ends a document in a file of Hugging Face's; the first one that it has.
ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<|im_end|>", "<|eot_id|>")

CHUNK_CHARACTERS = 1 << 14
CHUNKS_PER_BATCH = 64

# No pre-token of byte-level BPE has white space after anything else, so the text before and after
# such a place is encoded independently. Words are separated there, too.
_CUT = re.compile(r"(?<=\S)(?=[ \n])")

# Our own BPE cuts text without white space, which would be one word of any length, after so many characters.
LONGEST_RUN = 256
# What neither Python nor the library takes for white space: they differ over these four control characters.
_RUN = rf"[^\s\x1c-\x1f]{{{LONGEST_RUN}}}"
_CUT_IN_RUNS = re.compile(rf"{_RUN}|{_CUT.pattern}")

# Seconds between two lines about work that takes long, where no progress bar is drawn.
PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of the ``tokenizers`` library and its end token.

    Attributes:
        model: the library's tokenizer.
        end: ``<|endoftext|>`` or another one of ``ENDS``, which ends a document, or ``<eos>``, which ends a
            line of words.
        cuts_runs: whether ``model`` cuts text without white space after every ``LONGEST_RUN`` characters.
        whole: whether a document must not be cut before ``model`` has it.
    """

    model: tokenizers.Tokenizer
    end: str
    cuts_runs: bool = False
    whole: bool = False

    @property
    def vocab_size(self) -> int:
        """Number of entries; every token id is below it."""
        return self.model.get_vocab_size()

    @property
    def end_id(self) -> int:
        """Id of the end token."""
        index = self.model.token_to_id(self.end)
        assert index is not None
        return index

    @property
    def of_words(self) -> bool:
        """Whether tokens are words, and not bytes."""
        return self.end == END_OF_LINE

    @property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) of everything that decides how text is encoded."""
        state = f"{tokenizers.__version__}\n{self.end}\n{self.model.to_str()}"
        return hashlib.sha256(state.encode()).hexdigest()

    def to_json(self) -> str:
        """All of it, as a ``tokenizer.json`` of the library; ``tokenizer_of`` reads it again."""
        return self.model.to_str()

    def encode(self, text: str) -> list[int]:
        """The token ids of ``text``, without an end of document; words have ``<eos>`` at line feeds."""
        return self.model.encode(self._prepare(text), add_special_tokens=False).ids

    def encode_documents(self, documents: Sequence[str]) -> Iterator[np.ndarray]:
        """Encode documents, each followed by an end token, and tell how far that is.

        A word tokenizer ends every line, and so adds an end only to a last line without a line feed.

        Yields:
            Consecutive pieces of the stream of tokens: uint32 arrays of shape (tokens,).
        """
        total = sum(map(len, documents))
        done = 0
        with (
            tqdm(total=total, desc="tokenising", unit="char", unit_scale=True, disable=None) as progress,
            progress_lines(lambda: f"tokenising: {done:,} of {total:,} characters"),
        ):
            for ids, characters in self._encoded(documents):
                done += characters
                progress.update(characters)
                yield ids

    def encode_pieces(self, documents: Iterable[str]) -> Iterator[np.ndarray]:
        """What ``encode_documents`` yields, of documents that need not be in memory; nothing is told."""
        for ids, _ in self._encoded(documents):
            yield ids

    def _encoded(self, documents: Iterable[str]) -> Iterator[tuple[np.ndarray, int]]:
        """Pieces of the stream of tokens, and the number of characters in each."""
        pieces = (
            piece
            for document in documents
            for piece in ([(document, True)] if self.whole else _pieces(document, self.cuts_runs))
        )
        while batch := list(islice(pieces, CHUNKS_PER_BATCH)):
            encodings = self.model.encode_batch_fast(
                [self._prepare(text) for text, _ in batch], add_special_tokens=False
            )
            ids: list[int] = []
            for (text, last), encoding in zip(batch, encodings, strict=True):
                ids += encoding.ids
                if last and not (self.of_words and text.endswith("\n")):
                    ids.append(self.end_id)
            yield np.array(ids, dtype=np.uint32), sum(len(text) for text, _ in batch)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids; the inverse of ``encode`` except for words, which lose their spacing."""
        text = self.model.decode([int(index) for index in ids], skip_special_tokens=False)
        if self.of_words:
            return re.sub(f" ?{END_OF_LINE} ?", "\n", text)
        return text

    def bytes_of(self, index: int) -> bytes:
        """The bytes of a token in UTF-8, of which a character may have more; for words the word itself."""
        token = self.model.id_to_token(int(index))
        if token is None:
            return b""
        # Special tokens of a file may have characters that stand for no byte.
        if self.of_words or token == self.end or not _BYTES.keys() >= {*token}:
            return token.encode()
        return bytes(_BYTES[character] for character in token)

    def _prepare(self, text: str) -> str:
        if self.of_words:
            return " ".join(text.replace("\n", f" {END_OF_LINE} ").split())
        return text


def _bytes_of_characters() -> dict[str, int]:
    """Which byte each character of a byte-level token stands for, as in GPT-2 (Radford et al., 2019).

    Bytes that are printable Latin-1 characters stand for themselves, the others for those from 256 on, in
    order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = {chr(byte): byte for byte in printable}
    return shown | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _bytes_of_characters()


def tokenizer_of(text: str) -> Tokenizer:
    """The tokenizer that ``Tokenizer.to_json`` told.

    Raises:
        ValueError: it is none of this project.
    """
    try:
        model = tokenizers.Tokenizer.from_str(text)
    # The library raises nothing more specific.
    except Exception as error:
        raise ValueError(f"no tokenizer: {error}") from error
    end = _end_of(model)
    if end is not None:
        # The expression is in it as JSON has it.
        cuts_runs = json.dumps(_RUN)[1:-1] in text
        return _byte_level(model, cuts_runs, end, not cuts_runs and not _cut_as_gpt2(text))
    if model.token_to_id(END_OF_LINE) is None:
        raise ValueError(f"a tokenizer without {END_OF_TEXT} and {END_OF_LINE}")
    return Tokenizer(model, END_OF_LINE)


def _end_of(model: tokenizers.Tokenizer) -> str | None:
    return next((end for end in ENDS if model.token_to_id(end) is not None), None)


def _cut_as_gpt2(text: str) -> bool:
    """Whether a tokenizer, as JSON, cuts text into words as that of GPT-2 does, and does nothing before."""
    told = json.loads(text)
    cut = told.get("pre_tokenizer") or {}
    as_gpt2 = (
        cut.get("type") == "ByteLevel" and not cut.get("add_prefix_space") and cut.get("use_regex", True)
    )
    return bool(as_gpt2) and told.get("normalizer") is None


def build_tokenizer(
    config: TokenizerConfig, corpus: Corpus | FileCorpus | MixCorpus, cache: Path
) -> Tokenizer:
    """Train or load the tokenizer that ``tokenizer`` names.

    - ``bpe``: byte-level BPE with ``tokenizer.vocab_size`` entries (fewer where the text has fewer
      pairs to merge), trained on the training split, or on ``SAMPLE_CHARACTERS`` of it where that
      is ``data=files`` or ``mix``, and kept in ``cache`` under a content hash.
    - ``gpt2``: 50257 entries, from the folder ``tokenizer.path`` or from the hub.
    - ``word``: every word of the training split, ``<unk>`` and ``<eos>``.
    - ``file``: what the file ``tokenizer.path`` has.
    - ``bytes``: the 256 bytes and ``<|endoftext|>``.

    Raises:
        ConfigError: when files are missing, the hub does not answer or ``cache`` cannot be written.
    """
    if config.name == "bpe":
        return _cached_bpe(config.vocab_size, corpus, cache)
    if config.name == "gpt2":
        return _load_gpt2(config.path)
    if config.name == "file":
        return _load_file(Path(config.path or ""))
    if config.name == "bytes":
        return _byte_tokenizer()
    return _word_tokenizer(corpus.split("train"))


def _cached_bpe(vocab_size: int, corpus: Corpus | FileCorpus | MixCorpus, cache: Path) -> Tokenizer:
    state = f"bpe {_RUN} {corpus.digest('train')} {vocab_size} {tokenizers.__version__}"
    path = cache / f"bpe-{vocab_size}-{hashlib.sha256(state.encode()).hexdigest()[:16]}.json"
    if path.is_file():
        try:
            trained = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
            return _byte_level(trained, cuts_runs=True)
        # The library raises nothing more specific.
        except Exception as error:  # noqa: BLE001
            log.warning("%s is damaged (%s); training the tokenizer again", path, error)
    model = _train_bpe(vocab_size, corpus.sample())
    with atomic_write(path) as file:
        file.write(model.to_str().encode())
    return _byte_level(model, cuts_runs=True)


def _train_bpe(vocab_size: int, documents: Iterable[str]) -> tokenizers.Tokenizer:
    in_memory = isinstance(documents, list)
    told = str(sum(map(len, documents))) if in_memory else f"up to {SAMPLE_CHARACTERS}"
    log.info("training a BPE with %d entries on %s characters", vocab_size, told)
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_RUN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT],
        show_progress=sys.stderr.isatty(),
    )
    pieces = (text for document in documents for text, _ in _pieces(document, cuts_runs=True))
    began = time.monotonic()
    with progress_lines(lambda: f"training the tokenizer: {time.monotonic() - began:.0f} s"):
        model.train_from_iterator(pieces, trainer)
    return model


def _load_gpt2(path: str | None) -> Tokenizer:
    vocab, merges = _gpt2_files(path)
    try:
        model = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    # The library raises nothing more specific.
    except Exception as error:
        raise ConfigError(
            f"tokenizer.path={path} holds no BPE that can be read ({error}); "
            "give a folder with GPT-2's vocab.json and merges.txt"
        ) from error
    if model.token_to_id(END_OF_TEXT) is None:
        raise ConfigError(
            f"tokenizer.path={path} has no {END_OF_TEXT} in vocab.json; "
            "give a folder with GPT-2's vocab.json and merges.txt"
        )
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([END_OF_TEXT])
    return _byte_level(model)


def _gpt2_files(path: str | None) -> tuple[Path, Path]:
    names = "vocab.json", "merges.txt"
    if path is not None:
        vocab, merges = (Path(path).expanduser() / name for name in names)
        if not (vocab.is_file() and merges.is_file()):
            raise ConfigError(
                f"tokenizer.path={path} must be a folder with GPT-2's vocab.json and merges.txt"
            )
        return vocab, merges
    import huggingface_hub

    offline = not hub.reachable()
    try:
        vocab, merges = (
            Path(huggingface_hub.hf_hub_download("openai-community/gpt2", name, local_files_only=offline))
            for name in names
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            "tokenizer=gpt2 is not cached and could not be loaded from the hub; "
            "go online or set tokenizer.path=<folder with vocab.json and merges.txt>"
        ) from error
    return vocab, merges


def _load_file(path: Path) -> Tokenizer:
    said = f"tokenizer.path={path}"
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text in UTF-8"
        raise ConfigError(f"{said} cannot be read ({reason}); give a tokenizer.json") from error
    try:
        model = tokenizers.Tokenizer.from_str(text)
    # The library raises nothing more specific.
    except Exception as error:
        raise ConfigError(f"{said} is no tokenizer.json ({error}); give one of Hugging Face's") from error
    if not isinstance(model.decoder, decoders.ByteLevel):
        raise ConfigError(
            f"{said} is no byte-level tokenizer, as those of GPT-2, Llama 3 and Qwen are; give one"
        )
    if _end_of(model) is None:
        raise ConfigError(f"{said} has no end of text; it must have one of {', '.join(ENDS)}")
    if max(model.get_vocab().values()) >= model.get_vocab_size():
        raise ConfigError(f"{said} leaves numbers of entries out; give one that does not")
    model.no_truncation()
    model.no_padding()
    return tokenizer_of(model.to_str())


def _byte_tokenizer() -> Tokenizer:
    vocabulary = {**_BYTES, END_OF_TEXT: len(_BYTES)}
    model = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([END_OF_TEXT])
    return _byte_level(model)


def _word_tokenizer(documents: Iterable[str]) -> Tokenizer:
    counts = Counter(word for document in documents for word in document.split())
    words = sorted({*counts, UNKNOWN, END_OF_LINE}, key=lambda word: (-counts[word], word))
    model = tokenizers.Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN)
    )
    model.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")
    return Tokenizer(model, END_OF_LINE)


def _byte_level(
    model: tokenizers.Tokenizer, cuts_runs: bool = False, end: str = END_OF_TEXT, whole: bool = False
) -> Tokenizer:
    # An end token spelled out in a text is text: only encode_documents ends a document.
    model.encode_special_tokens = True
    return Tokenizer(model, end, cuts_runs, whole)


def _pieces(document: str, cuts_runs: bool) -> Iterator[tuple[str, bool]]:
    """Cut a document into pieces that are encoded independently; the flag marks the last one."""
    start = 0
    while (cut := _next_cut(document, start, cuts_runs)) is not None:
        yield document[start:cut], False
        start = cut
    yield document[start:], True


def _next_cut(document: str, start: int, cuts_runs: bool) -> int | None:
    """The first place after ``CHUNK_CHARACTERS`` at which a piece that begins at ``start`` may end."""
    position = start + CHUNK_CHARACTERS
    if not cuts_runs:
        cut = _CUT.search(document, position)
    elif position >= len(document):
        cut = None
    else:
        # A run is cut at multiples of the limit from where it begins, which is not before ``start``.
        piece = document[start:position]
        run = 0 if piece[-1].isspace() else len(piece.rsplit(maxsplit=1)[-1])
        cut = _CUT_IN_RUNS.search(document, position - run % LONGEST_RUN)
    return cut.end() if cut else None


@contextmanager
def progress_lines(line: Callable[[], str]) -> Iterator[None]:
    """Print what ``line`` returns every ``PROGRESS_SECONDS`` where standard error shows no progress bar."""
    if sys.stderr.isatty():
        yield
        return
    done = threading.Event()

    def work() -> None:
        while not done.wait(PROGRESS_SECONDS):
            print(line(), flush=True)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
