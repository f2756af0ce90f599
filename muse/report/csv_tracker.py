"""metrics.csv: the lines of metrics as a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from muse.files import disk_full_names, finite, write_atomically
from muse.report.wandb_tables import ResultTable

FILE = "metrics.csv"


class CsvTracker:
    """A tracker that is the table ``metrics.csv``, which is whole after each line.

    A row is a line of metrics. Columns are ``step`` and every metric so far; a cell is empty where the line
    has no such metric, or one that is not finite.

    Args:
        run: folder of the run.
        earlier: lines of the run that this one continues.

    Raises:
        OSError: as does every method, when the file cannot be written.
    """

    def __init__(self, run: Path, earlier: Sequence[dict[str, Any]]) -> None:
        self._path = run / FILE
        self._columns = list(dict.fromkeys(["step", *(key for line in earlier for key in line)]))
        self._write_anew(earlier)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append a row; a new metric is a new column, for which the file is replaced."""
        line = finite({"step": step, **metrics})
        new = [key for key in line if key not in self._columns]
        if not new:
            with disk_full_names(self._path), open(self._path, "a", encoding="utf-8", newline="") as file:
                file.write(self._rows([line]))
            return
        with open(self._path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        self._columns += new
        self._write_anew([*rows, line])

    def add_results(
        self, values: dict[str, Any], images: Sequence[Path], tables: Sequence[ResultTable]
    ) -> None:
        """Nothing: final values are in result.json."""

    def close(self, failed: bool) -> None:
        """Nothing: every row is written."""

    def _write_anew(self, lines: Iterable[dict[str, Any]]) -> None:
        header = self._rows([{column: column for column in self._columns}])
        write_atomically(self._path, header + self._rows(lines))

    def _rows(self, lines: Iterable[dict[str, Any]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, restval="", lineterminator="\n").writerows(lines)
        return text.getvalue()
