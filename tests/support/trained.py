"""Runs with random weights, as train.py leaves them, that take no training."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from muse.config import DataConfig, RunConfig, TokenizerConfig
from muse.data import load_tokens
from muse.files import write_json
from muse.models import LanguageModel, build_model
from muse.runs.checkpoints import TrainingState
from muse.runs.folder import RUN_FILE, TOKENIZER_FILE
from muse.runs.provenance import provenance
from muse.training.checkpoint import CheckpointWriter
from support.configs import run_config, small_sizes, stage_config, write_text


def make_trained(
    folder: Path, stage: str = "1", seq_len: int = 16, **options: Any
) -> tuple[Path, RunConfig, LanguageModel]:
    """The folder of a run of a small model on a small text, its options, and the model."""
    config = dataclasses.replace(
        run_config(stage_config(stage, **options), steps=3),
        data=DataConfig(name="text", path=str(write_text(folder)), cache=str(folder / "cache")),
        tokenizer=TokenizerConfig(name="bpe", vocab_size=300),
        model=small_sizes(300, seq_len, kv_heads=2),
    )
    data = load_tokens(config.data, config.tokenizer, 300)
    model = build_model(config.stage, config.model, data.vocab_size, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from an even choice of tokens, and from the identity.
            parameter.mul_(1.5)
    run = folder / "run"
    state = TrainingState(3, {}, [], math.inf, None)
    CheckpointWriter(run / "checkpoints").save(
        {"model": model.state_dict(), "optimizer": {}}, state, best=True
    )
    write_json(run / RUN_FILE, provenance(config))
    assert data.tokenizer is not None
    (run / TOKENIZER_FILE).write_text(data.tokenizer.to_json(), encoding="utf-8")
    return run, config, model.eval()
