from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from muse.config import ModelConfig, StageConfig, WidthConfig
from muse.models import LanguageModel, build_model

VOCAB = 61
MODEL = ModelConfig(
    name="test",
    vocab_size=VOCAB,
    seq_len=70,
    real=WidthConfig(d_model=24, layers=2, heads=4, kv_heads=2, d_ff=40),
    complex=WidthConfig(d_model=12, layers=2, heads=4, kv_heads=2, d_ff=20),
)


@pytest.fixture
def build() -> Callable[..., LanguageModel]:
    """Builds a small model of a stage, in float32 unless told otherwise."""

    def build_small(number: int = 1, seed: int = 0, layers: int = 2, **options: Any) -> LanguageModel:
        options = {"precision": "fp32", "activation": "split_gelu" if number else "gelu"} | options
        model = replace(
            MODEL, real=replace(MODEL.real, layers=layers), complex=replace(MODEL.complex, layers=layers)
        )
        return build_model(StageConfig(number=str(number), **options), model, VOCAB, seed)

    return build_small
