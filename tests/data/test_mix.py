"""data=mix: texts of several places, each as if it stood alone, and one tokenizer for all."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muse.config import DataConfig, SourceConfig, TokenizerConfig
from muse.data import SPLITS, Mix, building, files, load_tokens, tokens
from muse.data.mix import find_mix
from muse.errors import ConfigError

BPE = TokenizerConfig("bpe", 300)


@pytest.fixture
def mixed(tmp_path):
    """A configuration of records and of plain text, which differ in their letters."""
    records = tmp_path / "records.jsonl"
    lines = [json.dumps({"body": f"abc {n} cab bca " * 5}) for n in range(300)]
    records.write_text("\n".join(lines), encoding="utf-8")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"xyz {n} zyx yzx\n" for n in range(3000)), encoding="utf-8")

    def config(**sources: Any) -> DataConfig:
        found = {
            "records": SourceConfig(weight=3, path=str(records), column="body"),
            "text": SourceConfig(weight=1, data="text", path=str(text)),
        }
        return DataConfig("mix", sources=found | sources, cache=str(tmp_path / "cache"))

    return config


def test_each_source_has_the_tokens_that_it_has_alone(mixed):
    config = mixed()
    together = load_tokens(config, BPE, 0)
    assert isinstance(together.train, Mix)
    assert together.train.names == ("data.sources.records", "data.sources.text")
    assert together.train.weights == (0.75, 0.25)
    alone = [load_tokens(config.source(name), BPE, 0, together.tokenizer) for name in config.sources]
    for stream, data in zip(together.train.tokens, alone, strict=True):
        assert np.array_equal(stream, data.train)
    for split in ("valid", "test"):
        assert np.array_equal(getattr(together, split), np.concatenate([getattr(d, split) for d in alone]))
    for split in SPLITS:
        for size in ("tokens", "words", "bytes"):
            sizes = [getattr(data.counts[split], size) for data in alone]
            assert getattr(together.counts[split], size) == sum(sizes)
    assert together.vocab_size == 300


def test_what_is_in_the_cache_is_written_once(mixed, monkeypatch):
    first = load_tokens(mixed(), BPE, 0)
    monkeypatch.setattr(tokens, "atomic_write", lambda *_: pytest.fail("written again"))
    monkeypatch.setattr(building, "build", lambda *_: pytest.fail("built again"))
    again = load_tokens(mixed(), BPE, 0)
    assert np.array_equal(first.valid, again.valid)


def test_the_log_tells_documents_bytes_and_tokens_of_each_source(mixed, caplog):
    with caplog.at_level(logging.INFO):
        found = load_tokens(mixed(), BPE, 0)
    begin = caplog.messages.index("data.sources.records, 75 % of the training windows:")
    then = caplog.messages.index("data.sources.text, 25 % of the training windows:")
    for lines, stream in zip(
        (caplog.messages[begin:then], caplog.messages[then:]), found.train.tokens, strict=True
    ):
        (told,) = (line for line in lines if line.startswith("training split: documents "))
        assert told.endswith(f", tokens {len(stream)}")
        assert ", bytes " in told
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_tokenizer_is_trained_on_all_by_weight(mixed, monkeypatch):
    monkeypatch.setattr(files, "SAMPLE_CHARACTERS", 4000)
    monkeypatch.setattr("muse.data.mix.SAMPLE_CHARACTERS", 4000)
    sample = "".join(find_mix(mixed()).sample())
    # A whole record more, as the end of what is read of a file.
    assert 3000 <= sum(map(sample.count, "abc 0123456789")) <= 4200
    assert 0.15 < sample.count("x") / sample.count("a") < 0.5
    several = load_tokens(mixed(), BPE, 0)
    assert several.tokenizer is not None
    assert len(several.tokenizer.encode("bca")) < 3
    assert len(several.tokenizer.encode("yzx")) < 3


def test_another_weight_may_be_another_tokenizer(mixed):
    digests = {
        find_mix(
            mixed(**{"text": SourceConfig(weight=weight, data="text", path=mixed().sources["text"].path)})
        ).digest("train")
        for weight in (1, 2)
    }
    assert len(digests) == 2


def test_a_word_tokenizer_has_the_words_of_all(mixed):
    found = load_tokens(mixed(), TokenizerConfig("word"), 0)
    assert found.tokenizer is not None
    for word in ("cab", "zyx"):
        assert found.tokenizer.decode(found.tokenizer.encode(word)) == word


def test_what_is_wrong_names_the_source(mixed, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\nno JSON\n', encoding="utf-8")
    for name, message in (("none.txt", "none.txt does not exist"), ("broken.jsonl", "row 2: no JSON")):
        config = mixed(bad=SourceConfig(path=str(tmp_path / name)))
        with pytest.raises(ConfigError, match=rf"data\.sources\.bad: data\.path=.*{message}") as caught:
            load_tokens(config, TokenizerConfig("word"), 0)
        assert "\n" not in str(caught.value)


def test_a_source_moves_as_others_do(mixed, tmp_path):
    config = mixed()
    load_tokens(config, BPE, 0)
    before = sorted(Path(config.cache).iterdir())
    moved = Path(config.sources["records"].path or "").rename(tmp_path / "moved.jsonl")
    load_tokens(mixed(records=SourceConfig(weight=3, path=str(moved), column="body")), BPE, 0)
    assert sorted(Path(config.cache).iterdir()) == before
