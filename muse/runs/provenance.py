"""What a result was made with: versions, commit, configuration."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from muse.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "numpy", "tokenizers", "datasets", "hydra-core", "omegaconf", "wandb")
# What the compiler made of each configuration, in kernels/: a record that nothing runs by.
RESOURCES = "resources.json"
# Options that change where a run writes or what it shows, but not a number in it.
UNIDENTIFYING = ("resume", "logger", "hardware", "output_root", "profile")
UNIDENTIFYING_OPTIONS = ("data.cache", "train.async_checkpoint")


def package_version(package: str) -> str | None:
    """Version of an installed package; None where it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def commit() -> str | None:
    """Commit of the checkout, with ``-dirty`` where tracked files differ; None outside a checkout."""
    # An installed package may lie in an environment within somebody's checkout of something else.
    if not (ROOT / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


@cache
def source_hash() -> str:
    """SHA-256 over the project's Python files and the kernels' launch configurations.

    Two results with equal hashes come from equal code.
    """
    digest = hashlib.sha256()
    code = [path for folder in ("muse", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]
    pinned = [path for path in sorted((ROOT / "kernels").rglob("*.json")) if path.name != RESOURCES]
    for path in code + pinned:
        digest.update(str(path.relative_to(ROOT)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def identity(config: RunConfig, extra: str = "") -> str:
    """Short hash of the options that decide a run's numbers; equal for a run and its continuation."""
    options: dict[str, Any] = dataclasses.asdict(config)
    for name in UNIDENTIFYING:
        options.pop(name)
    for name in UNIDENTIFYING_OPTIONS:
        group, option = name.split(".")
        options[group].pop(option)
    options.get("benchmark", {}).pop("rerun", None)
    text = json.dumps(options, sort_keys=True) + extra
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def provenance(config: RunConfig) -> dict[str, Any]:
    """Versions, commit, seed, configuration and time, for the JSON files of a run."""
    packages = {name: package_version(name) for name in PACKAGES}
    return {
        "versions": {"python": platform.python_version(), **packages},
        "commit": commit(),
        "seed": config.seed,
        "config": dataclasses.asdict(config),
        "identity": identity(config),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
