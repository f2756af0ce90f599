"""What a preset, ``experiment=``, says against the run that a command names."""

from __future__ import annotations

import dataclasses
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from muse.config import RunConfig
from muse.processes.torchrun import launched_rank
from muse.runs.options import flattened, format_changes

GROUP = "experiment"


def tell_what_gave_way(composed: RunConfig, taken: RunConfig, named: str) -> None:
    """Print each option of the preset in whose place the one of a run is taken.

    Args:
        composed: as Hydra has it.
        taken: with the options of the run.
        named: the run, as the command names it.
    """
    own, kept = (flattened(dataclasses.asdict(config)) for config in (composed, taken))
    changes = {name: (value, kept[name]) for name, value in own.items() if value != kept[name]}
    if not changes or launched_rank() > 0 or not HydraConfig.initialized():
        return
    preset = HydraConfig.get().runtime.choices.get(GROUP)
    if preset is None:
        return
    others = _without_preset()
    lost = {name: both for name, both in changes.items() if others.get(name) != both[0]}
    if lost:
        print(f"{GROUP}={preset} gives way to {named} in {format_changes(lost, len(lost))}")


def _without_preset() -> dict[str, Any]:
    """The options by name, composed of all that this job was given but the preset."""
    hydra = HydraConfig.get()
    given = [item for item in hydra.overrides.task if item.partition("=")[0].strip("+") != GROUP]
    loader = GlobalHydra.instance().config_loader()
    composed = loader.load_configuration(hydra.job.config_name, given, RunMode.RUN)
    values = {key: OmegaConf.select(composed, str(key)) for key in composed if key != "hydra"}
    container = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    assert isinstance(container, dict)
    return flattened({str(key): value for key, value in container.items()})
