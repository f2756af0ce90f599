"""TensorBoard's files in the folder of a run."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from muse.config import RunConfig
from muse.errors import ConfigError
from muse.report.wandb_tables import ResultTable
from muse.runs.options import flattened, format_value

FOLDER = "tensorboard"
# Splits whose last metrics are what runs are compared by.
COMPARED = ("valid/", "test/")


def require_tensorboard() -> None:
    """See that the package tensorboard is there and works.

    Raises:
        ConfigError: it does not; names the extra that brings it.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except Exception as error:  # Beside a protobuf that does not fit it raises anything.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"logger=tensorboard needs the package tensorboard, which cannot be imported ({reason}); "
            'pip install -e ".[tensorboard]" brings it'
        ) from error


class TensorboardTracker:
    """A tracker that is TensorBoard; a tag is called as the metric is in metrics.jsonl.

    Args:
        run: folder of the run.
        config: its options, which are a text from the beginning and hyperparameters at the end.
        earlier: lines of the run that this one continues, which are written first.

    Raises:
        Exception: as does every method, whatever TensorBoard raises.
    """

    def __init__(self, run: Path, config: RunConfig, earlier: Sequence[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._config, self._step = config, 0
        self._latest: dict[str, float] = {}
        before = set(threading.enumerate())
        # A job that Slurm has queued again comes back to its folder; what is there from before is hidden.
        self._writer: Any = SummaryWriter(str(run / FOLDER), purge_step=0)
        _tell_once(set(threading.enumerate()) - before)
        options = OmegaConf.to_yaml(OmegaConf.structured(config))
        self._writer.add_text("config", f"```yaml\n{options}```", 0)
        for line in earlier:
            self._add(line["step"], {key: value for key, value in line.items() if key != "step"})
        self._writer.flush()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write a line of metrics."""
        self._add(step, metrics)
        self._writer.flush()

    def add_results(
        self, values: dict[str, Any], images: Sequence[Path], tables: Sequence[ResultTable]
    ) -> None:
        """Write plots, single values, and the hyperparameters with what runs are compared by; no tables."""
        from matplotlib.image import imread
        from torch.utils.tensorboard.summary import hparams

        for image in images:
            self._writer.add_image(image.stem, imread(image), self._step, dataformats="HWC")
        single = {key: value for key, value in values.items() if isinstance(value, int | float)}
        self._add(self._step, {key: value for key, value in single.items() if key not in self._latest})
        compared = {key: value for key, value in self._latest.items() if key.startswith(COMPARED)}
        options = {
            name: value if isinstance(value, float | str) or type(value) is int else format_value(value)
            for name, value in flattened(dataclasses.asdict(self._config)).items()
        }
        # SummaryWriter.add_hparams would write them as another run.
        for summary in hparams(options, {**compared, **single}):
            self._writer.file_writer.add_summary(summary)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Close the files."""
        self._writer.close()

    def _add(self, step: int, metrics: dict[str, Any]) -> None:
        self._step = step
        for tag, value in metrics.items():
            # What is not finite is null in a line that was read.
            if value is not None:
                self._latest[tag] = value
                self._writer.add_scalar(tag, value, step)


def _tell_once(threads: set[threading.Thread]) -> None:
    """Let threads end without a trace: what ends one that writes is raised by the next call, too."""
    told = threading.excepthook
    threading.excepthook = lambda ended: None if ended.thread in threads else told(ended)
