from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from muse.config import DataConfig, TokenizerConfig
from muse.data import SPLITS, TokenData, Tokenizer, count_words, load_corpus, load_tokens
from muse.errors import ConfigError

BPE = TokenizerConfig("bpe", 300)


@pytest.fixture
def data(text_file, tmp_path) -> DataConfig:
    return DataConfig("text", path=str(text_file), cache=str(tmp_path / "cache"))


def arrays(tokens: TokenData) -> list[list[int]]:
    return [getattr(tokens, split).tolist() for split in SPLITS]


def test_tokens_and_counts(data):
    tokens = load_tokens(data, BPE, 0)
    corpus = load_corpus(data)
    assert tokens.tokenizer is not None
    assert tokens.vocab_size == 300
    for split in SPLITS:
        (text,) = corpus.split(split)
        array, counts = getattr(tokens, split), tokens.counts[split]
        assert isinstance(array, np.memmap)
        assert array.dtype == np.uint16
        assert array[-1] == tokens.tokenizer.end_id
        assert tokens.tokenizer.decode(array[:-1]) == text
        assert (counts.tokens, counts.words) == (len(array), count_words(text))
        assert counts.bytes == len(text.encode())


def test_the_sizes_of_every_split_are_logged(data, caplog):
    for _ in ("built", "found in the cache"):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            counts = load_tokens(data, BPE, 0).counts
        for split, name in zip(SPLITS, ("training", "validation", "test"), strict=True):
            told = f"{name} split: documents 1, bytes {counts[split].bytes}, tokens {counts[split].tokens}"
            assert told in caplog.messages
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_less_text_to_train_on_than_to_validate_with_is_told(tmp_path, caplog):
    (tmp_path / "text").mkdir()
    for name, size in (("train", 100), ("valid", 101), ("test", 1000)):
        (tmp_path / "text" / f"{name}.txt").write_text("a" * size, encoding="utf-8")
    load_tokens(DataConfig("text", path=str(tmp_path / "text"), cache=str(tmp_path / "cache")), BPE, 0)
    assert caplog.messages == [
        "the training split (100 bytes) is smaller than the validation split (101 bytes)"
    ]


def test_a_word_tokenizer_has_one_token_a_word(data):
    tokens = load_tokens(data, TokenizerConfig("word"), 0)
    assert all(counts.tokens == counts.words for counts in tokens.counts.values())


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"w{n}\n" for n in range(75_000)), encoding="utf-8")
    data = DataConfig("text", path=str(path), cache=str(tmp_path / "cache"))
    tokens = load_tokens(data, TokenizerConfig("word"), 0)
    assert tokens.train.dtype == np.uint32
    assert 1 << 16 <= tokens.train.max() < tokens.vocab_size


def test_a_second_call_tokenises_nothing(data, monkeypatch):
    first = load_tokens(data, BPE, 0)
    monkeypatch.setattr(Tokenizer, "encode_documents", lambda *_: pytest.fail("tokenised again"))
    assert arrays(load_tokens(data, BPE, 0)) == arrays(first)


def test_other_text_or_another_tokenizer_is_tokenised_anew(data, text_file):
    load_tokens(data, BPE, 0)
    load_tokens(data, TokenizerConfig("bpe", 280), 0)
    assert len(list(Path(data.cache).glob("tokens-*.bin"))) == 6
    text_file.write_text(text_file.read_text(encoding="utf-8") + "One more line.\n", encoding="utf-8")
    tokens = load_tokens(data, BPE, 0)
    assert tokens.tokenizer is not None
    assert tokens.tokenizer.decode(tokens.test[:-1]).endswith("One more line.\n")


def test_an_interruption_leaves_no_file(data, monkeypatch):
    encode_documents = Tokenizer.encode_documents

    def interrupted(self, documents):
        yield next(encode_documents(self, documents))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_documents", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_tokens(data, BPE, 0)
    assert [path.suffix for path in Path(data.cache).iterdir()] == [".json"]
    assert load_tokens(data, BPE, 0).counts["train"].tokens > 0


KILLED = """
import os, sys
from muse.config import DataConfig, TokenizerConfig
from muse.data import Tokenizer, load_tokens
encode_documents = Tokenizer.encode_documents
def killed(self, documents):
    yield next(encode_documents(self, documents))
    os.kill(os.getpid(), 9)
Tokenizer.encode_documents = killed
load_tokens(DataConfig("text", path=sys.argv[1], cache=sys.argv[2]), TokenizerConfig("bpe", 300), 0)
"""


def test_a_killed_process_leaves_only_a_stray_file_that_is_ignored_and_later_removed(data):
    assert data.path is not None
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", KILLED, data.path, data.cache], cwd=root, check=False)
    assert result.returncode == -9
    (stray,) = Path(data.cache).glob("*.tmp")
    assert not list(Path(data.cache).glob("*.bin"))
    load_tokens(data, BPE, 0)
    assert stray.exists(), "it might belong to a process that is still at work"
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(stray, (two_days_ago, two_days_ago))
    load_tokens(data, TokenizerConfig("bpe", 280), 0)
    assert not stray.exists()


@pytest.mark.parametrize("damage", ["truncate", "truncate by one token", "empty", "flip"])
def test_a_damaged_file_is_written_again(data, caplog, damage):
    first = arrays(load_tokens(data, BPE, 0))
    (path,) = Path(data.cache).glob("tokens-train-*.bin")
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        content = content[: len(content) // 2 - 1]
    elif damage == "truncate by one token":
        content = content[2:]
    elif damage == "empty":
        content = bytearray()
    else:
        content[10] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert arrays(load_tokens(data, BPE, 0)) == first
    assert "damaged" in caplog.text
    caplog.clear()
    load_tokens(data, BPE, 0)
    assert "damaged" not in caplog.text


def test_processes_that_build_the_same_cache_at_once_agree(data, monkeypatch):
    encode_documents = Tokenizer.encode_documents
    others: list[TokenData] = []

    def overtaken(self, documents):
        # While this call is half-way through, another builds and publishes the same file.
        pieces = encode_documents(self, documents)
        yield next(pieces)
        with monkeypatch.context() as patch:
            patch.setattr(Tokenizer, "encode_documents", encode_documents)
            others.append(load_tokens(data, BPE, 0))
        yield from pieces

    monkeypatch.setattr(Tokenizer, "encode_documents", overtaken)
    tokens = load_tokens(data, BPE, 0)
    assert arrays(tokens) == arrays(others[0])
    assert not list(Path(data.cache).glob("*.tmp"))


def test_a_full_disk_names_the_cache(data, monkeypatch):
    def full(self, documents):
        yield np.zeros(1, np.uint32)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Tokenizer, "encode_documents", full)
    with pytest.raises(ConfigError, match=r"data\.cache=.*No space left"):
        load_tokens(data, BPE, 0)
    assert not list(Path(data.cache).glob("*.tmp"))


def test_a_cache_that_cannot_be_a_folder_names_the_option(text_file):
    data = DataConfig("text", path=str(text_file), cache=str(text_file))
    with pytest.raises(ConfigError, match=r"data\.cache="):
        load_tokens(data, BPE, 0)


def test_synthetic_tokens_are_uniform_and_the_same_every_time(tmp_path):
    data = DataConfig("synthetic", cache=str(tmp_path / "cache"))
    tokens, again = load_tokens(data, BPE, 50), load_tokens(data, BPE, 50)
    assert len(tokens.train) == 1 << 20
    assert tokens.vocab_size == 50
    assert tokens.tokenizer is None
    frequencies = np.bincount(tokens.train, minlength=50) / len(tokens.train)
    assert len(frequencies) == 50
    np.testing.assert_allclose(frequencies, 1 / 50, rtol=0.05)
    np.testing.assert_array_equal(tokens.valid, again.valid)
    assert tokens.counts["test"].words is None
    assert tokens.counts["test"].bytes is None
    assert not (tmp_path / "cache").exists()
