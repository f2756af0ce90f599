from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from waiting import PATIENCE

from muse.config import ConfigError, DataConfig
from muse.data import SPLITS, Corpus, count_words, hub, load_corpus


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


def test_synthetic_has_no_text():
    with pytest.raises(ConfigError, match="data=synthetic"):
        load_corpus(DataConfig("synthetic"))


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "validation.txt", "test.txt"),
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"),
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
from muse.config import ConfigError, DataConfig, TokenizerConfig
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
