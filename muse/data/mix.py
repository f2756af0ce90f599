"""The corpus of ``data=mix``: several texts, each found as if it stood alone."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from muse.config import DataConfig
from muse.data.corpus import Corpus, load_corpus
from muse.data.files import SAMPLE_CHARACTERS, FileCorpus, find_corpus
from muse.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MixCorpus:
    """Several corpora.

    Attributes:
        corpora: by the name of the source.
        weights: likewise; they sum to 1.
    """

    corpora: dict[str, Corpus | FileCorpus]
    weights: dict[str, float]

    def split(self, name: str) -> Iterator[str]:
        """The documents of ``train``, ``valid`` or ``test``, one source after the other."""
        return _documents({source: corpus.split(name) for source, corpus in self.corpora.items()})

    def sample(self) -> Iterator[str]:
        """What a tokenizer is trained on: of each source characters by its weight, if it has as many."""
        return _documents(
            {
                source: corpus.sample(round(SAMPLE_CHARACTERS * self.weights[source]))
                for source, corpus in self.corpora.items()
            }
        )

    def digest(self, name: str) -> str:
        """SHA-256 (hexadecimal) of all that a split's documents, and the sample of them, depend on."""
        state = [f"{self.weights[source]} {self.corpora[source].digest(name)}" for source in self.corpora]
        return hashlib.sha256("\n".join(["mix", *state]).encode()).hexdigest()


def find_mix(config: DataConfig) -> MixCorpus:
    """The corpora that ``data.sources`` names.

    Raises:
        ConfigError: one of them cannot be read; names the source, too.
    """
    corpora = {}
    for name in config.sources:
        with about_source(name):
            corpora[name] = corpus_of(config.source(name))
    total = sum(source.weight for source in config.sources.values())
    return MixCorpus(corpora, {name: source.weight / total for name, source in config.sources.items()})


def corpus_of(config: DataConfig) -> Corpus | FileCorpus:
    """The text that ``data`` names, which is no mix."""
    return find_corpus(config) if config.name == "files" else load_corpus(config)


def _documents(sources: Mapping[str, Iterable[str]]) -> Iterator[str]:
    for name, documents in sources.items():
        with about_source(name):
            yield from documents


@contextmanager
def about_source(name: str) -> Iterator[None]:
    """Let what is wrong within name the source."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"data.sources.{name}: {error}") from error
