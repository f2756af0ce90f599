from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.waiting import PATIENCE

from muse.config import DataConfig
from muse.data import SPLITS, Corpus, count_words, hub, load_corpus
from muse.errors import ConfigError


def test_stdlib_splits_are_disjoint_and_about_90_5_5():
    corpus = load_corpus(DataConfig("stdlib"))
    sizes = {split: sum(map(len, corpus.split(split))) for split in SPLITS}
    total = sum(sizes.values())
    assert 5e6 < total < 15e6
    assert 0.8 < sizes["train"] / total < 0.97
    assert min(sizes.values()) > 100_000
    texts = [set(corpus.split(split)) for split in SPLITS]
    assert not (texts[1] | texts[2]) & texts[0]
    assert not texts[1] & texts[2]


def test_stdlib_is_the_same_every_time_and_has_no_tests():
    first, second = load_corpus(DataConfig("stdlib")), load_corpus(DataConfig("stdlib"))
    assert [first.digest(split) for split in SPLITS] == [second.digest(split) for split in SPLITS]
    documents = first.train + first.valid + first.test
    tests = Path(os.__file__).parent / "test" / "test_json" / "__init__.py"
    if tests.is_file():
        assert tests.read_text(encoding="utf-8") not in documents


def test_digest_depends_on_content_and_boundaries():
    corpus = Corpus(["ab", "c"], ["a", "bc"], ["ab", "c"])
    assert corpus.digest("train") != corpus.digest("valid")
    assert corpus.digest("train") == corpus.digest("test")


@pytest.mark.parametrize(
    ("text", "words"), [("", 0), ("a b\n", 3), ("a b", 3), ("\n\n", 2), (" a \n \nb", 5)]
)
def test_count_words_adds_one_end_a_line(text, words):
    assert count_words(text) == words


def test_a_single_file_is_cut_at_lines(text_file):
    corpus = load_corpus(DataConfig("text", path=str(text_file)))
    text = text_file.read_text(encoding="utf-8")
    (train,), (valid,), (test,) = corpus.train, corpus.valid, corpus.test
    assert train + valid + test == text
    assert train.endswith("\n")
    assert valid.endswith("\n")
    assert len(train) == pytest.approx(0.9 * len(text), rel=0.02)
    assert len(valid) == pytest.approx(0.05 * len(text), rel=0.2)


def test_a_folder_is_split_by_path_and_ignores_what_is_no_text(tmp_path):
    for index in range(40):
        path = tmp_path / f"part{index % 3}" / f"{index}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text {index}\n", encoding="utf-8")
    (tmp_path / "picture.bin").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / ".hidden").write_text("hidden", encoding="utf-8")
    corpus = load_corpus(DataConfig("text", path=str(tmp_path)))
    assert sorted(corpus.train + corpus.valid + corpus.test) == sorted(f"text {n}\n" for n in range(40))
    (tmp_path / "part0" / "0.txt").write_text("changed\n", encoding="utf-8")
    changed = load_corpus(DataConfig("text", path=str(tmp_path)))
    assert [len(changed.split(split)) for split in SPLITS] == [len(corpus.split(split)) for split in SPLITS]


@pytest.mark.parametrize("count", [3, 4, 5])
def test_a_small_folder_gives_every_split_a_file(tmp_path, count):
    for index in range(count):
        (tmp_path / f"{index}.txt").write_text(f"text {index}\r\n", encoding="utf-8", newline="")
    corpus = load_corpus(DataConfig("text", path=str(tmp_path)))
    assert all(corpus.split(split) for split in SPLITS)
    assert sorted(corpus.train + corpus.valid + corpus.test) == [f"text {n}\n" for n in range(count)]


@pytest.mark.parametrize("content", [None, b"", b"one line only\n", b"\xff\xfe\x00"])
def test_unusable_files_name_the_option(tmp_path, content):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"data\.path="):
        load_corpus(DataConfig("text", path=str(path)))


def test_unusable_folders_name_the_option(tmp_path):
    for config in (DataConfig("text", path=str(tmp_path)), DataConfig("wikitext2", path=str(tmp_path))):
        with pytest.raises(ConfigError, match=r"data\.path="):
            load_corpus(config)


def write_files(root: Path, texts: dict[str, str]) -> DataConfig:
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return DataConfig("text", path=str(root))


def test_a_folder_with_splits_is_read_as_named(tmp_path, caplog):
    texts = {"train.txt": "train\n" * 500, "valid.txt": "valid\n" * 50, "test.txt": "test\n" * 50}
    config = write_files(tmp_path, {**texts, "README.md": "about it\n" * 9000})
    with caplog.at_level(logging.INFO):
        corpus = load_corpus(config)
    assert [corpus.split(split) for split in SPLITS] == [[text] for text in texts.values()]
    (told,) = caplog.messages
    assert told == f"data.path={tmp_path}: 1 left out, beside the splits: README.md"


def test_a_folder_of_a_split_holds_its_documents(tmp_path, caplog):
    config = write_files(
        tmp_path,
        {
            "train/b/1.txt": "one",
            "train/a.txt": "two",
            "train/c.csv": "a,b",
            "val/1.txt": "three",
            "test.txt": "four",
        },
    )
    with caplog.at_level(logging.WARNING):
        assert load_corpus(config) == Corpus(["two", "one"], ["three"], ["four"])
    assert caplog.messages == [f"data.path={tmp_path}: 1 left out, records, not plain text: train/c.csv"]


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        (["train"], "validation and no test"),
        (["train", "valid"], "test"),
        (["train", "test"], "validation"),
    ],
)
def test_splits_that_are_missing_are_held_out_of_the_training_text(tmp_path, caplog, there, missing):
    texts = {f"{split}.txt": "".join(f"{split} {n}\n" for n in range(1000)) for split in there}
    with caplog.at_level(logging.INFO):
        corpus = load_corpus(write_files(tmp_path, texts))
    assert f"names no {missing} split: 5 % of the training text for each, from its end" in caplog.text
    held_out = [split for split in SPLITS if split not in there]
    assert "".join(corpus.split(split)[0] for split in ("train", *held_out)) == texts["train.txt"]
    for split in there[1:]:
        assert corpus.split(split) == [texts[f"{split}.txt"]], "what is named is left as it is"


def test_documents_of_a_training_folder_are_held_out_whole(tmp_path, caplog):
    texts = {f"train/{n}.txt": f"document {n}" for n in range(60)}
    with caplog.at_level(logging.INFO):
        corpus = load_corpus(write_files(tmp_path, {**texts, "test.txt": "test"}))
    assert sorted(corpus.train + corpus.valid) == sorted(texts.values())
    assert 1 <= len(corpus.valid) <= 10
    assert corpus.test == ["test"]
    assert (
        "no validation split: 5 % of the training text for each, by a hash of the names of its 60 files"
        in (caplog.text)
    )


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ({"train.jsonl": "{}\n", "valid.txt": "text"}, ": train.jsonl cannot be trained on: records"),
        ({"train.txt": "text", "test.txt": ""}, ": test.txt cannot be trained on: no text"),
        ({"train/a.jsonl": "{}\n"}, ": train holds mostly .jsonl (a.jsonl)"),
        ({"train/a.bin": "\0"}, ": train holds no text (a.bin: no text in UTF-8)"),
        (
            {"data/a.csv": "a,b\n" * 50, "data/b.json": "{}", "README.md": "a,b"},
            "mostly .csv, .json (data/a.csv)",
        ),
        ({"a.jsonl": "{}\n"}, "holds mostly .jsonl"),
        ({"a.bin": "\0", "b.bin": "\0"}, "holds no text (a.bin: no text in UTF-8)"),
        ({}, "holds no text; give"),
        (
            {"train.txt": "text"},
            "has a training text of 4 characters; to hold validation and test text out of it",
        ),
        (
            {"valid.txt": "text", "other.txt": "text"},
            "holds valid.txt, by its name the validation split, but no",
        ),
    ],
)
def test_a_folder_that_would_train_on_the_wrong_text_is_refused(tmp_path, texts, told):
    with pytest.raises(ConfigError, match=re.escape(told)) as raised:
        load_corpus(write_files(tmp_path, texts))
    assert str(raised.value).startswith(f"data.path={tmp_path}")
    assert "\n" not in str(raised.value)


def test_few_records_beside_much_text_are_left_out(tmp_path, caplog):
    texts = {f"{n}.py": f"source {n}\n" for n in range(5)}
    corpus = load_corpus(write_files(tmp_path, {**texts, "package.json": "{}"}))
    assert sorted(corpus.train + corpus.valid + corpus.test) == sorted(texts.values())
    assert "1 left out, records, not plain text: package.json" in caplog.text


def test_a_file_of_records_is_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n' * 500, encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"data\.path=.*data\.jsonl cannot be trained on: records, not plain text"
    ):
        load_corpus(DataConfig("text", path=str(path)))


@pytest.mark.parametrize("lines", [1, 3])
def test_a_long_file_of_few_lines_is_split(tmp_path, lines):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(["words without an end of line " * 1000] * lines), encoding="utf-8")
    corpus = load_corpus(DataConfig("text", path=str(path)))
    sizes = [len(text) for split in SPLITS for text in corpus.split(split)]
    assert sum(sizes) == path.stat().st_size
    assert sizes[0] == pytest.approx(0.9 * sum(sizes), rel=0.01)
    assert sizes[1] == pytest.approx(sizes[2], rel=0.1)


def test_synthetic_has_no_text():
    with pytest.raises(ConfigError, match="data=synthetic"):
        load_corpus(DataConfig("synthetic"))


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "validation.txt", "test.txt"),
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"),
        ("Train.txt", "dev.txt", "test.txt"),
    ],
)
def test_wikitext2_folder_names(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text(f" \n = {name} = \n", encoding="utf-8")
    corpus = load_corpus(DataConfig("wikitext2", path=str(tmp_path)))
    assert [corpus.split(split) for split in SPLITS] == [[f" \n = {name} = \n"] for name in names]


def test_wikitext2_has_the_published_sizes(wikitext2):
    corpus = load_corpus(DataConfig("wikitext2", path=str(wikitext2)))
    words = [sum(map(count_words, corpus.split(split))) for split in SPLITS]
    assert words == [2_088_628, 217_646, 245_569]
    assert sum(len(text.encode()) for text in corpus.train) == 10_797_148


def test_the_hub_gives_the_published_text(monkeypatch):
    # The hub strips blank lines to empty rows and keeps the line feeds of the others.
    rows = {"train": ["", " = A = \n", ""], "validation": [" b \n"], "test": [" c \n", ""]}
    fake = SimpleNamespace(
        config=SimpleNamespace(HF_HUB_OFFLINE=False),
        load_dataset=lambda name, variant: {split: {"text": texts} for split, texts in rows.items()},
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(hub, "reachable", lambda: False)
    corpus = load_corpus(DataConfig("wikitext2"))
    assert corpus == Corpus([" \n = A = \n \n"], [" b \n"], [" c \n \n"])
    assert fake.config.HF_HUB_OFFLINE is False


OFFLINE = """
from pathlib import Path
from muse.config import DataConfig, TokenizerConfig
from muse.errors import ConfigError
from muse.data import Corpus, build_tokenizer, load_corpus
for call in (
    lambda: load_corpus(DataConfig("wikitext2")),
    lambda: build_tokenizer(TokenizerConfig("gpt2"), Corpus([], [], []), Path("cache")),
):
    try:
        call()
    except ConfigError as error:
        print(error)
"""


@pytest.fixture
def broken_hub():
    """The address of a hub that answers everything with an error, and a list of what it was asked."""
    asked = []

    class Broken(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.requestline)
            self.send_error(503)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Broken) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()
        thread.join()


def test_an_unreachable_hub_is_asked_once_and_what_to_do_is_said(tmp_path, broken_hub):
    endpoint, asked = broken_hub
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    result = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        env=environment,
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    # Once in each of the two calls; the hub's own client asks for data again and again.
    assert asked.count("HEAD / HTTP/1.1") == 2
    assert not [line for line in asked if "wikitext" in line or "gpt2" in line]
    wikitext2, gpt2 = result.stdout.splitlines()
    assert wikitext2.startswith("data=wikitext2")
    assert "data.path=<folder" in wikitext2
    assert gpt2.startswith("tokenizer=gpt2")
    assert "tokenizer.path=<folder" in gpt2
