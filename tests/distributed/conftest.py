from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a text, and room for the cache of its tokens and for runs."""
    folder = tmp_path_factory.mktemp("place")
    lines = (f"line {n} says {n * n}, and line {n % 7} does not\n" for n in range(300))
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
    return folder
