"""What a benchmark found, and why something of it is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from muse.config import BenchConfig
from muse.errors import RunError


class Unmeasured(dict[str, Any]):
    """What a measurement that failed has found: None, whatever is asked for."""

    def __missing__(self, key: str) -> None:
        return None


@dataclass
class Report:
    """What a benchmark found.

    Attributes:
        apart: runs a measurement by its name.
        values: the keys of result.json; a criterion that could not be measured is None.
        details: everything measured, by measurement and model.
        criteria: rows of the table: criterion, measured, target, whether it passes.
        failures: measurements that failed, and why.
        unjudged: keys of criteria that are None though nothing failed, and why.
    """

    apart: Callable[[str, BenchConfig], dict[str, Any]]
    values: dict[str, Any] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    criteria: list[tuple[str, object, str, bool | None]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    unjudged: dict[str, str] = field(default_factory=dict)

    def run(self, measurement: str, config: BenchConfig, model: str = "") -> dict[str, Any]:
        """What a measurement returns; one that fails is noted and has found nothing."""
        try:
            return self.apart(measurement, config)
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

    def judge(self) -> None:
        """Set ``all_pass``: None as long as a criterion is, or a measurement failed."""
        passes = [passed for *_, passed in self.criteria]
        open_ = None in passes or bool(self.failures) or not passes
        self.values["all_pass"] = None if open_ else all(passes)


def ratio(value: float | None, baseline: float | None) -> float | None:
    """value / baseline; None where one is missing or the baseline is 0."""
    return value / baseline if value is not None and baseline else None


def saved(value: float | None, baseline: float | None) -> float | None:
    """The share of the baseline that the value does without."""
    part = ratio(value, baseline)
    return None if part is None else 1 - part


def at_most(value: float | None, target: float) -> bool | None:
    """Whether value <= target; None where it is missing."""
    return None if value is None else value <= target


def at_least(value: float | None, target: float) -> bool | None:
    """Whether value >= target; None where it is missing."""
    return None if value is None else value >= target


def all_of(passes: list[bool | None]) -> bool | None:
    """False as soon as one is, else None as long as one is."""
    return False if False in passes else None if None in passes or not passes else True
