"""The options of the text and of its tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from muse.errors import ConfigError
from muse.options import check_options, option


@dataclass
class SourceConfig:
    """One of the texts of data=mix."""

    weight: float = option(
        1.0, "its share of the training windows, beside the weights of the others.", above=0
    )
    data: str = option(
        "files",
        "what the option data says of one text.",
        choices=("files", "text", "wikitext2", "stdlib"),
    )
    path: str | None = option(None, "as data.path.")
    column: str | None = option(None, "as data.column.")
    valid: str | None = option(None, "as data.valid.")
    test: str | None = option(None, "as data.test.")
    skip_bad: bool = option(False, "as data.skip_bad.")

    def __post_init__(self) -> None:
        check_options(self, "data.sources.*")


@dataclass
class DataConfig:
    """Where the text comes from."""

    name: str = option(
        "stdlib",
        "stdlib (the standard library of the running Python), wikitext2, text (plain text), files (text and "
        "records in any format, larger than the memory; docs/data.md), mix (several of these by weight) or "
        "synthetic (random tokens, for the memory and speed benchmarks).",
        choices=("stdlib", "wikitext2", "text", "files", "mix", "synthetic"),
        given_as="data",
    )
    path: str | None = option(
        None,
        "a file or folder of plain text in UTF-8; needed by text, optional for wikitext2. Of a folder, "
        "files and folders named train, valid (validation, val, dev) and test are those splits, with any "
        "extension but a program's (train.txt, wiki.valid.tokens, train-00000-of-00002.txt, and "
        "stories-train.txt where there is stories-valid.txt); what is beside them is left out, and 5 % of "
        "the training text is held out for each one missing. Without such names all of it is split about "
        "90 / 5 / 5: files by a hash of their names, a single file at its end. For files a file, folder or "
        "pattern of text, jsonl, json, csv, parquet or arrow, packed (gz, zst, bz2, xz) or not, split by the "
        "same names or by a hash of each document.",
    )
    column: str | None = option(
        None,
        "of records, which holds the text; null for text or content, or else the only one with text (this "
        "and the next three are of files).",
    )
    valid: str | None = option(None, "file, folder or pattern of the validation split.")
    test: str | None = option(None, "file, folder or pattern of the test split.")
    skip_bad: bool = option(
        False, "whether rows and files that are broken are counted and left out in place of an error."
    )
    sources: dict[str, SourceConfig] = option(
        {},
        "texts of mix by name, each with weight (1 unless given) and what it would have alone: data (files "
        "unless given), path, column, valid, test and skip_bad.",
    )
    at_end: str = option(
        "repeat",
        "what a training does when it has seen a text, or a source of mix, once: repeat it in another order, "
        "or stop.",
        choices=("repeat", "stop"),
    )
    packing: str = option(
        "stream",
        "what a training window holds: stream (so many tokens in a row, whatever documents they are of) or "
        "documents (whole ones side by side, of which none sees another; docs/data.md).",
        choices=("stream", "documents"),
    )
    variant: str = option(
        "wikitext-2-v1",
        "the hub's configuration of WikiText-2, wikitext-2-v1 or wikitext-2-raw-v1.",
        choices=("wikitext-2-v1", "wikitext-2-raw-v1"),
    )
    cache: str = option(
        "outputs/cache", "folder of tokenizers and tokenised text; they are found again by content hash."
    )

    def __post_init__(self) -> None:
        check_options(self, "data")
        if self.name == "text" and not self.path:
            raise ConfigError("data=text needs data.path=<a file or a folder of text files>")
        if self.name == "files" and not self.path:
            raise ConfigError("data=files needs data.path=<a file, a folder or a pattern>")
        for name in ("column", "valid", "test", "skip_bad"):
            if getattr(self, name) and self.name != "files":
                raise ConfigError(f"data.{name} is of data=files; leave it out of data={self.name}")
        if self.name != "mix" and self.sources:
            raise ConfigError(f"data.sources is of data=mix; leave it out of data={self.name}")
        if self.name == "mix" and (self.path or not self.sources):
            raise ConfigError(
                "data=mix needs its texts, and no data.path, by data.sources={a:{path:<path>,weight:0.7},"
                "b:{path:<path>,weight:0.3}}"
            )
        for name in self.sources:
            self.source(name)

    def source(self, name: str) -> DataConfig:
        """A source of ``mix`` as data of its own.

        Raises:
            ConfigError: one of its options has a value that it must not have.
        """
        source, path = self.sources[name], f"data.sources.{name}"
        check_options(source, path)
        options = {
            option: getattr(source, option) for option in ("path", "column", "valid", "test", "skip_bad")
        }
        try:
            return replace(self, name=source.data, sources={}, **options)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


@dataclass
class TokenizerConfig:
    """How text becomes tokens."""

    name: str = option(
        "bpe",
        "bpe (byte-level, trained on the training split; text without white space is cut after every 256 "
        "characters), gpt2, word, file (a tokenizer.json of Hugging Face's, byte-level) or bytes (256 and an "
        "end of text).",
        choices=("bpe", "gpt2", "word", "file", "bytes"),
        given_as="tokenizer",
    )
    vocab_size: int = option(4096, "entries of a trained BPE, at least 257.")
    path: str | None = option(
        None,
        "local folder with vocab.json and merges.txt for gpt2, the hub if absent; tokenizer.json for file.",
    )

    def __post_init__(self) -> None:
        check_options(self, "tokenizer")
        # A byte-level BPE has every byte and the end of text.
        if self.name == "bpe" and self.vocab_size < 257:
            raise ConfigError(f"tokenizer.vocab_size={self.vocab_size} is too small; it must be at least 257")
        if self.name == "file" and not self.path:
            raise ConfigError("tokenizer=file needs tokenizer.path=<tokenizer.json>")
