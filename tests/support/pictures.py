"""Pictures of tests in which nobody looks at them."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_savefig = Figure.savefig


def save_blank(figure: Figure, file: Path, **options: Any) -> None:
    """In place of ``Figure.savefig``: the PNG of a single point, which takes no time to draw."""
    file.write_bytes(_blank())


@functools.cache
def _blank() -> bytes:
    file = io.BytesIO()
    _savefig(Figure(figsize=(1, 1)), file, dpi=1, format="png")
    return file.getvalue()
