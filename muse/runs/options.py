"""The options that a run was made with, beside those of a command that goes on with it or measures it."""

from __future__ import annotations

import dataclasses
import glob
import json
import typing
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open

from muse.config import BenchConfig, RunConfig
from muse.errors import ConfigError
from muse.options import options_of
from muse.runs.folder import read_run, run_of

C = TypeVar("C", bound=RunConfig)
# From the value of an option to another one.
Changes = dict[str, tuple[Any, Any]]

# Options that a choice of a group says; the others below it are what is usual for the choice.
CHOICE = {option.given_as: path for path, option in options_of(BenchConfig).items() if option.given_as}
# Options whose value is a mapping from names that a command chooses.
BY_NAME = frozenset(
    path for path, option in options_of(BenchConfig).items() if typing.get_origin(option.type) is dict
)
# Stands for the value of an option that this version does not have.
UNKNOWN = "no option of this version"
# Options that say how a run goes on: resume=<run folder> may give other values than it had so far.
CHANGEABLE = (
    *(
        f"train.{name}"
        for name in ("steps", "eval_every", "eval_tokens", "eval_stride", "early_stop", "test")
    ),
    "train.eval_sets",
    *(f"train.{name}" for name in ("checkpoint_every", "async_checkpoint", "sample_tokens")),
    *(f"optim.{name}" for name in ("lr", "muon_lr", "schedule", "warmup", "decay", "final_lr")),
)
# Options that say how a model is initialised, trained or computed, but not what it computes.
FREE = tuple(
    f"stage.{name}"
    for name in (
        "precision",
        "init",
        "embedding_init",
        "zeta_scale",
        "dropout",
        "gradient",
        "force_precision",
        "fraction_bits",
        "recon_threshold",
        "verify",
    )
)
# Options that say it, which weights that a training begins with may be given otherwise.
RETRAINABLE = (
    *FREE,
    *(f"stage.{name}" for name in ("recompute", "recompute_blocks")),
    *(f"model.{name}" for name in ("seq_len", "lr")),
)
# Most options that a message names.
MOST_NAMED = 10


def may_change(name: str, trained_with: Any) -> bool:
    """Whether a run may go on with another value of an option than it was trained with."""
    return name in CHANGEABLE or is_missing_path(name, trained_with)


def is_missing_path(name: str, trained_with: Any) -> bool:
    """Whether an option is a path to the text or the tokenizer, which is not where it was."""
    if name == "data.sources":
        paths = (source[key] for source in trained_with.values() for key in ("path", "valid", "test"))
        return any(path is not None and not _is_there(path) for path in paths)
    if name not in ("data.path", "data.valid", "data.test", "tokenizer.path"):
        return False
    return trained_with is None or not _is_there(trained_with)


def _is_there(path: str) -> bool:
    # data=files may have a pattern.
    return Path(path).exists() or bool(glob.glob(path))


def stored_options(place: Path) -> dict[str, Any]:
    """The configuration, as JSON, of a run folder, one of its checkpoints or a file of ``muse.export``.

    Raises:
        ConfigError: there is none.
    """
    try:
        if place.suffix == ".safetensors":
            with safe_open(place, "pt") as opened:
                config: dict[str, Any] = json.loads((opened.metadata() or {})["config"])
        else:
            config = read_run(run_of(place))["config"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{place} does not say which options its weights were trained with ({error}); give the "
            "folder of a run of train.py or a file of python -m muse.export"
        ) from error
    return config


def differences(stored: Mapping[str, Any], config: RunConfig) -> Changes:
    """Options of ``config`` that are not those that were ``stored``, by name: the stored value and its own.

    An option that the stored configuration lacks, because it is older, had what is the default now.
    """
    # As JSON has them.
    own = flattened(json.loads(json.dumps(dataclasses.asdict(config))))
    kept = {**flattened(dataclasses.asdict(type(config)())), **flattened(stored)}
    return {
        name: (kept.get(name), own.get(name, UNKNOWN))
        for name in sorted(own.keys() | kept.keys())
        if name not in own or kept.get(name) != own[name]
    }


def with_options_of(
    config: C,
    option: str,
    place: Path,
    given: Collection[str],
    groups: Collection[str],
    may_differ: Callable[[str, Any], bool],
) -> C:
    """``config`` with what a run was made with in place of each option of ``groups`` that was not ``given``.

    Args:
        config: composed from what was given and defaults.
        option: name of the option that names the run.
        place: of the run, see ``stored_options``.
        given: names of the options, and of the groups, that the command gives.
        groups: first parts of the names of options that are taken; ``data.cache`` is no matter of the run.
        may_differ: whether an option, given by its name and the run's value, may be given another value.

    Raises:
        ConfigError: an option was given that must not differ, see ``refuse_changes``; or the run has options
            that this version does not know, or values that are not allowed.
    """
    stored = stored_options(place)
    changes = {
        name: values
        for name, values in differences(stored, config).items()
        if _group(name) in groups and name != "data.cache"
    }
    given_changes = {name: values for name, values in changes.items() if _is_given(name, given)}
    refuse_changes(
        option, place, {name: both for name, both in given_changes.items() if not may_differ(name, both[0])}
    )
    merged = OmegaConf.structured(config)
    try:
        for name, (kept, own) in changes.items():
            if own is UNKNOWN:
                raise ConfigError(f"{place} was trained with {name}={format_value(kept)}, which is {UNKNOWN}")
            if name not in given_changes:
                OmegaConf.update(merged, name, kept)
        built = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{place} was trained by a version with other options: {reason}") from error
    assert isinstance(built, type(config))
    return built


def refuse_changes(option: str, place: Path, changes: Changes) -> None:
    """Refuse what a command says against the run that an option names.

    Raises:
        ConfigError: there is something; names each option with the value of the run and that of the command.
    """
    if changes:
        raise ConfigError(
            f"{option}={place} was trained with other options ({format_changes(changes)}); leave these out, "
            "they come from the run"
        )


def stage_and_model(stage: str, model: str, resume: str, weights: str | None) -> str:
    """Name of the folder for runs of a stage and model, which are those of the run that a command names.

    Args:
        stage: as composed.
        model: its name, as composed.
        resume: the option.
        weights: that a command measures, or begins with.
    """
    place = resume if resume not in ("never", "auto") else weights
    if place is not None:
        # A place without a configuration is refused where the run begins.
        with suppress(ConfigError, KeyError, TypeError):
            stored = stored_options(Path(place))
            stage, model = stored["stage"]["number"], stored["model"]["name"]
    return f"stage{stage}-{model}"


def format_changes(changes: Mapping[str, tuple[Any, Any]], most: int = MOST_NAMED) -> str:
    """The changes as ``train.steps: 8 → 12, seed: 0 → 1``, of many the first ones and how many there are."""
    parts = [
        f"{name_as_given(name)}: {format_value(old)} → {format_value(new)}"
        for name, (old, new) in changes.items()
    ]
    more = len(parts) - most
    return ", ".join(parts[:most]) + (f" and {more} more" if more > 0 else "")


def is_among(name: str, names: Collection[str]) -> bool:
    """Whether an option is one of ``names`` or in one of these groups."""
    parts = name.split(".")
    return any(".".join(parts[: length + 1]) in names for length in range(len(parts)))


def _group(name: str) -> str:
    return name.partition(".")[0]


def _is_given(name: str, given: Collection[str]) -> bool:
    group = _group(name)
    if group in CHOICE and group in given:
        given = [*(other for other in given if other != group), CHOICE[group]]
    return is_among(name, given)


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What nested mappings hold, by the names on the way with dots between them; ``BY_NAME`` stay whole."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and f"{prefix}{name}" not in BY_NAME:
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def name_as_given(name: str) -> str:
    """Name of an option as a command gives it: ``stage`` of ``stage=2``."""
    return _group(name) if name in CHOICE.values() else name


def format_value(value: object) -> str:
    """Value of an option as a command gives it."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{format_value(inner)}" for name, inner in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
