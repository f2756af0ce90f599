"""data=files: the same documents from every format, and what becomes of broken ones."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import logging
import lzma
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from support.waiting import PATIENCE

from muse.config import DataConfig, TokenizerConfig
from muse.data import SPLITS, TokenData, building, documents, files, load_corpus, load_tokens
from muse.data.files import Documents, find_corpus
from muse.errors import ConfigError

BPE = TokenizerConfig("bpe", 300)
TEXTS = [f'Document {n}, "quoted"\n\twith é and 漢字, {n * n};\n' for n in range(150)] + [
    "one line",
    " a\n b ",
]
RECORDS = [{"id": n, "text": text, "tags": [n]} for n, text in enumerate(TEXTS)]
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
}


def as_lines() -> bytes:
    # A blank line is no row's.
    return "\n".join(json.dumps(record, ensure_ascii=record["id"] % 2 == 0) for record in RECORDS).encode()


def as_csv(delimiter: str) -> bytes:
    from io import StringIO

    written = StringIO(newline="")
    writer = csv.writer(written, delimiter=delimiter)
    writer.writerows([("id", "text"), *((record["id"], record["text"]) for record in RECORDS)])
    return written.getvalue().encode()


def as_table(write: Any) -> bytes:
    sink = pa.BufferOutputStream()
    write(pa.Table.from_pylist(RECORDS), sink)
    return sink.getvalue().to_pybytes()


def as_stream(table: pa.Table, sink: Any) -> None:
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


FORMATS = {
    ".jsonl": as_lines,
    "lines.json": as_lines,
    ".json": lambda: json.dumps(RECORDS, indent=1).encode(),
    "texts.json": lambda: json.dumps(TEXTS).encode(),
    ".csv": lambda: as_csv(","),
    ".tsv": lambda: as_csv("\t"),
    ".parquet": lambda: as_table(lambda table, sink: pa.parquet.write_table(table, sink, row_group_size=10)),
    ".arrow": lambda: as_table(as_stream),
    ".feather": lambda: as_table(pa.feather.write_feather),
}


def read(path: Path, **options: Any) -> list[str]:
    """All documents of a file or folder in their order."""
    train = find_corpus(DataConfig("files", path=str(path), **options)).split("train")
    return list(Documents(train.files, train.source, train.column, train.skip_bad))


@pytest.fixture
def put(tmp_path):
    """Write files below a folder, and return a configuration for it."""

    def write(contents: dict[str, bytes | str], **options: Any) -> DataConfig:
        for name, content in contents.items():
            path = tmp_path / "corpus" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        options = {"path": str(tmp_path / "corpus"), "cache": str(tmp_path / "cache")} | options
        return DataConfig("files", **options)

    return write


def lines(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def arrays(tokens: TokenData) -> list[list[int]]:
    return [getattr(tokens, split).tolist() for split in SPLITS]


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_and_packing_has_the_same_documents(tmp_path, suffix, packing, monkeypatch):
    # Values of JSON go over the ends of blocks, as they do in larger files.
    monkeypatch.setattr(documents, "BLOCK", 50)
    path = tmp_path / f"corpus{suffix}{packing}"
    path.write_bytes(PACK[packing](FORMATS[suffix]()))
    assert read(path) == TEXTS


@pytest.mark.parametrize("packing", PACK)
def test_text_files_are_the_documents_of_data_text(put, packing):
    texts = {f"{n:03}.{'py' if n % 2 else 'md'}": text + "\r\n" for n, text in enumerate(TEXTS)}
    config = put({f"{name}{packing}": PACK[packing](text.encode()) for name, text in texts.items()})
    assert config.path is not None
    assert read(Path(config.path)) == [text.replace("\r\n", "\n") for text in texts.values()]


def test_tokens_are_those_of_data_text(put, tmp_path):
    splits = {f"{split}/{n:03}.txt": TEXTS[n] for n, split in enumerate(SPLITS * 20)}
    config = put({**splits, "train/empty.txt": ""})
    plain = DataConfig("text", path=config.path, cache=str(tmp_path / "other"))
    of_text = load_tokens(plain, BPE, 0)
    of_files = load_tokens(config, BPE, 0, of_text.tokenizer)
    assert arrays(of_files) == arrays(of_text)
    assert of_files.counts == of_text.counts
    assert all(isinstance(getattr(of_files, split), np.memmap) for split in SPLITS)
    assert of_files.train.dtype == np.uint16
    # The tokenizer, too, where the sample is all of the text.
    made = load_tokens(config, BPE, 0).tokenizer
    assert made is not None
    assert of_text.tokenizer is not None
    assert made.to_json() == of_text.tokenizer.to_json()
    assert load_corpus(plain).split("valid") == list(find_corpus(config).split("valid"))


def test_a_long_text_is_cut_at_ends_of_lines(put, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_TEXT", 100)
    text = "".join(f"é {n} 漢\n" for n in range(500)) + "漢" * 500
    config = put({"a.txt": text})
    assert config.path is not None
    cut = read(Path(config.path) / "a.txt")
    assert "".join(cut) == text
    assert all(len(part.encode()) <= 210 for part in cut)
    assert all(part.endswith("\n") for part in cut[:40])


@pytest.mark.parametrize(
    ("record", "options", "taken"),
    [
        ({"text": "a", "content": "b", "c": "c"}, {}, "a"),
        ({"content": "b", "c": "c"}, {}, "b"),
        ({"id": 1, "body": "c"}, {}, "c"),
        ({"text": "a", "body": "c"}, {"column": "body"}, "c"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow"])
def test_the_text_column_is_found_or_named(tmp_path, record, options, taken, suffix):
    path = tmp_path / f"corpus{suffix}"
    if suffix.startswith(".json"):
        path.write_text(json.dumps(record), encoding="utf-8")
    elif suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist([record]), path)
    else:
        pa.feather.write_feather(pa.Table.from_pylist([record]), str(path))
    assert read(path, **options) == [taken]


TWO = '{"text": "a"}\n{"text": "b"}\n'
BROKEN = {
    "a line": ({"a.jsonl": TWO + '{"text": "c\n'}, "a.jsonl, row 3: no JSON (", 2),
    "a value": ({"a.jsonl": TWO + "7\n" + TWO}, "a.jsonl, row 3: a value without columns", 4),
    "a column": ({"a.jsonl": TWO + '{"id": 1}\n'}, "a.jsonl, row 3: it has no column text", 2),
    "no text": (
        {"a.jsonl": TWO + '{"text": [1]}\n'},
        "a.jsonl, row 3: its column text holds [1], not text",
        2,
    ),
    "a surrogate": ({"a.jsonl": TWO + '{"text": "\\ud800"}\n'}, "a.jsonl, row 3: half of a surrogate", 2),
    "bytes": ({"a.jsonl": TWO.encode() + b'{"text": "\xff"}\n'}, "a.jsonl, row 3: no text in UTF-8", 2),
    "several columns": (
        {"a.jsonl": '{"x": "a", "y": "b"}\n' + TWO},
        "a.jsonl, row 1: it has no column text or content, and 2 of text (x, y); name one with data.column=",
        2,
    ),
    "a list": ({"a.json": '[{"text": "a"}, {"text": "b"}'}, "a.json, row 3: the list does not end", 2),
    "in a list": ({"a.json": '[{"text": "a"}, {"text": b}, ["c"]' + " " * 99}, "a.json, row 2: no JSON (", 1),
    "fields": ({"a.csv": "text,id\na,1\nb\nc,3\n"}, "a.csv, row 2: 1 fields, where the header has 2", 2),
    "quotes": ({"a.csv": 'text,id\na,1\n"b,2\n'}, "a.csv, row 2: unexpected end of data", 1),
    "an empty shard": ({"a.jsonl": TWO, "b.jsonl": ""}, "b.jsonl, row 1: it has no rows", 2),
    "a header": ({"a.csv": "text\na\nb\n", "b.csv": "text\n"}, "b.csv, row 1: it has no rows", 2),
    "no Parquet": ({"a.jsonl": TWO, "b.parquet": "x"}, "b.parquet, row 1: Parquet", 2),
    "Latin-1": ({"a.txt": b"a\nb\n" * 9000 + b"c\nd\xe9\n"}, "a.txt, row 18002: no text in UTF-8", 0),
    "zeros": ({"a.txt": b"a\nb\n" * 9000 + b"c\nd\0\n"}, "a.txt, row 18002: no text in UTF-8", 0),
    "half a character": ({"a.txt": b"a\n" * 9000 + b"\xe6\xbc"}, "a.txt, row 9001: no text in UTF-8", 1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_told_by_file_and_row_or_counted(put, name):
    contents, told, left = BROKEN[name]
    config = put(contents)
    train = find_corpus(config).split("train")
    # Not only those that are no held-out documents.
    everything = Documents(train.files, train.source)
    with pytest.raises(ConfigError) as caught:
        list(everything)
    message = str(caught.value)
    assert message.startswith(f"data.path={config.path}: {told}")
    assert message.endswith("; repair it, or leave out what is broken with data.skip_bad=true")
    assert "\n" not in message
    everything.skip_bad = True
    assert len(list(everything)) == left
    assert everything.skipped == 1
    assert everything.first_skipped in message


@pytest.mark.parametrize("packing", [packing for packing in PACK if packing])
def test_a_truncated_archive_is_told_by_file_and_row(tmp_path, packing):
    rng = np.random.default_rng(0)
    rows = [{"text": rng.bytes(3000).hex()} for _ in range(300)]
    content = PACK[packing]("\n".join(map(json.dumps, rows)).encode())
    path = tmp_path / f"shard.jsonl{packing}"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=rf"shard\.jsonl\{packing}, row \d+: .*cut off or damaged"):
        read(path)
    kept = read(path, skip_bad=True)
    assert 0 < len(kept) < 300
    assert kept == [row["text"] for row in rows[: len(kept)]]


def test_null_is_no_text(tmp_path):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": ["a", None, "b", ""]}), path)
    with pytest.raises(ConfigError, match=r"a\.parquet, row 2: its column text is null"):
        read(path)
    assert read(path, skip_bad=True) == ["a", "b"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_a_column_that_is_not_there_is_named_with_the_nearest(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(FORMATS[suffix]())
    with pytest.raises(ConfigError, match=r"row 1: it has no column texts \(the nearest: text"):
        read(path, column="texts")
    if suffix in (".parquet", ".arrow"):
        with pytest.raises(ConfigError, match="row 1: its column id holds int64, not text"):
            read(path, column="id")


def test_nothing_but_broken_rows_is_an_error_all_the_same(put):
    config = put({"a.jsonl": "x\n" * 10}, skip_bad=True)
    with pytest.raises(ConfigError, match=r"no document.*the training split.*a\.jsonl, row 1: no JSON"):
        load_tokens(config, TokenizerConfig("word"), 0)
    assert not [path for path in Path(config.cache).iterdir() if not path.name.endswith(".lock")]


def test_what_is_left_out_is_counted_in_the_log_and_refused_later(put, caplog):
    config = put({"a.jsonl": lines(TEXTS) + "x\ny\n"}, skip_bad=True)
    for _ in ("built", "found in the cache"):
        caplog.clear()
        load_tokens(config, BPE, 0)
        assert caplog.messages == [
            f"left out what is broken: 2 rows or rests of files, the first one data.path={config.path}: "
            f"a.jsonl, row {len(TEXTS) + 1}: no JSON (Expecting value at character 1)"
        ]
    config.skip_bad = False
    with pytest.raises(ConfigError, match=r"data\.skip_bad=true"):
        load_tokens(config, BPE, 0)


def test_splits_by_names(put):
    names = {"train": ["data-train-0.jsonl.gz", "data-train-1.jsonl.gz"], "valid": ["data-dev-0.jsonl.gz"]}
    names["test"] = ["data-test-0.jsonl.gz"]
    contents = {
        name: gzip.compress(lines([f"{split} {name}"]).encode()) for split in SPLITS for name in names[split]
    }
    config = put({**contents, "README.md": "about it"})
    expected = {split: [f"{split} {name}" for name in names[split]] for split in SPLITS}
    for path in (config.path, f"{config.path}/*.gz"):
        corpus = find_corpus(DataConfig("files", path=path))
        assert {split: list(corpus.split(split)) for split in SPLITS} == expected


def test_splits_by_paths(put, tmp_path):
    config = put({"a.jsonl": lines(TEXTS[:5]), "v.jsonl": lines(["v"]), "sub/t.txt": "t"})
    given = DataConfig("files", path=config.path, valid=f"{config.path}/v*", test=f"{config.path}/sub")
    corpus = find_corpus(given)
    assert [list(corpus.split(split)) for split in SPLITS] == [TEXTS[:5], ["v"], ["t"]]


def test_splits_by_a_hash_of_the_document(put, caplog):
    texts = [f"document {n}" for n in range(2000)]
    config = put({"a.jsonl": lines(texts[:1000]), "b.jsonl": lines(texts[1000:])})
    with caplog.at_level(logging.INFO):
        corpus = find_corpus(config)
    assert "names no validation and no test split: 5 % of the documents for each, by a hash" in caplog.text
    parts = {split: list(corpus.split(split)) for split in SPLITS}
    assert sorted(text for part in parts.values() for text in part) == sorted(texts)
    assert all(len(parts[split]) == pytest.approx(100, abs=40) for split in ("valid", "test"))
    # Neither where a document is nor which others there are moves it.
    put({"a.jsonl": lines(texts[::-3])})
    assert set(find_corpus(config).split("valid")) >= {
        text for text in texts[1000:] if text in parts["valid"]
    }
    # The test split stays as it is where the validation split is named.
    valid = config.path and str(Path(config.path) / "b.jsonl")
    assert set(find_corpus(DataConfig("files", path=config.path, valid=valid)).split("test")) == {
        text for text in texts[::-3] if text in parts["test"]
    }


def test_too_few_documents_to_hold_any_out_are_told(put):
    with pytest.raises(
        ConfigError, match=r"has no document for the .* split; give more documents, or data\.v"
    ):
        load_tokens(put({"a.jsonl": lines(["one document"] * 3)}), BPE, 0)


@pytest.mark.parametrize(
    ("contents", "options", "told"),
    [
        ({}, {"path": "nowhere"}, "data.path=nowhere does not exist; give a file, a folder or a pattern"),
        ({"a.txt": "a"}, {"test": "no*where"}, "data.test=no*where does not exist"),
        ({"a.zip": b"PK"}, {}, "holds nothing that can be read (a.zip: an archive of several files"),
        ({"a.bin": b"\0"}, {}, "holds nothing that can be read (a.bin: no text in UTF-8)"),
        ({"valid.jsonl": "{}", "b.jsonl": "{}"}, {}, "holds valid.jsonl, by its name the validation split"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(put, contents, options, told):
    with pytest.raises(ConfigError, match=re.escape(told)) as caught:
        find_corpus(put(contents, **options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "taken"), [("a", ["b"]), ("a" * 1000, ["a" * 1000])])
def test_records_and_text_are_not_mixed(put, caplog, text, taken):
    config = put({"README.md": text, "b.jsonl": lines(["b"])})
    assert config.path is not None
    assert list(Documents(find_corpus(config).split("train").files, "x")) == taken
    assert "1 left out, " in caplog.text


def test_documents_are_read_one_at_a_time(put):
    # A document's bytes are on their way through buffers, but no more than some of them.
    texts = [f"{n} " * 2000 for n in range(2000)]
    config = put({"a.jsonl": lines(texts), "b.parquet": b""})
    assert config.path is not None
    pa.parquet.write_table(
        pa.table({"text": texts}), Path(config.path) / "b.parquet", row_group_size=50, compression="none"
    )
    for name in ("a.jsonl", "b.parquet"):
        read_in = Documents((Path(config.path) / name,), "x")
        places = []
        for number, _ in zip(range(1, 1001), read_in, strict=False):
            places.append(read_in.read / read_in.size - number / 2000)
        assert max(places) < 0.1


def test_few_documents_are_in_memory_at_once(put, monkeypatch):
    monkeypatch.setattr(building, "PART_CHARACTERS", 200)
    config = put({"a.jsonl": lines([f"{n:04}" * 10 for n in range(500)])})
    begun = written = most = 0
    read_in, write = Documents.__iter__, building.write_json

    def counted(self):
        nonlocal begun, most
        for document in read_in(self):
            begun += 1
            most = max(most, begun - written)
            yield document

    def told(path, value):
        nonlocal written
        written = begun
        write(path, value)

    made = load_tokens(config, BPE, 0).tokenizer
    monkeypatch.setattr(Documents, "__iter__", counted)
    monkeypatch.setattr(building, "write_json", told)
    load_tokens(DataConfig("files", path=config.path, cache=config.cache + "2"), BPE, 0, made)
    assert begun > 400
    assert most <= 200 // 40


def test_the_sample_of_a_tokenizer_is_from_each_file(put, monkeypatch):
    monkeypatch.setattr(files, "SAMPLE_CHARACTERS", 1000)
    contents = {f"{n}.jsonl": lines([f"{n} {m:010}" for m in range(100 * (n + 1))]) for n in range(3)}
    sample = list(find_corpus(put(contents)).sample())
    assert 1000 <= sum(map(len, sample)) < 1100
    shares = [sum(text.startswith(f"{n} ") for text in sample) for n in range(3)]
    assert shares == pytest.approx([14, 28, 42], abs=2)


@pytest.mark.parametrize("after", [1, 3, 7])
def test_an_interrupted_build_goes_on_and_ends_the_same(put, tmp_path, monkeypatch, caplog, after):
    monkeypatch.setattr(building, "PART_CHARACTERS", 500)
    config = put({"a.jsonl": lines(TEXTS[:80]), "b.jsonl.gz": gzip.compress(lines(TEXTS[80:]).encode())})
    whole = load_tokens(config, BPE, 0)
    config.cache = str(tmp_path / "other")
    encode, calls = type(whole.tokenizer).encode_pieces, 0

    def interrupted(self, part):
        nonlocal calls
        calls += 1
        for tokens in encode(self, part):
            if calls > after:
                # Half of a part is there, and does not count.
                yield tokens[: len(tokens) // 2]
                raise KeyboardInterrupt
            yield tokens

    with monkeypatch.context() as patch:
        patch.setattr(type(whole.tokenizer), "encode_pieces", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_tokens(config, BPE, 0)
    assert not list(Path(config.cache).glob("*.bin"))
    calls = 0
    counted = []
    monkeypatch.setattr(
        type(whole.tokenizer), "encode_pieces", lambda self, part: counted.extend(part) or encode(self, part)
    )
    with caplog.at_level(logging.INFO):
        resumed = load_tokens(config, BPE, 0)
    assert "of the training split are there; going on" in caplog.text
    assert len(counted) < len(TEXTS)
    assert arrays(resumed) == arrays(whole)
    assert resumed.counts == whole.counts
    names = [{path.name for path in Path(cache).iterdir()} for cache in (tmp_path / "cache", config.cache)]
    assert names[0] == names[1]
    assert not [name for name in names[0] if name.startswith(".")]
    for name in names[0]:
        assert (tmp_path / "cache" / name).read_bytes() == (Path(config.cache) / name).read_bytes()


@pytest.mark.parametrize("damage", ["journal", "partial", "tokens", "sizes", "no sizes"])
def test_what_is_damaged_is_built_again(put, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(building, "PART_CHARACTERS", 500)
    config = put({"a.jsonl": lines(TEXTS)})
    whole = load_tokens(config, BPE, 0)
    (path,) = Path(config.cache).glob("tokens-train-*.bin")
    (sizes,) = Path(config.cache).glob("tokens-train-*.json")
    if damage == "tokens":
        path.write_bytes(path.read_bytes()[:-3])
    elif damage == "sizes":
        sizes.write_text("{}x", encoding="utf-8")
    elif damage == "no sizes":
        sizes.unlink()
    else:
        # As an interruption after two parts would leave it, but for the damage.
        content = path.read_bytes()
        path.unlink()
        journal, partial = (path.with_name(f".{path.name}.{kind}.tmp") for kind in ("journal", "partial"))
        told = {**json.loads(sizes.read_text()), "documents": 20, "tokens": 100}
        journal.write_text("{" if damage == "journal" else json.dumps(told), encoding="utf-8")
        partial.write_bytes(content[: 200 if damage == "journal" else 150])
    again = load_tokens(config, BPE, 0)
    assert arrays(again) == arrays(whole)
    assert again.counts == whole.counts


def test_the_key_of_the_cache_is_what_is_read(put, tmp_path):
    def names(config: DataConfig) -> set[str]:
        cache = Path(config.cache)
        load_tokens(config, BPE, 0)
        found = {path.name for path in cache.glob("*.bin")}
        for path in cache.iterdir():
            path.unlink()
        return found

    config = put({"a.jsonl": lines(TEXTS)})
    first = names(config)
    moved = tmp_path / "moved.jsonl"
    moved.write_text(lines(TEXTS), encoding="utf-8")
    assert names(DataConfig("files", path=str(moved), cache=config.cache)) == first
    moved.write_text(lines(TEXTS) + lines(["more"]), encoding="utf-8")
    assert not names(DataConfig("files", path=str(moved), cache=config.cache)) & first


AT_ONCE = """
import sys
from muse.config import DataConfig, TokenizerConfig
from muse.data import building, load_tokens
building.PART_CHARACTERS = 100
data = DataConfig("files", path=sys.argv[1], cache=sys.argv[2])
print(load_tokens(data, TokenizerConfig("bpe", 300), 0).counts)
"""


def test_processes_that_build_at_once_agree(put, tmp_path):
    config = put({"a.jsonl": lines(TEXTS)})
    whole = load_tokens(config, BPE, 0)
    assert config.path is not None
    command = [sys.executable, "-c", AT_ONCE, config.path, str(tmp_path / "other")]
    root = Path(__file__).resolve().parents[2]
    started = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=PATIENCE)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert told == [f"{whole.counts}\n"] * 2
    for path in (tmp_path / "cache").glob("*.bin"):
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
    assert not list((tmp_path / "other").glob(".*"))


def test_how_far_it_is_is_told_with_an_estimate(put, monkeypatch, capsys):
    monkeypatch.setattr("muse.data.tokenizer.PROGRESS_SECONDS", 0.001)
    monkeypatch.setattr(building, "PART_CHARACTERS", 500)
    config = put({"a.jsonl": lines(TEXTS)})
    encode = building.Tokenizer.encode_pieces

    def slow(self, part):
        time.sleep(0.02)
        return encode(self, part)

    monkeypatch.setattr(building.Tokenizer, "encode_pieces", slow)
    load_tokens(config, BPE, 0)
    assert re.search(
        r"tokenising the training split: [\d.]+ of [\d.]+ MB, about \d+ s to go", capsys.readouterr().out
    )
