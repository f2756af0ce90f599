"""What a benchmark declares: how it measures, what passes, what is drawn, and which number a sweep shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from muse.benchmarks.results import Results, Unmeasured, name_of
from muse.benchmarks.workload import Workload
from muse.config import BenchConfig
from muse.errors import ConfigError
from muse.options import allowed_values
from muse.report.sweep_plot import Metric
from muse.report.wandb_tables import ResultTable

# Of a configuration, or of several in turns, on a device, the last argument.
Measure = Callable[..., dict[str, Any]]
# What was measured under the name of a benchmark, by model.
Models = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Benchmark:
    """A value of ``benchmark=``, declared at the end of the file of that name.

    Attributes:
        measure: measurements by name; each runs in a process of its own.
        judge: has them run, and adds keys of result.json and criteria to the results.
        plot: draws the models.
        shown: numbers of which a sweep draws the first that was measured.
        stages: it goes with.
        trained: whether it measures trained weights, if there are any.
        workload: what it is measured at where options leave that open.
        check: raises ConfigError for options that do not go together.
        tables: of the models, for W&B; by default all single values of each.
        text: of the models, for the terminal; by default likewise.
        curves: metrics by step, for the log.
        strict: whether a criterion that does not pass is a failure of the command.
    """

    measure: Mapping[str, Measure]
    judge: Callable[[BenchConfig, Results], None]
    plot: Callable[[Models], Any] | None = None
    shown: tuple[Metric, ...] = ()
    stages: tuple[str, ...] = ("0", "1", "2", "3")
    trained: bool = True
    workload: Callable[[BenchConfig], Workload] = lambda config: Workload()
    check: Callable[[BenchConfig], None] = lambda config: None
    tables: Callable[[Models], list[ResultTable]] | None = None
    text: Callable[[Models], list[str]] | None = None
    curves: Callable[[Models], list[tuple[int, dict[str, float]]]] | None = None
    strict: bool = False


def require_part(config: BenchConfig) -> None:
    """See that stage 3 has the part that a benchmark is called after.

    Raises:
        ConfigError: it has not.
    """
    part = config.benchmark.name
    if getattr(config.stage, part, "") == "none":
        raise ConfigError(f"benchmark={part} needs {kinds_of(config, 'stage', part)}")


def measure_part(config: BenchConfig, results: Results, part: str, *keys: str) -> dict[str, Any]:
    """What the benchmark of a part of stage 3 measures.

    Where the stage is without it that is nothing, ``keys`` of result.json are open, and that is the reason.
    """
    if getattr(config.stage, part) == "none":
        results.leave_open(f"stage.{part}=none has none; it needs {kinds_of(config, 'stage', part)}", *keys)
        return Unmeasured()
    return results.measure(part, name_of(config), config)


def kinds_of(config: BenchConfig, group: str, name: str) -> str:
    """The values of an option that are not none, as a command gives them."""
    kinds = (kind for kind in allowed_values(getattr(config, group), name) if kind != "none")
    return " or ".join(f"{group}.{name}={kind}" for kind in kinds)
