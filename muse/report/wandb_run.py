"""The W&B run of a folder: a new one, or the one that is continued."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from muse.config import RunConfig
from muse.files import write_json
from muse.report.wandb_tables import ResultTable, wandb_objects

FILE = "wandb.json"
# The x-axis of everything. W&B throws away what is logged with a smaller step of its own than the last one,
# and a run that goes on from a checkpoint logs the steps after it a second time.
STEP = "train/step"


class WandbTracker:
    """A tracker that is W&B; for the arguments and what it raises see ``start_wandb``.

    Attributes:
        id: of the W&B run.
        offline_folder: what ``wandb sync`` uploads, of an offline run.
    """

    def __init__(self, run: Path, config: RunConfig, wandb_id: str | None, previous: Path | None) -> None:
        self._run = start_wandb(run, config, wandb_id, previous)
        self.id: str = self._run.id
        self.offline_folder = Path(self._run.settings.sync_dir) if self._run.offline else None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send a line of metrics."""
        self._run.log({STEP: step, **metrics})

    def add_results(
        self, values: dict[str, Any], images: Sequence[Path], tables: Sequence[ResultTable]
    ) -> None:
        """Send single values to the summary, and plots and tables."""
        import wandb

        self._run.summary.update({k: v for k, v in values.items() if isinstance(v, int | float | str)})
        pictures = {image.stem: wandb.Image(str(image)) for image in images}
        self._run.log({**pictures, **wandb_objects(tables)})

    def close(self, failed: bool) -> None:
        """End the W&B run."""
        self._run.finish(exit_code=int(failed))


def start_wandb(
    run: Path, config: RunConfig, wandb_id: str | None = None, previous: Path | None = None
) -> Any:
    """Begin the W&B run of the folder ``run``; note its id, group and own folder in ``run / FILE``.

    Online the run ``wandb_id`` goes on, if the server knows it below this entity and project. Elsewhere, and
    offline, where no run is known, a new one begins in the same group; its notes and its config name the run
    it goes on from, and the terminal says so.

    Args:
        run: folder of the run.
        config: configuration of the run.
        wandb_id: W&B id of the run that this one continues.
        previous: its folder.

    Raises:
        wandb.Error: when W&B does not start.
    """
    import wandb

    logger = config.logger
    group = logger.group or _noted_group(previous) or _default_group(config)
    tags = [f"stage{config.stage.number}", config.model.name, config.data.name, *logger.tags]
    values = dataclasses.asdict(config)
    options: dict[str, Any] = {
        "project": logger.project,
        "entity": logger.entity,
        "group": group,
        "name": run.name,
        "dir": run,
        "mode": logger.mode,
        "settings": wandb.Settings(silent=True, console="off", x_disable_stats=True),
    }
    started = None
    if wandb_id is not None and logger.mode == "online":
        try:
            started = wandb.init(**options, config=values, id=wandb_id, resume="must")
        except wandb.errors.UsageError:
            # The server has no such run, or nobody is logged in, which the second attempt will tell.
            why = "is not known here"
        else:
            # Tags given to init would replace those that the run was given in the browser.
            started.tags = tuple(dict.fromkeys((*(started.tags or ()), *tags)))
    else:
        why = "cannot go on offline"
    if started is None:
        notes = None
        if previous is not None:
            values["continues"] = {"wandb_id": wandb_id, "folder": str(previous)}
            notes = f"continues {previous} (W&B run {wandb_id})"
        tags = list(dict.fromkeys(tags))
        started = wandb.init(**options, config=values, tags=tags, notes=notes)
        if wandb_id is not None:
            print(f"W&B: run {wandb_id} of {previous} {why}; run {started.id} of group {group} continues it")
    started.define_metric("*", step_metric=STEP)
    folder = os.path.relpath(started.settings.sync_dir, run)
    write_json(run / FILE, {"id": started.id, "group": group, "folder": folder})
    return started


def _default_group(config: RunConfig) -> str:
    """The runs of a sweep, otherwise those of a stage and model."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return Path(HydraConfig.get().sweep.dir).name
    return f"stage{config.stage.number}-{config.model.name}"


def _noted_group(run: Path | None) -> str | None:
    if run is None:
        return None
    try:
        return json.loads((run / FILE).read_text(encoding="utf-8"))["group"]
    except (OSError, ValueError, KeyError):
        return None
