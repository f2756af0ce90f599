"""What a folder holds that train.py or bench.py has written: of a run, a benchmark, or a sweep of either."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import ListConfig, OmegaConf
from yaml import YAMLError

from muse.config import BenchConfig, RunConfig
from muse.errors import ConfigError
from muse.report.metrics import read_metrics
from muse.report.sweep import CELLS
from muse.runs.folder import MEMORY_FILE, RESULT_FILE, RUN_FILE, SAMPLE_FILE, read_result, read_run
from muse.runs.options import UNKNOWN, Changes, differences, format_value, name_as_given

# Options by which runs that are of one stage and model are told apart, at most.
MOST_OPTIONS = 3
# Hydra writes it.
GIVEN_FILE = ".hydra/overrides.yaml"
# Where a run writes and what it goes on from: no difference of what it measured.
PLACES = ("output_root", "data.cache", "resume", "logger")


@dataclass(frozen=True)
class Recorded:
    """A run or a benchmark, finished or not.

    Attributes:
        folder: where it is.
        made_with: versions, commit, seed, configuration and time.
        metrics: lines of its log with a step.
        result: what it ended with; empty as long as it has not.
        given: what its command said, as ``key=value``; empty where that is not known.
        sample: text that the model wrote in the end.
        memory: bytes at the peak of a step by what holds them, where the run was profiled on a CPU.
        pictures: of a benchmark.
    """

    folder: Path
    made_with: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    given: tuple[str, ...] = ()
    sample: str | None = None
    memory: dict[str, int] = field(default_factory=dict)
    pictures: tuple[Path, ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        """The options, as JSON has them."""
        config: dict[str, Any] = self.made_with["config"]
        return config

    @property
    def is_benchmark(self) -> bool:
        """Whether bench.py made it."""
        return "criteria" in self.result

    @property
    def kind(self) -> str:
        """Stage and model, and the benchmark if it is one."""
        parts = [f"stage {self._option('stage', 'number')}", self._option("model", "name")]
        return ", ".join([*parts, self._option("benchmark", "name")] if self.is_benchmark else parts)

    def _option(self, group: str, name: str) -> str:
        options = self.config.get(group)
        return str(options.get(name, "?")) if isinstance(options, dict) else "?"

    def changes(self) -> Changes:
        """Options that are not those of the dataclasses: the own value and theirs."""
        found = differences(self.config, BenchConfig() if self.is_benchmark else RunConfig())
        return {name: both for name, both in found.items() if not name.startswith(PLACES)}


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a multirun."""
    return (folder / CELLS).is_dir()


def read_cell_runs(sweep: Path) -> list[Recorded]:
    """The runs or benchmarks of a multirun, without cells of which there is nothing to show yet."""
    numbers = sorted(int(file.stem) for file in (sweep / CELLS).glob("*.json") if file.stem.isdigit())
    found = []
    for number in numbers:
        for folder in sorted(sweep.glob(f"{number}-*")):
            with suppress(ConfigError):
                found.append(read_recorded(folder))
    return found


def read_recorded(folder: Path) -> Recorded:
    """What the folder of a run or a benchmark holds.

    Raises:
        ConfigError: it is none, or there is nothing in it yet that could be shown.
    """
    try:
        result = read_result(folder)
        made_with = read_run(folder) if (folder / RUN_FILE).exists() else result
        if not isinstance(result, dict) or not isinstance(made_with.get("config"), dict):
            raise ValueError(f"neither {RUN_FILE} nor {RESULT_FILE} has a configuration")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{folder} is not the folder of a run ({error}); give one that train.py or bench.py made"
        ) from error
    # A sweep that takes the results of an earlier run has them alone.
    origin = folder / str(result.get("reused_from", "."))
    metrics = _lines(origin) or _lines(folder)
    if not metrics and not result:
        raise ConfigError(f"{folder} has no metrics yet; its training writes them as it goes on")
    details = result.get("details")
    names = list(details) if isinstance(details, dict) and "criteria" in result else []
    pictures = [origin / f"{name}.png" for name in names]
    return Recorded(
        folder,
        made_with,
        metrics,
        result,
        _given(folder / GIVEN_FILE),
        _text(origin / SAMPLE_FILE),
        _memory(origin / MEMORY_FILE),
        tuple(picture for picture in pictures if picture.is_file()),
    )


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder) if isinstance(line, dict) and "step" in line]


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        return None


def _given(path: Path) -> tuple[str, ...]:
    try:
        given = OmegaConf.load(path)
    except (OSError, ValueError, YAMLError):
        return ()
    return tuple(map(str, given)) if isinstance(given, ListConfig) else ()


def _memory(path: Path) -> dict[str, int]:
    try:
        peak = json.loads(path.read_text(encoding="utf-8"))["peak"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return peak if isinstance(peak, dict) else {}


def option_table(runs: Sequence[Recorded]) -> dict[str, list[str]]:
    """Options whose values differ between runs, and those of each run; a dash where it has no such option."""
    changes = [run.changes() for run in runs]
    rows = {}
    for name in sorted({name for of_run in changes for name in of_run}):
        default = next(_shown(of_run[name][1]) for of_run in changes if name in of_run)
        values = []
        for run, of_run in zip(runs, changes, strict=True):
            has_group = name.partition(".")[0] in run.config
            values.append(_shown(of_run[name][0]) if name in of_run else default if has_group else "-")
        if len(set(values)) > 1:
            rows[name_as_given(name)] = values
    return rows


def _shown(value: object) -> str:
    if value is UNKNOWN:
        return "-"
    return json.dumps(value) if isinstance(value, list | dict) else format_value(value)


def names_of(runs: Sequence[Recorded]) -> list[str]:
    """A short name for each run, all different: stage and model, if need be options that differ, a number."""
    kinds = [run.kind for run in runs]
    names = []
    for run, kind in zip(runs, kinds, strict=True):
        alike = [other for other in runs if other.kind == kind]
        rows = list(option_table(alike).items()) if len(alike) > 1 else []
        place = next(index for index, other in enumerate(alike) if other is run)
        names.append(", ".join([kind, *(f"{name}={values[place]}" for name, values in rows[:MOST_OPTIONS])]))
    return [
        f"{name} ({names[: index + 1].count(name)})" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]
