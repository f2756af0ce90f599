"""What train.py and bench.py share: preparing Hydra, and turning errors into one sentence."""

from __future__ import annotations

import atexit
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from muse.config import build_config, quote_stage, register_schemas
from muse.distributed import launched_rank, launched_ranks
from muse.errors import ConfigError, RunError

_statuses: list[int] = []
# What gloo and NCCL say when the other end of a connection is gone.
_LOST = re.compile("gloo|nccl|connection|peer|store", re.IGNORECASE)


def prepare() -> None:
    """Make ``stage=1`` work on the command line, and the schemas and resolvers known to Hydra."""
    sys.argv[1:] = quote_stage(sys.argv[1:])
    if launched_ranks() > 1 and {"-m", "--multirun"} & set(sys.argv):
        sys.exit("error: a sweep (-m) starts a process for each cell; torchrun goes with a single run")
    if launched_rank() > 0:
        # The folder of the run is the first rank's; what Hydra writes here is of no use.
        folder = tempfile.TemporaryDirectory()
        atexit.register(folder.cleanup)
        sys.argv += [
            f"hydra.run.dir={folder.name}",
            "hydra.output_subdir=null",
            "hydra/job_logging=disabled",
        ]
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
        # The first rank says it for all; were another one to fail before it does, torchrun would end it.
        if launched_rank() == 0 or not error.everywhere:
            print(f"error: {_which_rank()}{error}", file=sys.stderr)
            _statuses.append(1)
        else:
            _statuses.append(0)
    except RuntimeError as error:
        if not dist.is_initialized() or not _LOST.search(str(error)):
            raise
        print(f"error: {_which_rank()}another rank ended, which said why", file=sys.stderr)
        _statuses.append(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    if _statuses[-1] > 128:
        sys.exit(_statuses[-1])


def _which_rank() -> str:
    return f"rank {launched_rank()}: " if launched_rank() else ""


def finish() -> None:
    """Exit with the status of the worst job."""
    sys.exit(max(_statuses, default=0))
