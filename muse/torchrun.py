"""What torchrun tells the processes that it starts."""

from __future__ import annotations

import os

from muse.errors import ConfigError


def launched_ranks() -> int:
    """Processes that torchrun started; 0 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def launched_rank() -> int:
    """Number of this process among those that torchrun started; 0 without it."""
    return int(os.environ["RANK"]) if launched_ranks() else 0


def check_launch(parallel: str) -> None:
    """Whether ``hardware.parallel`` fits the way in which this process was started.

    Raises:
        ConfigError: it does not.
    """
    if parallel == "none" and launched_ranks() > 1:
        raise ConfigError(
            f"torchrun started {launched_ranks()} processes, but hardware.parallel=none; choose ddp or fsdp"
        )
    if parallel != "none" and not launched_ranks():
        raise ConfigError(
            f"hardware.parallel={parallel} needs torchrun --nproc-per-node=<processes> train.py ...; "
            "hardware.parallel=none trains in one process"
        )
