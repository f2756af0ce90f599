from __future__ import annotations

import logging

import numpy as np
import pytest

from muse.config import ConfigError, DataConfig, TokenizerConfig
from muse.data import Corpus, Tokenizer, build_tokenizer, count_words, load_corpus
from muse.data import tokenizer as module

STRANGE = [
    "",
    "plain words",
    "  leading, trailing  ",
    "tabs\t\tand\n\n\n    indents\r\n",
    "naïve 漢字 🙂 \u2028 \xa0 \x1c \x85 it's",
    "<|endoftext|> spelled out",
]


@pytest.fixture
def bpe(small_corpus, tmp_path) -> Tokenizer:
    return build_tokenizer(TokenizerConfig("bpe", 400), small_corpus, tmp_path)


@pytest.mark.parametrize("text", STRANGE)
def test_bpe_round_trip(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.end_id not in ids
    assert all(0 <= index < bpe.vocab_size for index in ids)


def test_bpe_has_the_size_asked_for_and_all_bytes(bpe, small_corpus, tmp_path):
    assert bpe.vocab_size == 400
    smallest = build_tokenizer(TokenizerConfig("bpe", 257), small_corpus, tmp_path)
    assert smallest.vocab_size == 257
    assert len(smallest.encode("漢字")) == 6


def test_bpe_training_is_deterministic(bpe, small_corpus, tmp_path):
    again = build_tokenizer(TokenizerConfig("bpe", 400), small_corpus, tmp_path / "other")
    assert again.model.to_str() == bpe.model.to_str()
    assert again.digest == bpe.digest


def test_bpe_is_trained_once(bpe, small_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_train_bpe", lambda *_: pytest.fail("trained again"))
    again = build_tokenizer(TokenizerConfig("bpe", 400), small_corpus, tmp_path)
    assert again.digest == bpe.digest
    assert again.encode("<|endoftext|>") == bpe.encode("<|endoftext|>")
    changed_splits = Corpus(small_corpus.train, ["other"], ["other"])
    build_tokenizer(TokenizerConfig("bpe", 400), changed_splits, tmp_path)
    changed_text = Corpus([*small_corpus.train, "more"], small_corpus.valid, small_corpus.test)
    with pytest.raises(pytest.fail.Exception):
        build_tokenizer(TokenizerConfig("bpe", 400), changed_text, tmp_path)


def test_a_damaged_tokenizer_is_trained_again(bpe, small_corpus, tmp_path, caplog):
    (path,) = tmp_path.glob("bpe-*.json")
    path.write_bytes(path.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        again = build_tokenizer(TokenizerConfig("bpe", 400), small_corpus, tmp_path)
    assert "damaged" in caplog.text
    assert again.digest == bpe.digest


def test_documents_end_with_the_end_token(bpe):
    ids = np.concatenate(list(bpe.encode_documents(["one", "", "two\n"])))
    assert ids.tolist() == [*bpe.encode("one"), bpe.end_id, bpe.end_id, *bpe.encode("two\n"), bpe.end_id]


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_cutting_long_documents_does_not_change_the_tokens(bpe, small_corpus, monkeypatch, chunk):
    documents = [*small_corpus.valid, *STRANGE, "\n".join(STRANGE) * 3]
    whole = [index for text in documents for index in [*bpe.encode(text), bpe.end_id]]
    monkeypatch.setattr(module, "CHUNK_CHARACTERS", chunk)
    monkeypatch.setattr(module, "CHUNKS_PER_BATCH", 3)
    assert np.concatenate(list(bpe.encode_documents(documents))).tolist() == whole


def test_words(tmp_path, monkeypatch):
    corpus = Corpus(["the cat sat\n the  cat\n", "no line feed"], ["the dog\n"], ["cat"])
    words = build_tokenizer(TokenizerConfig("word"), corpus, tmp_path)
    assert words.vocab_size == len({"the", "cat", "sat", "no", "line", "feed", "<unk>", "<eos>"})
    assert words.decode(words.encode("the cat\ncat sat")) == "the cat\ncat sat"
    assert words.decode(words.encode("the dog")) == "the <unk>"
    assert words.encode("cat\n") == [*words.encode("cat"), words.end_id]
    monkeypatch.setattr(module, "CHUNK_CHARACTERS", 1)
    ids = np.concatenate(list(words.encode_documents(corpus.train)))
    assert words.decode(ids) == "the cat sat\nthe cat\nno line feed\n"
    assert len(ids) == sum(map(count_words, corpus.train))


def test_words_of_wikitext2(wikitext2, tmp_path):
    corpus = load_corpus(DataConfig("wikitext2", path=str(wikitext2)))
    words = build_tokenizer(TokenizerConfig("word"), corpus, tmp_path)
    assert words.vocab_size == 33_278
    assert sum(map(len, words.encode_documents(corpus.train))) == 2_088_628
    assert sum(map(len, words.encode_documents(corpus.valid))) == 217_646
    assert sum(map(len, words.encode_documents(corpus.test))) == 245_569


def test_gpt2(gpt2, small_corpus, tmp_path):
    tokenizer = build_tokenizer(TokenizerConfig("gpt2", path=str(gpt2)), small_corpus, tmp_path)
    assert (tokenizer.vocab_size, tokenizer.end_id) == (50_257, 50_256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    for text in STRANGE:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gpt2_files_that_are_missing_or_damaged_name_the_option(small_corpus, tmp_path):
    config = TokenizerConfig("gpt2", path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"tokenizer\.path="):
        build_tokenizer(config, small_corpus, tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    for vocab in ("{", '{"a": 0}'):
        (tmp_path / "vocab.json").write_text(vocab, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"tokenizer\.path="):
            build_tokenizer(config, small_corpus, tmp_path)
