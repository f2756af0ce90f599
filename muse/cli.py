"""What train.py and bench.py share: preparing Hydra, and turning errors into one sentence."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from muse.config import build_config, quote_stage, register_schemas
from muse.errors import ConfigError, RunError

_statuses: list[int] = []


def prepare() -> None:
    """Make ``stage=1`` work on the command line, and the schemas and resolvers known to Hydra."""
    sys.argv[1:] = quote_stage(sys.argv[1:])
    OmegaConf.register_new_resolver("muse.pid", os.getpid, replace=True)
    register_schemas()


def run_job(
    composed: DictConfig,
    job: Callable[[Any, Path], int],
    on_error: Callable[[Exception], None] = lambda error: None,
) -> None:
    """Run one job in Hydra's folder for it and keep its exit status for ``finish``.

    A job that fails says why in one sentence, after ``on_error``; in a multirun the next one still runs.
    Ctrl-C and SIGTERM end all.
    """
    run = Path(HydraConfig.get().runtime.output_dir)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        _statuses.append(job(build_config(composed), run))
    except (ConfigError, RunError) as error:
        on_error(error)
        print(f"error: {error}", file=sys.stderr)
        _statuses.append(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    if _statuses[-1] > 128:
        sys.exit(_statuses[-1])


def finish() -> None:
    """Exit with the status of the worst job."""
    sys.exit(max(_statuses, default=0))
