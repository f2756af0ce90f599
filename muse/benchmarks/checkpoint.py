"""The options that a checkpoint was trained with: its weights mean something with no others."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from muse.config import BenchConfig
from muse.options import changed
from muse.runs.checkpoints import find_weights, stored_vocabulary
from muse.runs.options import FREE, is_missing_path, stored_options, with_options_of

# What a checkpoint says of a benchmark.
GROUPS = ("stage", "model", "data", "tokenizer")


def with_checkpoint_options(config: BenchConfig, given: Collection[str]) -> BenchConfig:
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
    size = stored_vocabulary(find_weights(place) or place) or taken.model.vocab_size
    return changed(taken, model={"vocab_size": size})


def _may_differ(name: str, trained_with: Any) -> bool:
    """Whether a benchmark may give an option another value than the checkpoint was trained with."""
    return name in FREE or is_missing_path(name, trained_with)


def tokens_seen(checkpoint: str) -> int:
    """Tokens that the training of a checkpoint is long."""
    stored = stored_options(Path(checkpoint))
    train, accumulation = stored["train"], stored["optim"]["accumulation"]
    return int(train["steps"] * train["batch_size"] * accumulation * stored["model"]["seq_len"])
