"""The configuration of every run: one dataclass per Hydra group, checked when it is built.

Hydra composes the YAML files of ``conf/`` against these dataclasses, so an unknown key or a
value of the wrong type fails before anything runs. Each option says with its default what it means and
which values it may have; ``__post_init__`` also checks what several options say together.
"""

from muse.config.benchmark import BENCHMARKS, BenchmarkConfig
from muse.config.data import DataConfig, SourceConfig, TokenizerConfig
from muse.config.folder import CONF
from muse.config.model import ModelConfig, WidthConfig
from muse.config.run import BenchConfig, RunConfig, build_config, register_schemas
from muse.config.stage import (
    ACTIVATIONS,
    COMPLEX_ACTIVATIONS,
    FLOWING,
    GRADIENTS,
    INTEGRATORS,
    REAL_ACTIVATIONS,
    STAGE_3_PARTS,
    StageConfig,
)
from muse.config.training import HardwareConfig, LoggerConfig, OptimConfig, StackConfig, TrainConfig

__all__ = [
    "ACTIVATIONS",
    "BENCHMARKS",
    "COMPLEX_ACTIVATIONS",
    "CONF",
    "FLOWING",
    "GRADIENTS",
    "INTEGRATORS",
    "REAL_ACTIVATIONS",
    "STAGE_3_PARTS",
    "BenchConfig",
    "BenchmarkConfig",
    "DataConfig",
    "HardwareConfig",
    "LoggerConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "SourceConfig",
    "StackConfig",
    "StageConfig",
    "TokenizerConfig",
    "TrainConfig",
    "WidthConfig",
    "build_config",
    "register_schemas",
]
