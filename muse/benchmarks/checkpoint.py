"""The options that a checkpoint was trained with: its weights mean something with no others."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException

from muse.config import BenchConfig
from muse.runs.checkpoints import find_checkpoint, stored_tensors
from muse.runs.options import is_missing_path, stored_options, with_options_of

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
    size = _vocabulary(place) or taken.model.vocab_size
    return dataclasses.replace(taken, model=dataclasses.replace(taken.model, vocab_size=size))


def _may_differ(name: str, trained_with: Any) -> bool:
    """Whether a benchmark may give an option another value than the checkpoint was trained with."""
    group, _, option = name.partition(".")
    return (group == "stage" and option in FREE) or is_missing_path(name, trained_with)


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


def tokens_seen(checkpoint: str) -> int:
    """Tokens that the training of a checkpoint is long."""
    stored = stored_options(Path(checkpoint))
    train, accumulation = stored["train"], stored["optim"]["accumulation"]
    return int(train["steps"] * train["batch_size"] * accumulation * stored["model"]["seq_len"])
