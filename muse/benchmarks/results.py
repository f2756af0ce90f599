"""What benchmarks found, and why something of it is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muse.config import BenchConfig, StageConfig
from muse.errors import RunError


class Unmeasured(dict[str, Any]):
    """What a measurement that failed has found: None, whatever is asked for."""

    def __missing__(self, key: str) -> None:
        return None


@dataclass
class Results:
    """What benchmarks found.

    Attributes:
        folder: of the run.
        isolated: runs a measurement, by its name, in a process of its own; see ``run``.
        stage_of: composes the options of another stage from its number.
        values: the keys of result.json; a criterion that could not be measured is None.
        details: everything measured, by measurement and model.
        criteria: rows of the table: criterion, measured, target, whether it passes.
        failures: measurements that failed, and why.
        unjudged: keys of criteria that are None though nothing failed, and why.
    """

    folder: Path
    isolated: Callable[..., dict[str, Any]]
    stage_of: Callable[[str], StageConfig]
    values: dict[str, Any] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    criteria: list[tuple[str, object, str, bool | None]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    unjudged: dict[str, str] = field(default_factory=dict)

    def run(
        self, measurement: str, config: BenchConfig, model: str = "", others: Sequence[BenchConfig] = ()
    ) -> dict[str, Any]:
        """What a measurement returns, of ``others`` in turns with it, if there are any.

        One that fails is noted and has found nothing.
        """
        try:
            return self.isolated(measurement, config, *others)
        except RunError as error:
            print(f"  {error}", flush=True)
            self.failures[f"{measurement}, {model}" if model else measurement] = str(error)
            return Unmeasured()

    def measure(
        self, measurement: str, model: str, config: BenchConfig, shown_as: str | None = None
    ) -> dict[str, Any]:
        """The same, kept in ``details`` as that of a model, below the name ``shown_as`` if given."""
        values = self.run(measurement, config, model)
        if values:
            self.details.setdefault(shown_as or measurement, {})[model] = values
        return values

    def at_most(self, criterion: str, value: float | None, target: float, sign: str = "<=") -> bool | None:
        """Whether value <= target, a row of the table now; None where it is missing."""
        passed = None if value is None else value <= target
        self.criteria.append((criterion, value, f"{sign} {target:g}", passed))
        return passed

    def at_least(self, criterion: str, value: float | None, target: float) -> bool | None:
        """Whether value >= target, likewise."""
        passed = None if value is None else value >= target
        self.criteria.append((criterion, value, f">= {target:g}", passed))
        return passed

    def leave_open(self, reason: str, *keys: str) -> None:
        """Say why keys of result.json are None though nothing failed."""
        self.unjudged |= dict.fromkeys(keys, reason)

    def judge(self) -> None:
        """Set ``all_pass``: None as long as a criterion is, or a measurement failed."""
        passes = [passed for *_, passed in self.criteria]
        open_ = None in passes or bool(self.failures) or not passes
        self.values["all_pass"] = None if open_ else all(passes)


def name_of(config: BenchConfig) -> str:
    """What a model is called among others."""
    return f"stage {config.stage.number} {config.stage.precision}"
