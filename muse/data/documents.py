"""The documents of one file, one at a time: plain text or records of any format, packed or not."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from muse.options import nearest

# Columns that hold the text where none is named.
TEXT_COLUMNS = ("text", "content")
# Bytes of plain text that are one document; a longer file is cut at the next end of a line.
LONGEST_TEXT = 1 << 20
# Characters of JSON that are read at once.
BLOCK = 1 << 18
# Rows of Parquet that are in memory at once, beside what of its row group is packed.
ROWS = 64
# An error so near the end of what was read may be the end's.
LONGEST_ESCAPE = 12


class Broken(ValueError):
    """What of a file cannot be read: yielded, one row of it; raised, all from there on.

    Attributes:
        reason: what is wrong.
        row: which one it is, from 1; None for the one after those that were read.
    """

    def __init__(self, reason: str, row: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.row = row


# The number of a row, or of a text's last line, and the document in it.
Row = tuple[int, str | Broken]
Reader = Callable[[IO[bytes], str | None], Iterator[Row]]


def suffixes(path: Path) -> tuple[str, str]:
    """The suffixes of a file that tell its format and how it is packed, in lower case; or ``""``."""
    packing = path.suffix.lower()
    if packing not in UNPACKED:
        return packing, ""
    return Path(path.stem).suffix.lower(), packing


def rows_of(raw: IO[bytes], path: Path, column: str | None) -> Iterator[Row]:
    """The documents of a file, and what of it is broken.

    Args:
        raw: the file, open for reading; where it stands tells how far the reading is.
        path: its name, whose suffixes say what it holds.
        column: of records, which holds the text; None for the one called text or content or else the only
            one that holds text.

    Yields:
        The number of a row, from 1, and its document, which may be empty, or what is wrong with it. Where a
        file cannot be read any further the last one says so.
    """
    kind, packing = suffixes(path)
    row = 0
    try:
        stream = UNPACKED[packing](raw)
        if packing and kind in COLUMNAR:
            stream = _on_disk(stream)
        for row, item in RECORDS.get(kind, _plain)(stream, column):
            yield row, item if isinstance(item, Broken) else _whole(item)
    except Broken as error:
        yield error.row or row + 1, error
    except (OSError, EOFError, ValueError, NotImplementedError, zlib.error, lzma.LZMAError) as error:
        yield row + 1, Broken(_reason(error, packing))
    else:
        if row == 0 and kind in RECORDS:
            yield 1, Broken("it has no rows")


def is_text(path: Path) -> bool:
    """Whether a file begins as text in UTF-8 does; one that cannot be unpacked may."""
    try:
        with open(path, "rb") as raw:
            begin = UNPACKED[suffixes(path)[1]](raw).read(1 << 14)
        return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(begin)
    except UnicodeDecodeError:
        return False
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
        return True


def _whole(text: str) -> str | Broken:
    try:
        text.encode()
    except UnicodeEncodeError:
        return Broken("half of a surrogate pair, which is no text in UTF-8")
    return text


def _reason(error: Exception, packing: str) -> str:
    if isinstance(error, UnicodeError):
        return "no text in UTF-8"
    told = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"it is cut off or damaged ({told})" if packing else told


def _on_disk(stream: IO[bytes]) -> IO[bytes]:
    """What is in a stream in a file without a name, in which a reader may go back and forth."""
    file = tempfile.TemporaryFile()  # noqa: SIM115
    shutil.copyfileobj(stream, file)
    file.seek(0)
    return cast(IO[bytes], file)


def _zst(raw: IO[bytes]) -> IO[bytes]:
    import pyarrow

    return cast(
        IO[bytes], io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
    )


def _plain(stream: IO[bytes], column: str | None) -> Iterator[Row]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines = 0
    while block := stream.read(LONGEST_TEXT):
        block += stream.readline(LONGEST_TEXT)
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError as error:
            before = error.object[: error.start].count(b"\n")
            raise Broken("no text in UTF-8", lines + before + 1) from error
        if "\0" in text:
            raise Broken("no text in UTF-8", lines + text[: text.index("\0")].count("\n") + 1)
        lines += block.count(b"\n")
        yield lines, text.replace("\r\n", "\n")
    decoder.decode(b"", final=True)


def _json_lines(stream: IO[bytes], column: str | None) -> Iterator[Row]:
    return _texts(enumerate(map(_json_line, stream), 1), column)


def _json_line(line: bytes) -> Any:
    if not line.strip():
        return ""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return Broken(f"no JSON ({error.msg} at character {error.pos + 1})")
    except UnicodeError:
        return Broken("no text in UTF-8")
    except RecursionError:
        return Broken("JSON that is nested too deeply")


def _json_values(stream: IO[bytes], column: str | None) -> Iterator[Row]:
    return _texts(enumerate(_values(stream), 1), column)


def _values(stream: IO[bytes]) -> Iterator[Any]:
    """The values of a list in JSON, or those that follow each other."""
    characters = io.TextIOWrapper(cast(Any, stream), encoding="utf-8-sig")
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    text = characters.read(BLOCK)
    place = len(text) - len(text.lstrip())
    listed = text.startswith("[", place)
    place += listed
    while True:
        place = between.match(text, place).end()  # type: ignore[union-attr]
        if listed and text.startswith("]", place):
            return
        missing: str | None = "the list does not end" if listed else None
        if place < len(text):
            try:
                value, place = decoder.raw_decode(text, place)
            except json.JSONDecodeError as error:
                missing = f"no JSON ({error.msg})"
                if not error.msg.startswith("Unterminated") and error.pos < len(text) - LONGEST_ESCAPE:
                    raise Broken(missing) from error
            else:
                yield value
                continue
        # As much again as there is, so that a long value is not begun too often.
        more = characters.read(max(BLOCK, len(text) - place))
        if not more and missing is not None:
            raise Broken(missing)
        if not more:
            return
        text, place = text[place:] + more, 0


def _csv(delimiter: str) -> Reader:
    def rows(stream: IO[bytes], column: str | None) -> Iterator[Row]:
        return _texts(enumerate(_lines_of_table(stream, delimiter), 1), column)

    return rows


def _lines_of_table(stream: IO[bytes], delimiter: str) -> Iterator[dict[str, str] | Broken]:
    # A text may be longer than the fields that the library takes by default.
    csv.field_size_limit(1 << 26)
    characters = io.TextIOWrapper(cast(Any, stream), encoding="utf-8-sig", newline="")
    reader = csv.reader(characters, delimiter=delimiter, strict=True)
    header = next(reader, None)
    while header is not None:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Broken(str(error))
            continue
        if fields and len(fields) != len(header):
            yield Broken(f"{len(fields)} fields, where the header has {len(header)}")
        elif fields:
            yield dict(zip(header, fields, strict=True))


def _parquet(stream: IO[bytes], column: str | None) -> Iterator[Row]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(stream)
    names = [_column_of_schema(file.schema_arrow, column)]
    groups = range(file.num_row_groups)
    # One after the other, or they all would be read first.
    batches = (batch for group in groups for batch in file.iter_batches(ROWS, [group], names))
    return _values_of_batches(batches, names[0])


def _arrow(stream: IO[bytes], column: str | None) -> Iterator[Row]:
    import pyarrow

    begin = stream.read(6)
    stream.seek(0)
    if begin != b"ARROW1":
        opened = pyarrow.ipc.open_stream(stream)
        batches = iter(opened)
    else:
        opened = pyarrow.ipc.open_file(stream)
        batches = map(opened.get_batch, range(opened.num_record_batches))
    name = _column_of_schema(opened.schema, column)
    return _values_of_batches((batch.select([name]) for batch in batches), name)


def _column_of_schema(schema: Any, column: str | None) -> str:
    from pyarrow import types

    def holds_text(kind: Any) -> bool:
        if types.is_dictionary(kind):
            kind = kind.value_type
        return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)

    columns = {field.name: holds_text(field.type) for field in schema}
    found = _column_of(columns, column)
    if not columns[found]:
        raise Broken(f"its column {found} holds {schema.field(found).type}, not text")
    return found


def _values_of_batches(batches: Iterable[Any], column: str) -> Iterator[Row]:
    row = 0
    for batch in batches:
        for value in batch.column(0):
            row += 1
            text = value.as_py()
            yield row, text if text is not None else Broken(f"its column {column} is null")


def _texts(records: Iterable[tuple[int, Any]], column: str | None) -> Iterator[Row]:
    """The text of each record; the first one that has it says in which column, where none is named."""
    for row, record in records:
        if isinstance(record, str | Broken):
            yield row, record
        elif not isinstance(record, dict):
            yield row, Broken("a value without columns")
        else:
            try:
                column = _column_of({name: isinstance(value, str) for name, value in record.items()}, column)
            except Broken as error:
                yield row, error
                continue
            value = record[column]
            yield (
                row,
                value
                if isinstance(value, str)
                else Broken(f"its column {column} holds {json.dumps(value)[:40]}, not text"),
            )


def _column_of(columns: Mapping[str, bool], wanted: str | None) -> str:
    """The column that holds the text.

    Args:
        columns: whether each one holds text.
        wanted: the one that is named, if any.

    Raises:
        Broken: there is none, or there are several.
    """
    if wanted is not None:
        if wanted in columns:
            return wanted
        alike = nearest(wanted, columns) or list(columns)
        raise Broken(
            f"it has no column {wanted} (the nearest: {', '.join(alike)})" if alike else "it is empty"
        )
    for name in TEXT_COLUMNS:
        if columns.get(name):
            return name
    of_text = [name for name, holds in columns.items() if holds]
    if len(of_text) == 1:
        return of_text[0]
    told = f"{len(of_text)} of text ({', '.join(of_text)})" if of_text else "none of text"
    raise Broken(f"it has no column text or content, and {told}; name one with data.column=<name>")


# How what a file of this suffix holds is read.
UNPACKED: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    "": lambda raw: raw,
    ".gz": lambda raw: cast(IO[bytes], gzip.GzipFile(fileobj=raw)),
    ".bz2": lambda raw: cast(IO[bytes], bz2.BZ2File(raw)),
    ".xz": lambda raw: cast(IO[bytes], lzma.LZMAFile(raw)),  # noqa: SIM115
    ".zst": _zst,
}
RECORDS: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_values,
    ".csv": _csv(","),
    ".tsv": _csv("\t"),
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".feather": _arrow,
}
# Formats whose readers go back and forth in a file.
COLUMNAR = (".parquet", ".arrow", ".feather")
