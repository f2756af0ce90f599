"""What Hydra knows of a multirun: this cell, the folder of all, and which plugins they need."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from muse.errors import ConfigError, RunError
from muse.files import disk_full_as_run_error
from muse.processes.signals import wait_for_cells
from muse.report.sweep import (
    INCOMPLETE,
    UNFINISHED,
    read_cells,
    record_cell,
    record_search,
    show_cells,
    write_summary,
)
from muse.runs.provenance import UNIDENTIFYING

# Options that need a plugin of Hydra, the plugin, and the extra of MUSE that brings it.
PLUGINS = {
    "hydra/launcher=processes": ("hydra_joblib_launcher", "sweep"),
    "hydra/launcher=slurm": ("hydra_submitit_launcher", "slurm"),
    "hydra/launcher=ray_cluster": ("hydra_ray_launcher", "ray"),
    "hydra/sweeper=search": ("hydra_optuna_sweeper", "sweep"),
}

_folder: Path | None = None


class Sweep(Callback):
    """Told by Hydra of the start of a run or a multirun, in the process of the command."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make the folder of the run."""
        # The name of the folder refers to it, and Hydra sets it only later.
        HydraConfig.instance().set_config(config)
        _make_folder(config, Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember where the cells will be, and make that folder, and the one a search keeps its study in."""
        global _folder
        _make_folder(config, Path(config.output_root))
        _make_folder(config, Path(config.hydra.sweep.dir))
        sweep = _folder = Path(config.hydra.sweep.dir)
        wait_for_cells(lambda: any(cell["status"] == UNFINISHED for cell in read_cells(sweep)))
        if "optuna" in config.hydra.sweeper._target_:
            record_search(_folder, searched_options(config.hydra))


def searched_options(hydra: DictConfig) -> dict[str, bool]:
    """What Optuna's sweeper varies, and whether each on a logarithmic scale, as the command line has it."""
    params = [f"{name}={value}" for name, value in (hydra.sweeper.params or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*params, *hydra.overrides.task])
    values = {override.get_key_element(): override for override in parsed}
    return {
        name: "log" in getattr(override.value(), "tags", ())
        for name, override in values.items()
        if override.is_sweep_override()
    }


def _make_folder(config: DictConfig, folder: Path) -> None:
    """Make a folder of Hydra's before Hydra does, whose error would be a trace.

    Raises:
        SystemExit: because of a ConfigError: the folder cannot be made, or not be written. Every other error
            of a callback Hydra turns into a warning.
    """
    root = Path(config.output_root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        option = f"output_root={root}" if folder.is_relative_to(root) else f"the folder {folder}"
        refused = ConfigError(
            f"{option} cannot be written ({error.strerror or error}); free some space there or choose "
            "another folder with output_root=<folder>"
        )
        raise SystemExit(1) from refused


def finish_sweep() -> int:
    """Show the summary of the multirun that this command has started; 1 where a cell did not end well."""
    if _folder is None:
        return 0
    cells = write_summary(_folder)
    if cells:
        print("\n" + show_cells(cells))
        print(f"\nthe sweep is in {_folder}")
    return int(any(cell["status"] in INCOMPLETE for cell in cells))


def sweep_folder() -> Path | None:
    """Folder of the multirun that this job is a cell of; None in a single run."""
    hydra = HydraConfig.get()
    return Path(hydra.sweep.dir) if hydra.mode == RunMode.MULTIRUN else None


def given_options() -> set[str]:
    """Names of the options that this job was given on the command line or by a sweep."""
    if not HydraConfig.initialized():
        return set()
    return {override.split("=")[0].strip("+~") for override in HydraConfig.get().overrides.task}


def record(values: dict[str, Any], status: str) -> None:
    """Put this cell into the summary of its multirun; in a single run do nothing."""
    sweep = sweep_folder()
    if sweep is not None:
        hydra = HydraConfig.get()
        given = [override.lstrip("+") for override in hydra.overrides.task]
        record_cell(sweep, hydra.job.num, given, values, status)


def record_failure(error: Exception) -> None:
    """Put this cell, which failed, into the summary of its multirun."""
    _record_if_there_is_space({"error": str(error)}, "failed")


def record_interruption() -> None:
    """Put this cell, which a signal ended, into the summary of its multirun."""
    _record_if_there_is_space({}, "interrupted")


def _record_if_there_is_space(values: dict[str, Any], status: str) -> None:
    # What ended the cell is told anyway, and is often the full disk itself.
    with suppress(RunError), disk_full_as_run_error(Path()):
        record(values, status)


def digest(overrides: Sequence[str]) -> str:
    """Short hash of the options that decide the numbers of a multirun."""
    deciding = [
        item for item in overrides if item.split("=")[0].split(".")[0].strip("+~") not in UNIDENTIFYING
    ]
    return hashlib.sha256("\n".join(sorted(deciding)).encode()).hexdigest()[:8]


def check_plugins(arguments: Sequence[str]) -> None:
    """See that the plugins that the options ask for are there.

    Raises:
        ConfigError: where one is missing.
    """
    for argument in arguments:
        plugin, extra = PLUGINS.get(argument, ("", ""))
        if plugin and not _installed(plugin):
            raise ConfigError(f'{argument} needs a plugin of Hydra; pip install -e ".[{extra}]" brings it')


def _installed(plugin: str) -> bool:
    try:
        return find_spec(f"hydra_plugins.{plugin}") is not None
    except ModuleNotFoundError:
        return False
