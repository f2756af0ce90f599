"""All options of a run and of a benchmark, as Hydra composes them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from muse.config.benchmark import BenchmarkConfig
from muse.config.data import DataConfig, TokenizerConfig
from muse.config.model import ModelConfig
from muse.config.stage import StageConfig
from muse.config.training import HardwareConfig, LoggerConfig, OptimConfig, StackConfig, TrainConfig
from muse.errors import ConfigError
from muse.options import check_options, option


@dataclass
class RunConfig:
    """Everything ``train.py`` needs."""

    stage: StageConfig = field(default_factory=StageConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = option(0, "seed of initialisation, data order and dropout.", at_least=0)
    resume: str = option(
        "never",
        "never, auto (continue the newest run of the same options, or take its results) or the folder of "
        "a run, whose options are taken where none is given; how it goes on may change.",
    )
    output_root: str = option("outputs", "folder in which runs are written and looked for.")
    profile: bool = option(
        False, "whether the first steps are profiled (train.py only); see docs/profiling.md."
    )

    def __post_init__(self) -> None:
        check_options(self)
        stride = self.train.eval_stride
        if stride is not None and stride > self.model.seq_len:
            raise ConfigError(
                f"train.eval_stride={stride} skips tokens; it must be at most "
                f"model.seq_len={self.model.seq_len}"
            )
        if (self.optim.selection == "reducible") != (self.train.reference is not None):
            raise ConfigError(
                f"optim.selection={self.optim.selection} and train.reference="
                f"{self.train.reference or 'null'} do not go together; reducible needs train.reference=<run "
                "folder>, and nothing else has one"
            )
        if self.data.packing == "documents":
            self._check_packed()
        if self.hardware.parallel == "fsdp":
            self._check_sharded()

    def _check_packed(self) -> None:
        stage, selection = self.stage, self.optim.selection
        window, weight = stage.attention_window, stage.koopman_prediction
        for name, value, refused, instead in (
            ("stage", stage.number, stage.number == "3a", "0, 1, 2 or 3"),
            ("stage.mixer", stage.mixer, stage.mixer == "none", "attention"),
            ("stage.mera", stage.mera, stage.mera != "none", "none"),
            ("stage.attention_window", window, window is not None, "null"),
            ("stage.koopman_prediction", weight, weight > 0, "0"),
            ("optim.selection", selection, selection != "none", "none"),
        ):
            if refused:
                raise ConfigError(
                    f"data.packing=documents does not go with {name}={value}, which takes a window for one "
                    f"text; choose {name}={instead}, or data.packing=stream"
                )

    def _check_sharded(self) -> None:
        for name, value, refused, instead in (
            ("optim", self.optim.name, "muon", "optim=adamw"),
            ("stage.precision", self.stage.precision, "fp16-mixed", "bf16-mixed"),
            ("hardware.compile", self.hardware.compile, True, "hardware.compile=false"),
        ):
            if value == refused:
                raise ConfigError(
                    f"{name}={str(value).lower()} does not go with hardware.parallel=fsdp; choose "
                    f"{instead} or hardware.parallel=ddp"
                )


@dataclass
class BenchConfig(RunConfig):
    """Everything ``bench.py`` needs: a run and what to measure of it."""

    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    stack: StackConfig = field(default_factory=StackConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile:
            raise ConfigError(
                "profile=true is an option of train.py; bench.py has benchmark=throughput and vram"
            )
        if self.hardware.parallel != "none":
            raise ConfigError(
                f"hardware.parallel={self.hardware.parallel} is an option of train.py; bench.py measures in "
                "one process, without torchrun"
            )


@functools.cache
def register_schemas() -> None:
    """Make the dataclasses known to Hydra under the names that conf/train.yaml and conf/bench.yaml use."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=RunConfig)
    store.store(name="bench_schema", node=BenchConfig)


def build_config(composed: DictConfig) -> Any:
    """Turn Hydra's composed configuration into checked dataclasses.

    Raises:
        ConfigError: when a value is not allowed, or refers to an option that does not exist.
    """
    try:
        return OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key} cannot be used: {str(error).splitlines()[0]}") from error
