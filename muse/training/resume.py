"""The run that ``resume`` means, and what becomes of one that goes on with other options."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muse.config import RunConfig
from muse.errors import ConfigError
from muse.files import find_files
from muse.processes.ranks import ranks
from muse.report.metrics import read_metrics
from muse.runs.checkpoints import find_checkpoint
from muse.runs.folder import RESULT_FILE, RUN_FILE, read_run
from muse.runs.options import Changes, differences, format_changes, is_among, may_change, refuse_changes
from muse.runs.provenance import UNIDENTIFYING, UNIDENTIFYING_OPTIONS
from muse.training.schedule import learning_rate, same_until

# What is noted when it changes, though it decides no number but for rounding.
WHERE = ("hardware", "ranks")
# Options that say what is measured in an evaluation.
EVALUATION = ("train.eval_tokens", "train.eval_stride")


@dataclass(frozen=True)
class Previous:
    """A run that is to be continued.

    Attributes:
        run: its folder.
        changes: options with which it goes on otherwise.
        earlier_changes: what it notes of such changes before.
    """

    run: Path
    changes: Changes
    earlier_changes: list[dict[str, Any]]

    @property
    def is_finished(self) -> bool:
        """Whether it has the results that are asked for."""
        return (self.run / RESULT_FILE).exists() and not _deciding(self.changes)


def run_to_resume(config: RunConfig, in_sweep: bool = False) -> Previous | None:
    """The run that ``resume`` means; None to start afresh. ``resume=auto`` says what it found.

    Args:
        config: of the run that goes on.
        in_sweep: whether ``resume=auto`` takes only runs that had all of these options, those of
            ``hardware``, too, from their first step on: cells of a sweep must not be mixed up.

    Raises:
        ConfigError: when a folder is named that holds no checkpoint or another configuration.
    """
    if config.resume == "never":
        return None
    if config.resume == "auto":
        return _newest_of_same_options(config, in_sweep)
    found = _previous(Path(config.resume), config)
    if found is None:
        raise ConfigError(f"resume={config.resume} holds no checkpoint; give a run folder, auto or never")
    deciding = _deciding(found.changes).items()
    refuse_changes(
        "resume", found.run, {name: both for name, both in deciding if not may_change(name, both[0])}
    )
    return found


def _newest_of_same_options(config: RunConfig, in_sweep: bool) -> Previous | None:
    root = Path(config.output_root) / "train"
    fitting: list[Previous] = []
    others: list[tuple[Previous, Changes]] = []
    for file in find_files(root, RUN_FILE):
        found = _previous(file.parent, config)
        if found is None:
            continue
        changes = _rounding(found.changes) if in_sweep else _deciding(found.changes)
        mixed = any(_rounding(change["options"]) for change in found.earlier_changes)
        if changes:
            others.append((found, changes))
        elif not (in_sweep and mixed):
            fitting.append(found)

    def age(found: Previous) -> int:
        return -(found.run / RUN_FILE).stat().st_mtime_ns

    if fitting:
        newest = min(fitting, key=age)
        changed = f" (after changes of its options, see {RUN_FILE})" if newest.earlier_changes else ""
        number = f"{len(fitting)} runs" if len(fitting) > 1 else "a run"
        print(f"resume=auto found {number} of these options and takes the newest, {newest.run}{changed}")
        return newest
    if not others:
        print(f"resume=auto found no run below {root}; a new one begins")
        return None
    nearest, changes = min(others, key=lambda other: (len(other[1]), age(other[0])))
    last = find_checkpoint(nearest.run)
    done = int(last.name.rpartition("_")[2]) if last is not None else 0
    may_go_on = all(may_change(name, old) for name, (old, _) in changes.items())
    hint = (
        f"; resume={nearest.run} would go on with it after step {done}"
        if may_go_on and done <= config.train.steps
        else ""
    )
    print(
        f"resume=auto found no run of these options, so a new one begins; the nearest, {nearest.run}, has "
        f"others: {format_changes(changes)}{hint if not in_sweep else ''}"
    )
    return None


def _previous(run: Path, config: RunConfig) -> Previous | None:
    """The run of a folder, with what ``config`` changes in it; None where it cannot be continued."""
    try:
        description = read_run(run)
    except (OSError, ValueError):
        return None
    if find_checkpoint(run) is None:
        return None
    return Previous(run, _changes(description, config), description.get("changes", []))


def _changes(description: dict[str, Any], config: RunConfig) -> Changes:
    """What ``config`` changes in a run of this description, apart from where it writes and is shown."""
    free = {*UNIDENTIFYING, "data.cache"} - {*WHERE}
    changes = {
        name: change
        for name, change in differences(description["config"], config).items()
        if not is_among(name, free)
    }
    before = description.get("ranks", ranks())
    return changes if before == ranks() else {**changes, "ranks": (before, ranks())}


def history_of(found: Previous, step: int) -> dict[str, Any]:
    """What the files of a run note of changes since its first step; nothing where there were none."""
    now = [{"after_step": step, "options": found.changes}] if found.changes else []
    changes = found.earlier_changes + now
    return {"changes": changes} if changes else {}


def warn_of_changes(config: RunConfig, found: Previous, step: int) -> None:
    """Warn where what comes after ``step`` is not what the options make of a run that begins with them."""
    before, run = found.changes, found.run
    had = {name.partition(".")[2]: old for name, (old, _) in before.items() if name.startswith("optim.")}
    optim, steps = dataclasses.replace(config.optim, **had), config.train.steps
    steps_before = before["train.steps"][0] if "train.steps" in before else steps
    if not same_until(step, optim, steps_before, config.optim, steps):
        rate = learning_rate(optim, step - 1, steps_before)
        over = step >= steps_before and optim.schedule != "constant"
        ended = f", where optim.schedule={optim.schedule} ended" if over else ""
        next_rate = learning_rate(config.optim, step, steps)
        goes_on = f", and is {next_rate:.3g} in step {step + 1}" if step < steps else ""
        warnings.warn(
            f"the learning rate of {run} was {rate:.3g} in step {step}{ended}{goes_on}; so the result is not "
            f"that of {steps} steps with these options from the start",
            stacklevel=2,
        )
    if changed := " and ".join(name for name in EVALUATION if name in before):
        warnings.warn(
            f"validation losses up to step {step} were measured with other {changed}; the best checkpoint is "
            "looked for anew",
            stacklevel=2,
        )


def _deciding(changes: Changes) -> Changes:
    """Those of the changes that decide a run's numbers, but for their rounding."""
    free = (*WHERE, *UNIDENTIFYING_OPTIONS)
    return {name: change for name, change in changes.items() if not is_among(name, free)}


def _rounding(changes: Changes) -> Changes:
    """Those of the changes that decide a run's numbers to the last bit."""
    return {name: change for name, change in changes.items() if name not in UNIDENTIFYING_OPTIONS}


def lines_before(previous: Path, step: int, last_step: int) -> list[dict[str, Any]]:
    """Metrics of the run to continue that will not be logged again: up to its checkpoint.

    The evaluations of whole splits at the very end come after the last checkpoint, all else comes before.
    """
    lines = [line for line in read_metrics(previous) if line["step"] <= step]
    at_the_end = ("valid/whole_loss", "test/loss", "sets/")
    return [
        line
        for line in lines
        if line["step"] < last_step or not any(key.startswith(at_the_end) for key in line)
    ]
