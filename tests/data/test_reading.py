from __future__ import annotations

import codecs
import os
from pathlib import Path

import pytest

from muse.data.reading import NotTextError, read_folder, read_text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a\r\nb\n", "a\nb\n"),
        (codecs.BOM_UTF8 + "é\n".encode(), "é\n"),
        # Only at the beginning it is a mark.
        ("a\ufeffb".encode(), "a\ufeffb"),
    ],
)
def test_text_has_line_feeds_and_no_byte_order_mark(tmp_path, content, text):
    (tmp_path / "a.txt").write_bytes(content)
    assert read_text(tmp_path / "a.txt") == text


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b'{"text": "a"}\n', "records, not plain text; write the text of each record"),
        ("a.NDJSON", b'{"text": "a"}\n', "records"),
        ("a.json", b'[{"text": "a"}]', "records"),
        ("a.csv", b"text\na\n", "records"),
        ("a.tsv", b"text\ta\n", "records"),
        ("a.parquet", b"PAR1", "records"),
        ("a.txt.gz", b"\x1f\x8b", "compressed; unpack it"),
        ("a.zip", b"PK", "compressed; unpack it"),
        ("a.zst", b"\x28\xb5\x2f\xfd", "compressed; unpack it"),
        ("a.txt", "text".encode("utf-16"), "text in UTF-16, not in UTF-8; convert it"),
        ("a.txt", codecs.BOM_UTF16_BE + "text".encode("utf-16-be"), "UTF-16"),
        ("a.txt", "naïve".encode("latin-1"), "no text in UTF-8"),
        ("a.txt", b"a\0b", "no text in UTF-8"),
        ("a.txt", b"", "no text; give"),
        ("a.txt", codecs.BOM_UTF8 + b" \r\n", "no text; give"),
    ],
)
def test_what_is_no_plain_text_is_told(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NotTextError, match=told):
        read_text(tmp_path / name)


def test_a_folder_says_what_it_left_out(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.txt").write_text("text", encoding="utf-8")
    (tmp_path / "inner" / "b.jsonl").write_bytes(b"{}\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "mail.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "windows.txt").write_bytes("text".encode("utf-16"))
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / ".hidden").write_text("hidden", encoding="utf-8")
    read = read_folder(tmp_path)
    assert read.texts == {"inner/a.txt": "text"}
    assert read.left_out == {
        "records, not plain text": ["inner/b.jsonl"],
        "no text in UTF-8": ["mail.txt", "picture.png"],
        "text in UTF-16, not in UTF-8": ["windows.txt"],
    }
    assert (read.bytes, read.record_bytes) == (4, 3)


def test_a_folder_that_cannot_be_read_is_left_out_and_told(tmp_path, monkeypatch):
    for name in ("closed", "open"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name, encoding="utf-8")
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    read = read_folder(tmp_path)
    assert read.texts == {"open/a.txt": "open"}
    assert read.left_out == {"not readable (Permission denied)": ["closed"]}
