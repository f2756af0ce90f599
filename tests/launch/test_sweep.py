"""The ready entries for launchers and sweepers, and what is told where their plugins are missing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from muse.config import register_schemas
from muse.errors import ConfigError
from muse.launch import sweep
from muse.launch.sweep import PLUGINS, check_plugins, digest, searched_options

CONF = Path(__file__).resolve().parents[2] / "conf"


@dataclass
class Ray:
    """What hydra-ray-launcher 1.2 allows; Ray itself is too large for the tests."""

    init: dict[str, Any] = field(default_factory=lambda: {"address": None})
    remote: dict[str, Any] = field(default_factory=dict)


@dataclass
class RayLauncher:
    _target_: str = "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"
    ray: Ray = field(default_factory=Ray)


def entry(*overrides: str) -> Any:
    """What Hydra is told itself."""
    register_schemas()
    ConfigStore.instance().store(group="hydra/launcher", name="ray", node=RayLauncher)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*overrides, "hydra.job.name=train"], return_hydra_config=True).hydra


def test_there_is_an_entry_for_each_option_that_needs_a_plugin():
    files = {str(path.relative_to(CONF).with_suffix("")) for path in (CONF / "hydra").rglob("*.yaml")}
    assert {option.replace("=", "/") for option in PLUGINS} == files


@pytest.mark.parametrize(
    ("launcher", "target", "values"),
    [
        ("processes", "JoblibLauncher", {"n_jobs": 2}),
        ("slurm", "SlurmLauncher", {"gpus_per_node": 1, "max_num_timeout": 3}),
        ("ray_cluster", "RayLauncher", {"ray.remote.num_cpus": 2, "ray.init.address": None}),
    ],
)
def test_the_entries_build_on_those_of_the_plugins(launcher, target, values):
    chosen = entry(f"hydra/launcher={launcher}").launcher
    assert chosen._target_.endswith(f".{target}")
    assert {name: OmegaConf.select(chosen, name) for name in values} == values


def test_the_search_is_kept_below_the_folder_of_outputs(tmp_path):
    chosen = entry("hydra/sweeper=search", f"output_root={tmp_path}").sweeper
    assert chosen.storage == f"sqlite:///{tmp_path}/optuna.db"
    assert set(chosen.params) == {"optim.lr", "optim.warmup", "optim.weight_decay"}


def test_what_is_searched_is_what_the_command_line_leaves_open():
    chosen = entry("hydra/sweeper=search")
    told = [
        "optim.weight_decay=0.1",
        "optim.warmup=tag(log,int(interval(1,100)))",
        "stage.norm=choice(rms,layer)",
        "train.steps=3",
    ]
    given = OmegaConf.create({"sweeper": {"params": chosen.sweeper.params}, "overrides": {"task": told}})
    assert searched_options(given) == {"optim.lr": True, "optim.warmup": True, "stage.norm": False}


def test_a_study_belongs_to_the_options_that_decide_its_numbers():
    same = digest(["stage='1'", "train.steps=3"])
    assert digest(["train.steps=3", "logger=none", "stage='1'", "resume=auto", "hardware.threads=1"]) == same
    assert digest(["stage='1'", "train.steps=4"]) != same


def test_a_plugin_that_is_missing_is_one_sentence(monkeypatch):
    check_plugins(["train.py", "-m", "hydra/launcher=basic"])
    monkeypatch.setattr(sweep, "_installed", lambda plugin: False)
    with pytest.raises(ConfigError, match=r'^hydra/launcher=slurm needs .* pip install -e "\.\[slurm\]"'):
        check_plugins(["train.py", "-m", "hydra/launcher=slurm"])
