"""metrics.jsonl, always, and beside it the trackers that a run was given."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from muse.config import LoggerConfig, RunConfig
from muse.files import disk_full_names, finite
from muse.report.csv_tracker import CsvTracker
from muse.report.tensorboard_tracker import TensorboardTracker, require_tensorboard
from muse.report.wandb_run import WandbTracker
from muse.report.wandb_tables import ResultTable

FILE = "metrics.jsonl"


class Tracker(Protocol):
    """Where metrics go beside metrics.jsonl. It may raise anything; the run then goes on without it."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Take a line of metrics; a process that is killed afterwards has lost nothing of it."""

    def add_results(
        self, values: dict[str, Any], images: Sequence[Path], tables: Sequence[ResultTable]
    ) -> None:
        """Take final values, plots that are there, and tables, or what of them it can show."""

    def close(self, failed: bool) -> None:
        """End."""


def require_trackers(logger: LoggerConfig) -> None:
    """See that what the trackers need is installed.

    Raises:
        ConfigError: it is not; names the extra that brings it.
    """
    if logger.tensorboard:
        require_tensorboard()


class MetricsLog:
    """One JSON object a line in ``metrics.jsonl``, and the same to each tracker that is configured.

    Whatever a tracker raises is one message on standard error, and the run goes on without it.

    Args:
        run: folder of the run.
        config: configuration of the run; ``logger`` says which trackers there are.
        earlier: lines of the run that this one continues.
        wandb_id: W&B id of the run that this one continues.
        previous: folder of the run that this one continues.
    """

    def __init__(
        self,
        run: Path,
        config: RunConfig,
        earlier: Sequence[dict[str, Any]] = (),
        wandb_id: str | None = None,
        previous: Path | None = None,
    ) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self._path = run / FILE
        self._file = open(self._path, "w", encoding="utf-8")  # noqa: SIM115
        with disk_full_names(self._path):
            for line in earlier:
                self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        self._trackers: dict[str, Tracker] = {}
        self._offline: Path | None = None
        self.wandb_id = wandb_id
        logger = config.logger
        if logger.mode != "disabled":
            self._try("W&B", lambda: self._start_wandb(WandbTracker(run, config, wandb_id, previous)))
        if logger.tensorboard:
            self._start("TensorBoard", lambda: TensorboardTracker(run, config, earlier))
        if logger.csv:
            self._start("metrics.csv", lambda: CsvTracker(run, earlier))

    def _start(self, name: str, make: Callable[[], Tracker]) -> None:
        self._try(name, lambda: self._trackers.update({name: make()}))

    def _start_wandb(self, tracker: WandbTracker) -> None:
        self._trackers["W&B"] = tracker
        self.wandb_id, self._offline = tracker.id, tracker.offline_folder

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        with disk_full_names(self._path):
            self._file.write(json.dumps(finite({"step": step, **metrics})) + "\n")
            self._file.flush()
        self._each(lambda tracker: tracker.log(step, metrics))

    def add_results(
        self, values: dict[str, Any], images: Sequence[Path], tables: Sequence[ResultTable] = ()
    ) -> None:
        """Give final values, plots and tables to the trackers."""
        there = [image for image in images if image.exists()]
        self._each(lambda tracker: tracker.add_results(values, there, tables))

    def close(self, failed: bool = False) -> None:
        """Close the file and end the trackers; of an offline W&B run print the command that uploads it."""
        try:
            with disk_full_names(self._path):
                self._file.close()
        finally:
            self._each(lambda tracker: tracker.close(failed))
            if self._offline is not None and self._offline.is_dir():
                print(f"wandb sync {shlex.quote(str(self._offline))}", flush=True)

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            self._try(name, partial(action, tracker))

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - training must not depend on a tracker
            self._trackers.pop(name, None)
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"{name} is left out ({first}); metrics are in {self._path}", file=sys.stderr)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics; a last line that was cut off is dropped."""
    lines = []
    try:
        text = (run / FILE).read_text(encoding="utf-8")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
