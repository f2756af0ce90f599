from __future__ import annotations

from pathlib import Path

import pytest

from muse.data import Corpus

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def wikitext2() -> Path:
    folder = SHARED / "wikitext-2"
    if not folder.is_dir():
        pytest.skip("no local WikiText-2")
    return folder


@pytest.fixture
def gpt2() -> Path:
    folder = SHARED / "gpt2-bpe"
    if not folder.is_dir():
        pytest.skip("no local GPT-2 tokenizer")
    return folder


def sentences(first: int, count: int) -> str:
    return "".join(
        f"Line {n} says\n    that {n * n} is the square of {n}.\n" for n in range(first, first + count)
    )


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(sentences(0, 400), encoding="utf-8")
    return path


@pytest.fixture
def small_corpus() -> Corpus:
    return Corpus([sentences(0, 100), sentences(100, 100)], [sentences(200, 20)], [sentences(220, 20)])
