"""metrics.jsonl, always, and W&B on top."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from muse.config import RunConfig
from muse.files import finite

FILE = "metrics.jsonl"


class MetricsLog:
    """One JSON object a line in ``metrics.jsonl``, and the same to W&B.

    Args:
        run: folder of the run.
        config: configuration of the run; ``logger.mode`` decides about W&B.
        earlier: lines of the run that this one continues.
        wandb_id: W&B id of the run that this one continues.
    """

    def __init__(
        self,
        run: Path,
        config: RunConfig,
        earlier: Sequence[dict[str, Any]] = (),
        wandb_id: str | None = None,
    ) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self._file = open(run / FILE, "w", encoding="utf-8")  # noqa: SIM115
        for line in earlier:
            self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._wandb = _start_wandb(run, config, wandb_id)
        self.wandb_id: str | None = self._wandb.id if self._wandb is not None else wandb_id

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        self._file.write(json.dumps(finite({"step": step, **metrics})) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def add_results(self, values: dict[str, Any], images: list[Path]) -> None:
        """Send final values and plots to W&B."""
        if self._wandb is None:
            return
        import wandb

        self._wandb.summary.update({k: v for k, v in values.items() if isinstance(v, int | float | str)})
        self._wandb.log({image.stem: wandb.Image(str(image)) for image in images if image.exists()})

    def close(self, failed: bool = False) -> None:
        """Close the file and end the W&B run."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))


def _start_wandb(run: Path, config: RunConfig, wandb_id: str | None) -> Any:
    if config.logger.mode == "disabled":
        return None
    try:
        import wandb

        return wandb.init(
            project=config.logger.project,
            name=run.name,
            dir=run,
            config=dataclasses.asdict(config),
            mode=config.logger.mode,  # type: ignore[arg-type]
            id=wandb_id,
            resume="allow" if wandb_id and config.logger.mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
    except Exception as error:  # noqa: BLE001 - training must not depend on a tracker
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        print(f"W&B is left out ({first}); metrics are in {run / FILE}", file=sys.stderr)
        return None


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
