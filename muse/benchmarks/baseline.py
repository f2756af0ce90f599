"""The model of another stage that a benchmark measures beside its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from muse.config import BenchConfig, StageConfig, WidthConfig
from muse.errors import ConfigError
from muse.options import changed
from muse.runs.options import FREE, differences, format_changes, stored_options

# What two models must have in common to be compared.
TEXT = (
    *(
        f"data.{name}"
        for name in ("name", "path", "column", "valid", "test", "skip_bad", "sources", "variant")
    ),
    *(f"tokenizer.{name}" for name in ("name", "vocab_size", "path")),
)


def baseline_of(config: BenchConfig, stage: StageConfig, precision: str | None = None) -> BenchConfig:
    """The same benchmark of another stage, in its own precision or the given one.

    ``benchmark.baseline_checkpoint`` is of stage 0, and where stage 2 or 3 is measured of the one before it.
    It is measured as the model that was trained.
    """
    stage = dataclasses.replace(
        stage,
        precision=precision or stage.precision,
        dropout=config.stage.dropout,
        tied=config.stage.tied,
    )
    given = config.benchmark.baseline_checkpoint if stage.number == _number(config) else None
    baseline = changed(dataclasses.replace(config, stage=stage), benchmark={"checkpoint": given})
    return with_trained_stage(baseline, given) if given is not None else baseline


def _number(config: BenchConfig) -> str:
    """The stage of ``benchmark.baseline_checkpoint``."""
    return {"2": "1", "3": "2"}.get(config.stage.number, "0")


def check_baseline(config: BenchConfig) -> None:
    """See that ``benchmark.baseline_checkpoint`` can stand beside the model, before anything is measured.

    Args:
        config: as ``with_checkpoint_options`` returns it.

    Raises:
        ConfigError: it is of a wrong stage, or was trained on another text or with another tokenizer.
    """
    checkpoint = config.benchmark.baseline_checkpoint
    if checkpoint is None or config.stage.number == "3a":
        return
    stored = stored_options(Path(checkpoint))
    _require_stage(checkpoint, stored, _number(config))
    if config.benchmark.checkpoint is None:
        return
    changes = {
        name: values
        for name, values in differences(stored, config).items()
        if name in TEXT and not (name.endswith(".path") and _same_place(*values))
    }
    if changes:
        raise ConfigError(
            f"benchmark.baseline_checkpoint={checkpoint} was trained on another text than "
            f"benchmark.checkpoint={config.benchmark.checkpoint}, or with another tokenizer "
            f"({format_changes(changes)}), so their perplexities cannot be compared; give one that was "
            "trained on the same"
        )


def _same_place(first: str | None, second: str | None) -> bool:
    """Whether two paths lead to the same place, or may, because one of them is not there now."""
    if first is None or second is None:
        return True
    one, other = Path(first), Path(second)
    return not (one.exists() and other.exists()) or one.samefile(other)


def _require_stage(checkpoint: str, stored: dict[str, Any], number: str) -> None:
    found = stored.get("stage", {}).get("number")
    if found != number:
        raise ConfigError(f"{checkpoint} is of stage={found}; give one of stage={number}")


def with_trained_stage(config: BenchConfig, checkpoint: str) -> BenchConfig:
    """``config`` with all that a checkpoint of its stage was trained with and that says what it computes.

    Raises:
        ConfigError: the checkpoint is of another stage, or of a version with other options.
    """
    stored = stored_options(Path(checkpoint))
    number = config.stage.number
    _require_stage(checkpoint, stored, number)
    try:
        stage = {name: value for name, value in stored["stage"].items() if f"stage.{name}" not in FREE}
        width = {name: stored["model"][_widths(number)][name] for name in dataclasses.asdict(WidthConfig())}
        merged = OmegaConf.merge(OmegaConf.structured(config.stage), stage)
    except (KeyError, TypeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{checkpoint} was trained by a version with other options: {error}") from error
    built = OmegaConf.to_object(merged)
    assert isinstance(built, StageConfig)
    widths: dict[str, Any] = {_widths(number): WidthConfig(**width)}
    return changed(dataclasses.replace(config, stage=built), model=widths)


def _widths(stage_number: str) -> str:
    return "real" if stage_number in ("0", "3a") else "complex"
