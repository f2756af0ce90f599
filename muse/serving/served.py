"""The model that a server has: its name, its limits, and what its answers are known by."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from muse.data import Tokenizer
from muse.errors import ConfigError
from muse.hardware import describe
from muse.models.language_model import model_device
from muse.runs.provenance import package_version, source_hash
from muse.trained import Trained


@dataclass(frozen=True)
class Served:
    """What requests are checked against.

    Attributes:
        name: that clients ask for.
        tokenizer: text to tokens and back.
        vocabulary: tokens of the model; every id is below it.
        window: tokens of a prompt and its answer together.
        longest: bytes of the longest token; None where words are tokens, of any length.
        fingerprint: hash of weights, tokenizer, versions and precision: equal ones give equal answers.
    """

    name: str
    tokenizer: Tokenizer
    vocabulary: int
    window: int
    longest: int | None
    fingerprint: str


def served(trained: Trained, name: str | None = None) -> Served:
    """What is told of a trained model.

    Args:
        trained: of ``muse.load``.
        name: that clients ask for; by default of its stage and size.

    Raises:
        ConfigError: it has no tokenizer.
    """
    _, tokenizer, config = trained
    if tokenizer is None:
        raise ConfigError("the model has no tokenizer, without which there is no text to serve")
    size = tokenizer.vocab_size
    longest = None if tokenizer.of_words else max(len(tokenizer.bytes_of(index)) for index in range(size))
    name = name or f"muse-stage{config.stage.number}-{config.model.name}"
    return Served(name, tokenizer, size, config.model.seq_len, longest, fingerprint(trained))


def fingerprint(trained: Trained) -> str:
    """Short hash of all that decides an answer beside the request."""
    digest = hashlib.sha256()
    for name, value in sorted(trained.model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    tokenizer = trained.tokenizer.digest if trained.tokenizer is not None else ""
    device = describe(model_device(trained.model))
    precision = trained.config.stage.precision
    for part in (tokenizer, package_version("torch"), source_hash(), device, precision):
        digest.update(f"\n{part}".encode())
    return digest.hexdigest()[:16]
