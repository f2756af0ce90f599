"""The options that a checkpoint was trained with: its weights mean something with no others."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException

from muse.config import BenchConfig, StageConfig, WidthConfig
from muse.errors import ConfigError
from muse.runs.checkpoints import find_checkpoint, stored_tensors
from muse.runs.options import differences, stored_options, told, was_moved, with_options_of

# Options of a stage that say how a model is initialised, trained or computed, but not what it computes.
FREE = (
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
# What a checkpoint says of a benchmark.
GROUPS = ("stage", "model", "data", "tokenizer")
# What two models must have in common to be compared.
TEXT = ("data.name", "data.path", "data.variant", "tokenizer.name", "tokenizer.vocab_size", "tokenizer.path")


def of_checkpoint(config: BenchConfig, given: Collection[str]) -> BenchConfig:
    """``config`` with the model, the text and the tokenizer that ``benchmark.checkpoint`` was trained with.

    A flow has no weights that tell its steps or its integrator, so another one would load without a word.

    Args:
        config: composed from what was given and defaults.
        given: names of the options, and of the groups, that the command gives.

    Raises:
        ConfigError: an option was given that says something else; names each.
    """
    checkpoint = config.benchmark.checkpoint
    if checkpoint is None:
        return config
    place = Path(checkpoint)
    taken = with_options_of(config, "benchmark.checkpoint", place, given, GROUPS, _may_differ)
    size = _vocabulary(place) or taken.model.vocab_size
    return dataclasses.replace(taken, model=dataclasses.replace(taken.model, vocab_size=size))


def _may_differ(name: str, trained_with: Any) -> bool:
    """Whether a benchmark may give an option another value than the checkpoint was trained with."""
    group, _, option = name.partition(".")
    return (group == "stage" and option in FREE) or was_moved(name, trained_with)


def _vocabulary(checkpoint: Path) -> int | None:
    """Entries of the vocabulary that the weights are for; None where that cannot be read."""
    try:
        if checkpoint.suffix == ".safetensors":
            with safe_open(checkpoint, "pt") as opened:
                return int(opened.get_slice("embedding.weight").get_shape()[0])
        folder = find_checkpoint(checkpoint, "best") or checkpoint
        return int(stored_tensors(folder)["model.embedding.weight"][0][0])
    # Whoever loads the weights says what is wrong with them; CheckpointException is no Exception.
    except (OSError, SafetensorError, KeyError, ValueError, CheckpointException):
        return None


def check_baseline(config: BenchConfig) -> None:
    """See that ``benchmark.baseline_checkpoint`` can stand beside the model, before anything is measured.

    Args:
        config: as ``of_checkpoint`` returns it.

    Raises:
        ConfigError: it is of a wrong stage, or was trained on another text or with another tokenizer.
    """
    checkpoint = config.benchmark.baseline_checkpoint
    if checkpoint is None or config.stage.number == "3a":
        return
    stored = stored_options(Path(checkpoint))
    _require_stage(checkpoint, stored, "1" if config.stage.number == "2" else "0")
    if config.benchmark.checkpoint is None:
        return
    apart = {
        name: values
        for name, values in differences(stored, config).items()
        if name in TEXT and not (name.endswith(".path") and _same_place(*values))
    }
    if apart:
        raise ConfigError(
            f"benchmark.baseline_checkpoint={checkpoint} was trained on another text than "
            f"benchmark.checkpoint={config.benchmark.checkpoint}, or with another tokenizer ({told(apart)}), "
            "so their perplexities cannot be compared; give one that was trained on the same"
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


def tokens_seen(checkpoint: str) -> int:
    """Tokens that the training of a checkpoint is long."""
    stored = stored_options(Path(checkpoint))
    train, accumulation = stored["train"], stored["optim"]["accumulation"]
    return int(train["steps"] * train["batch_size"] * accumulation * stored["model"]["seq_len"])


def as_trained(config: BenchConfig, checkpoint: str) -> BenchConfig:
    """``config`` with all that a checkpoint of its stage was trained with and that says what it computes.

    Raises:
        ConfigError: the checkpoint is of another stage, or of a version with other options.
    """
    stored = stored_options(Path(checkpoint))
    number = config.stage.number
    _require_stage(checkpoint, stored, number)
    try:
        stage = {name: value for name, value in stored["stage"].items() if name not in FREE}
        width = {name: stored["model"][_widths(number)][name] for name in dataclasses.asdict(WidthConfig())}
        changed = OmegaConf.merge(OmegaConf.structured(config.stage), stage)
    except (KeyError, TypeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{checkpoint} was trained by a version with other options: {error}") from error
    built = OmegaConf.to_object(changed)
    assert isinstance(built, StageConfig)
    widths: dict[str, Any] = {_widths(number): WidthConfig(**width)}
    return dataclasses.replace(config, stage=built, model=dataclasses.replace(config.model, **widths))


def _widths(stage_number: str) -> str:
    return "real" if stage_number in ("0", "3a") else "complex"
