"""metrics.jsonl, always, and W&B on top."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from muse.config import RunConfig
from muse.files import disk_full_names, finite
from muse.report.wandb_run import STEP, start_wandb
from muse.report.wandb_tables import ResultTable, wandb_objects

FILE = "metrics.jsonl"


class MetricsLog:
    """One JSON object a line in ``metrics.jsonl``, and the same to W&B.

    Whatever W&B raises is one message on standard error, and the run goes on without it.

    Args:
        run: folder of the run.
        config: configuration of the run; ``logger`` is about W&B.
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
        self._wandb: Any = None
        self._offline: Path | None = None
        self.wandb_id = wandb_id
        if config.logger.mode != "disabled":
            self._try(lambda: self._start(start_wandb(run, config, wandb_id, previous)))

    def _start(self, wandb_run: Any) -> None:
        self._wandb = wandb_run
        self.wandb_id = wandb_run.id
        if wandb_run.offline:
            self._offline = Path(wandb_run.settings.sync_dir)

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        with disk_full_names(self._path):
            self._file.write(json.dumps(finite({"step": step, **metrics})) + "\n")
            self._file.flush()
        if self._wandb is not None:
            self._try(lambda: self._wandb.log({STEP: step, **metrics}))

    def add_results(
        self, values: dict[str, Any], images: Sequence[Path], tables: Sequence[ResultTable] = ()
    ) -> None:
        """Send final values, plots and tables to W&B."""
        if self._wandb is not None:
            self._try(lambda: self._send(values, images, tables))

    def _send(self, values: dict[str, Any], images: Sequence[Path], tables: Sequence[ResultTable]) -> None:
        import wandb

        self._wandb.summary.update({k: v for k, v in values.items() if isinstance(v, int | float | str)})
        pictures = {image.stem: wandb.Image(str(image)) for image in images if image.exists()}
        self._wandb.log({**pictures, **wandb_objects(tables)})

    def close(self, failed: bool = False) -> None:
        """Close the file and end the W&B run; of an offline one print the command that uploads it."""
        try:
            with disk_full_names(self._path):
                self._file.close()
        finally:
            if self._wandb is not None:
                self._try(lambda: self._wandb.finish(exit_code=int(failed)))
            if self._offline is not None and self._offline.is_dir():
                print(f"wandb sync {shlex.quote(str(self._offline))}", flush=True)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - training must not depend on a tracker
            self._wandb = None
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"W&B is left out ({first}); metrics are in {self._path}", file=sys.stderr)


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
