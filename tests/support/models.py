"""The models and stages of conf/."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from muse.config import ModelConfig, StageConfig, WidthConfig

CONF = Path(__file__).resolve().parents[2] / "conf"


def model_config(name: str) -> ModelConfig:
    values = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{name}.yaml"))
    widths = {part: WidthConfig(**values.pop(part)) for part in ("real", "complex")}
    return ModelConfig(**values, **widths)


def stage_config(number: int | str, **options: object) -> StageConfig:
    values = OmegaConf.to_container(OmegaConf.load(CONF / "stage" / f"{number}.yaml"))
    return StageConfig(**values.get("stage", values) | options)
