"""Small configurations: models with some thousand parameters, and data that they can learn."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from muse.config import (
    DataConfig,
    HardwareConfig,
    LoggerConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    StageConfig,
    TokenizerConfig,
    TrainConfig,
    WidthConfig,
)
from muse.data import Counts, TokenData

VOCAB = 13
SEQ_LEN = 8
# 20 training windows, so an epoch has 19 (see training_batch): ten batches of two reach the second one.
TRAIN_TOKENS = 20 * SEQ_LEN + 5
# On a command line, a model that is a little wider.
WIDTH = "{d_model:16,layers:2,heads:2,kv_heads:2,d_ff:32}"
SMALL_MODEL = ["model.vocab_size=300", "model.seq_len=16", f"model.real={WIDTH}", f"model.complex={WIDTH}"]


def small_width(**changes: int) -> WidthConfig:
    return WidthConfig(**{"d_model": 8, "layers": 2, "heads": 2, "kv_heads": 1, "d_ff": 16, **changes})


def small_sizes(vocab_size: int = VOCAB, seq_len: int = SEQ_LEN, **width: int) -> ModelConfig:
    return ModelConfig("small", vocab_size, seq_len, real=small_width(**width), complex=small_width(**width))


def stage_config(number: str | int = "1", precision: str = "fp32", **options: Any) -> StageConfig:
    defaults = {
        "number": str(number),
        "precision": precision,
        "activation": "gelu" if str(number) in ("0", "3a") else "split_gelu",
        "koopman": "replace" if str(number) == "3" else "none",
    }
    return StageConfig(**defaults | options)


def run_config(stage: StageConfig, optim: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    """A run that logs every step, and saves and evaluates at its end alone."""
    defaults = {"steps": 6, "batch_size": 2, "eval_every": 0, "checkpoint_every": 0, "sample_tokens": 0}
    return RunConfig(
        stage=stage,
        model=small_sizes(),
        data=DataConfig(name="stdlib"),
        tokenizer=TokenizerConfig(name="word"),
        optim=OptimConfig(**{"lr": 0.02, "warmup": 2, **(optim or {})}),
        hardware=HardwareConfig(device="cpu"),
        logger=LoggerConfig(mode="disabled", log_every=1),
        train=TrainConfig(**{**defaults, **train}),
    )


def token_data(train_tokens: int = TRAIN_TOKENS, valid_tokens: int = 61) -> TokenData:
    """Tokens of a noisy cycle, so that there is something to learn."""
    generator = np.random.default_rng(0)

    def split(size: int) -> np.ndarray:
        return ((np.arange(size) * 5 + generator.integers(2, size=size)) % VOCAB).astype(np.uint16)

    tokens = {"train": split(train_tokens), "valid": split(valid_tokens), "test": split(40)}
    counts = {name: Counts(len(values), len(values) // 3, 2 * len(values)) for name, values in tokens.items()}
    return TokenData(**tokens, vocab_size=VOCAB, tokenizer=None, counts=counts)


def document_data(train_tokens: int = TRAIN_TOKENS) -> TokenData:
    """The same, whose zeros end documents of some thirteen tokens."""
    tokenizer: Any = SimpleNamespace(end_id=0, of_words=False)
    return dataclasses.replace(token_data(train_tokens), tokenizer=tokenizer)


def run_options(place: Path, root: str) -> list[str]:
    """A very small run, as a command gives it, of the text in ``place`` below the folder ``root`` there."""
    return [
        "data=text",
        f"data.path={place / 'text.txt'}",
        f"data.cache={place / 'cache'}",
        f"output_root={place / root}",
        "logger=none",
        "logger.log_every=1",
        "hardware=cpu",
        *SMALL_MODEL,
        "stage.dropout=0.1",
        "train.batch_size=2",
    ]


def write_text(folder: Path, lines: int = 200) -> Path:
    """A text with something to learn, for ``data=text``."""
    path = folder / "text.txt"
    text = "".join(f"Line {n} says\n    that {n * n} is the square of {n}.\n" for n in range(lines))
    path.write_text(text, encoding="utf-8")
    return path
