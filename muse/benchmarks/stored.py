"""The options that a checkpoint was trained with: its weights mean something with no others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open

from muse.config import BenchConfig, StageConfig, WidthConfig
from muse.errors import ConfigError

RUN_FILE = "run.json"
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
OF_FLOW = (
    "ode_steps",
    "dt",
    "integrator",
    "potential",
    "potential_width",
    "phi",
    "flows",
    "context",
    "confinement",
)


def stored_config(checkpoint: str) -> dict[str, Any]:
    """The configuration, as JSON, of a run folder, one of its checkpoints or a file of ``muse.export``.

    Raises:
        ConfigError: there is none.
    """
    path = Path(checkpoint)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as opened:
                config = json.loads((opened.metadata() or {})["config"])
        else:
            # Also <run>/checkpoints/step_00000200.
            files = [folder / RUN_FILE for folder in (path, path.parent.parent)]
            file = next((file for file in files if file.exists()), files[0])
            config = json.loads(file.read_text(encoding="utf-8"))["config"]
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{checkpoint} does not say which options its weights were trained with ({error}); give the "
            "folder of a run of train.py or a file of python -m muse.export"
        ) from error
    assert isinstance(config, dict)
    return config


def check_checkpoint(config: BenchConfig) -> None:
    """See that ``benchmark.checkpoint`` was trained as the options say.

    A flow has no weights that tell its steps or its integrator, so another one would load without a word.

    Raises:
        ConfigError: it was not; names the first option that differs.
    """
    checkpoint = config.benchmark.checkpoint
    if checkpoint is None:
        return
    stored = stored_config(checkpoint)
    for name in _defining(config.stage.number):
        group, _, option = name.rpartition(".")
        own = OmegaConf.select(OmegaConf.create(dataclasses.asdict(config)), name)
        trained = OmegaConf.select(OmegaConf.create(stored), name)
        if own != trained:
            shown = group if option == "number" else name
            raise ConfigError(
                f"{checkpoint} was trained with {shown}={_shown(trained)}, not {_shown(own)}; give the "
                "options that it was trained with"
            )


def tokens_seen(checkpoint: str) -> int:
    """Tokens that the training of a checkpoint is long."""
    stored = stored_config(checkpoint)
    train, accumulation = stored["train"], stored["optim"]["accumulation"]
    return int(train["steps"] * train["batch_size"] * accumulation * stored["model"]["seq_len"])


def as_trained(config: BenchConfig, checkpoint: str) -> BenchConfig:
    """``config`` with all that a checkpoint of its stage was trained with and that says what it computes.

    Raises:
        ConfigError: the checkpoint is of another stage, or of a version with other options.
    """
    stored = stored_config(checkpoint)
    number = config.stage.number
    try:
        if stored["stage"]["number"] != number:
            raise ConfigError(
                f"{checkpoint} is of stage={stored['stage']['number']}; give one of stage={number}"
            )
        stage = {name: value for name, value in stored["stage"].items() if name not in FREE}
        width = {name: stored["model"][_widths(number)][name] for name in dataclasses.asdict(WidthConfig())}
        changed = OmegaConf.merge(OmegaConf.structured(config.stage), stage)
    except (KeyError, TypeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{checkpoint} was trained by a version with other options: {error}") from error
    built = OmegaConf.to_object(changed)
    assert isinstance(built, StageConfig)
    widths: dict[str, Any] = {_widths(number): WidthConfig(**width)}
    return dataclasses.replace(config, stage=built, model=dataclasses.replace(config.model, **widths))


def _widths(stage_number: str) -> str:
    return "real" if stage_number in ("0", "3a") else "complex"


def _defining(stage_number: str) -> list[str]:
    """Names of the options that say what a model computes."""
    stage = [field.name for field in dataclasses.fields(StageConfig) if field.name not in FREE]
    if stage_number != "2":
        stage = [name for name in stage if name not in OF_FLOW]
    widths = [f"{_widths(stage_number)}.{field.name}" for field in dataclasses.fields(WidthConfig)]
    return [f"stage.{name}" for name in stage] + [f"model.{name}" for name in widths]


def _shown(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
