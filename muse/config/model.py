"""The options of a model: its widths."""

from __future__ import annotations

from dataclasses import dataclass

from muse.errors import ConfigError
from muse.options import check_options, option


@dataclass
class WidthConfig:
    """The sizes of one decoder."""

    d_model: int = option(96, "channels of the hidden state (complex channels in stage 1).", at_least=1)
    layers: int = option(4, "number of blocks.", at_least=1)
    heads: int = option(4, "attention heads.", at_least=1)
    kv_heads: int = option(4, "key and value heads (grouped-query attention); must divide heads.", at_least=1)
    d_ff: int = option(384, "hidden channels of the feed-forward block.", at_least=1)

    def __post_init__(self) -> None:
        check_options(self, "model.*")
        for name, of in (("d_model", "heads"), ("heads", "kv_heads")):
            size, parts = getattr(self, name), getattr(self, of)
            if size % parts:
                raise ConfigError(f"model.*.{name}={size} is not divisible by model.*.{of}={parts}")


@dataclass
class ModelConfig:
    """A size, given as the widths of both stages so that their parameter counts agree."""

    name: str = option("tiny", "name of the size.", given_as="model")
    vocab_size: int = option(
        4096,
        "vocabulary that a trained tokenizer is given, and that benchmarks without text use.",
        at_least=2,
    )
    seq_len: int = option(128, "tokens in a training window.", at_least=1)
    lr: float = option(3e-3, "peak learning rate of AdamW that suits the size.", above=0)
    real: WidthConfig = option(WidthConfig(), "widths of stage 0.")
    complex: WidthConfig = option(WidthConfig(), "widths of stage 1.")

    def __post_init__(self) -> None:
        check_options(self, "model")
