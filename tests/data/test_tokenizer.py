from __future__ import annotations

import json
import logging
import random
import re
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from muse.config import DataConfig, TokenizerConfig
from muse.data import Corpus, Tokenizer, build_tokenizer, count_words, load_corpus, tokenizer_of
from muse.data import tokenizer as module
from muse.errors import ConfigError

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


PARTS = ("a", "B", "12", ",", "'s", "é", "漢", "🙂", "e\u0301", " ", "  ", "\n", "\t", "\r\n", "\x1c", "\x1f")
PARTS += ("\x85", "\xa0", "\u2028", "\u3000", "\u200b")
RUNS = ("A", "ACGT", "漢", "漢字。", "a,", "\u0301", "\t", "🙂")


def mixed_text(generator: random.Random) -> str:
    """Short words with runs that are shorter and longer than what is cut, around the limit above all."""
    text = ""
    for _ in range(generator.randint(1, 60)):
        text += generator.choice(PARTS) * generator.randint(1, 3)
        if generator.random() < 0.3:
            text += (generator.choice(RUNS) * module.LONGEST_RUN)[: generator.choice((9, 255, 256, 257, 700))]
    return text


def test_cutting_runs_does_not_change_the_tokens(small_corpus, tmp_path, monkeypatch):
    generator = random.Random(0)
    corpus = Corpus([*small_corpus.train, "ACGT" * 900, "漢字。" * 300], [], [])
    bpe = build_tokenizer(TokenizerConfig("bpe", 400), corpus, tmp_path)
    for _ in range(100):
        text = mixed_text(generator)
        monkeypatch.setattr(module, "CHUNK_CHARACTERS", generator.choice((1, 7, 100, 255, 256, 257, 1000)))
        pieces = [piece for piece, _ in module._pieces(text, cuts_runs=True)]
        assert "".join(pieces) == text
        assert [index for piece in pieces for index in bpe.encode(piece)] == bpe.encode(text)
        assert bpe.decode(bpe.encode(text)) == text


def test_no_token_is_longer_than_a_run(tmp_path):
    bpe = build_tokenizer(TokenizerConfig("bpe", 300), Corpus(["A" * 100_000], [], []), tmp_path)
    assert max(map(len, bpe.model.get_vocab())) <= module.LONGEST_RUN
    pieces = [piece for piece, _ in module._pieces("A" * 100_000, cuts_runs=True)]
    assert max(map(len, pieces)) <= module.CHUNK_CHARACTERS + module.LONGEST_RUN
    ids = np.concatenate(list(bpe.encode_documents(["A" * 100_000])))
    assert bpe.decode(ids[:-1]) == "A" * 100_000


def plain_bpe(documents: list[str], size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE of the library as it is."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), [module.END_OF_TEXT]
    model.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, special_tokens=special, show_progress=False
        ),
    )
    return model


def test_ordinary_text_has_the_merges_and_tokens_of_plain_bpe(small_corpus, tmp_path):
    source = Path(json.__file__).parent
    documents = [*small_corpus.train, *STRANGE, *(path.read_text("utf-8") for path in source.glob("*.py"))]
    bpe = build_tokenizer(TokenizerConfig("bpe", 1000), Corpus(documents, [], []), tmp_path)
    plain = plain_bpe(documents, 1000)
    plain.encode_special_tokens = True
    assert json.loads(bpe.model.to_str())["model"] == json.loads(plain.to_str())["model"]
    for text in documents:
        assert bpe.encode(text) == plain.encode(text).ids


def test_gpt2_does_not_cut_runs(gpt2, small_corpus, tmp_path, monkeypatch):
    tokenizer = build_tokenizer(TokenizerConfig("gpt2", path=str(gpt2)), small_corpus, tmp_path)
    plain = tokenizers.Tokenizer(models.BPE.from_file(str(gpt2 / "vocab.json"), str(gpt2 / "merges.txt")))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    monkeypatch.setattr(module, "CHUNK_CHARACTERS", 100)
    generator = random.Random(1)
    runs = ["".join(generator.choices(letters, k=2000)) for letters in ("ACGT", "漢字。仮名")]
    documents = [*runs, mixed_text(generator)]
    whole = [index for text in documents for index in [*plain.encode(text).ids, tokenizer.end_id]]
    assert np.concatenate(list(tokenizer.encode_documents(documents))).tolist() == whole


def test_another_limit_of_runs_is_another_tokenizer(bpe, small_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_RUN", r"[^\s\x1c-\x1f]{8}")
    other = build_tokenizer(TokenizerConfig("bpe", 400), small_corpus, tmp_path)
    assert other.digest != bpe.digest
    assert len(list(tmp_path.glob("bpe-*.json"))) == 2


def test_what_takes_long_says_so_where_there_is_no_progress_bar(small_corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "PROGRESS_SECONDS", 0.001)
    text = "".join(random.Random(0).choices("ACGT", k=50_000))
    bpe = build_tokenizer(TokenizerConfig("bpe", 400), Corpus([text], [], []), tmp_path)
    assert re.search(r"^training the tokenizer: \d+ s$", capsys.readouterr().out, re.MULTILINE)
    for _ in bpe.encode_documents([text] * 20):
        pass
    assert re.search(r"^tokenising: [\d,]+ of 1,000,000 characters$", capsys.readouterr().out, re.MULTILINE)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for _ in bpe.encode_documents([text] * 20):
        pass
    assert capsys.readouterr().out == ""


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


@pytest.mark.slow
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


@pytest.mark.parametrize("text", STRANGE)
def test_bytes_are_those_of_the_text(small_corpus, tmp_path, text):
    made = build_tokenizer(TokenizerConfig("bytes"), small_corpus, tmp_path)
    assert made.encode(text) == list(text.encode())
    assert made.decode(made.encode(text)) == text
    assert (made.vocab_size, made.end_id) == (257, 256)
    assert b"".join(made.bytes_of(index) for index in range(256)) == bytes(range(256))
    assert not list(tmp_path.iterdir())
    again = tokenizer_of(made.to_json())
    (tokens,) = again.encode_documents([text])
    assert tokens.tolist() == [*text.encode(), 256]


# Words as Llama 3 and Qwen cut them: line feeds go with what is before them.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_tokenizer(
    path: Path, corpus: Corpus, end: str = "<|end_of_text|>", byte_level: bool = True
) -> Path:
    model = tokenizers.Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([cut, level])
    if byte_level:
        model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        corpus.train,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=[end, "<▁x▁>"]),
    )
    model.enable_truncation(5)
    model.enable_padding(length=700)
    model.save(str(path))
    return path


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|end_of_text|>", "</s>"])
def test_a_file_of_hugging_face_encodes_as_the_library_does(small_corpus, tmp_path, monkeypatch, end):
    monkeypatch.setattr(module, "CHUNK_CHARACTERS", 3)
    path = write_tokenizer(tmp_path / "tokenizer.json", small_corpus, end)
    made = build_tokenizer(TokenizerConfig("file", path=str(path)), small_corpus, tmp_path)
    plain = tokenizers.Tokenizer.from_file(str(path))
    plain.no_truncation()
    plain.no_padding()
    texts = ["(a).\n\n  b, 12345;\n" * 20, *(text for text in STRANGE if end not in text)]
    for tokenizer in (made, tokenizer_of(made.to_json())):
        assert tokenizer.end == end
        wanted = [[*plain.encode(text).ids, plain.token_to_id(end)] for text in texts]
        assert np.concatenate(list(tokenizer.encode_documents(texts))).tolist() == list(
            chain.from_iterable(wanted)
        )
        for text in [*texts, f"{end} spelled out"]:
            assert tokenizer.decode(tokenizer.encode(text)) == text
            assert tokenizer.end_id not in tokenizer.encode(text)
        assert b"".join(map(tokenizer.bytes_of, tokenizer.encode(texts[0]))).decode() == texts[0]
        assert tokenizer.bytes_of(plain.token_to_id("<▁x▁>")) == "<▁x▁>".encode()


def test_files_that_are_no_tokenizer_name_the_option(small_corpus, tmp_path):
    (tmp_path / "text.json").write_text("[]", encoding="utf-8")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    write_tokenizer(tmp_path / "other.json", small_corpus, byte_level=False)
    write_tokenizer(tmp_path / "endless.json", small_corpus, "<end>")
    for name, reason in (
        ("none.json", r"cannot be read \(No such file"),
        ("text.json", "is no tokenizer.json"),
        ("binary.json", r"cannot be read \(no text"),
        ("other.json", "is no byte-level tokenizer"),
        ("endless.json", "has no end of text"),
    ):
        config = TokenizerConfig("file", path=str(tmp_path / name))
        with pytest.raises(ConfigError, match=rf"tokenizer\.path=.*{name} {reason}") as caught:
            build_tokenizer(config, small_corpus, tmp_path)
        assert "\n" not in str(caught.value)
