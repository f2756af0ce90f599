import dataclasses

import pytest
from support.configs import small_width

from muse.config import BenchConfig, BenchmarkConfig, ModelConfig, StageConfig


@pytest.fixture(scope="session")
def bench_config():
    """A benchmark of a model that takes milliseconds; keyword arguments replace fields of its parts."""

    def build(number=1, precision="fp32", **benchmark):
        width = small_width(d_model=16, kv_heads=2, d_ff=32)
        return BenchConfig(
            stage=StageConfig(
                number=str(number), precision=precision, activation="gelu" if number == 0 else "split_gelu"
            ),
            model=ModelConfig(
                name="test",
                vocab_size=97,
                seq_len=32,
                real=dataclasses.replace(width, d_model=24),
                complex=width,
            ),
            benchmark=BenchmarkConfig(
                **{"batch_size": 2, "seq_len": 16, "warmup": 0, "repeats": 1, "inputs": 3, **benchmark}
            ),
        )

    return build
