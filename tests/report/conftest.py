from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.waiting import wait_until


@dataclass
class Uploaded:
    """What ``wandb sync`` would upload of an offline run."""

    run: Any = None
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[Any] = field(default_factory=list)
    exit_code: int | None = None


@pytest.fixture
def read_wandb(monkeypatch) -> Callable[[Path], Uploaded]:
    """Read the one offline run in a folder back; the test sees no account and no network."""
    for name in ("WANDB_DIR", "WANDB_API_KEY", "WANDB_RUN_GROUP", "WANDB_TAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")

    def read(run: Path) -> Uploaded:
        (path,) = run.glob("wandb/offline-run-*/*.wandb")
        # W&B's service may still be writing when finish returns.
        wait_until(lambda: _parse(path.read_bytes()).exit_code is not None)
        return _parse(path.read_bytes())

    return read


@pytest.fixture
def pixels() -> Callable[[Path], bytes]:
    """The pixels of a PNG, all of which must be readable."""

    def read(path: Path) -> bytes:
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        with Image.open(path) as image:
            image.verify()
        with Image.open(path) as image:
            assert min(image.size) > 150
            return image.convert("RGB").tobytes()

    return read


@pytest.fixture
def overlapping() -> Callable[[Any, list[Any]], list[tuple[Any, Any]]]:
    """The pairs of artists of a figure, each where it is drawn, that share some of its area."""

    def find(figure: Any, artists: list[Any]) -> list[tuple[Any, Any]]:
        figure.draw_without_rendering()
        # A pixel less on each side: what only touches does not hide.
        boxes = [(artist, artist.get_window_extent().padded(-1)) for artist in artists]
        return [
            (first, second)
            for (first, box), (second, other) in itertools.combinations(boxes, 2)
            if box.overlaps(other)
        ]

    return find


def _parse(data: bytes) -> Uploaded:
    found = Uploaded()
    for record in _records(data):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            found.history.append(_items(record.history.item))
        elif kind == "summary":
            found.summary |= _items(record.summary.update)
        elif kind == "metric":
            found.metrics.append(record.metric)
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def _items(items: Any) -> dict[str, Any]:
    return {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}


def _records(data: bytes) -> Iterator[Any]:
    """W&B's transaction log: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    whole, last = 1, 4
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if left < 7 or kind == 0:
            position += left
            continue
        if position + 7 + length > len(data):
            return
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (whole, last):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""
