"""What train.py and bench.py share: preparing Hydra, and turning errors into one sentence."""

from __future__ import annotations

import atexit
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from muse import stop
from muse.config import build_config, quote_stage, register_schemas
from muse.errors import ConfigError, RunError
from muse.report.sweep import UNFINISHED
from muse.sweep import check_plugins, digest, finish_sweep, record, record_failure
from muse.torchrun import launched_rank, launched_ranks

_statuses: list[int] = []
# What gloo and NCCL say when the other end of a connection is gone.
_LOST = re.compile("gloo|nccl|connection|peer|store", re.IGNORECASE)

# Here and not in ``prepare``, which a launcher's workers never call. The command's own value is what counts
# there, too: Hydra hands the cache on.
OmegaConf.register_new_resolver("muse.pid", os.getpid, use_cache=True, replace=True)
OmegaConf.register_new_resolver("muse.digest", digest, replace=True)


def prepare() -> None:
    """Make ``stage=1`` work on the command line, and the schemas known to Hydra."""
    stop.take_signals_of_command()
    sys.argv[1:] = quote_stage(sys.argv[1:])
    if launched_ranks() > 1 and {"-m", "--multirun"} & set(sys.argv):
        if launched_rank() > 0:
            sys.exit(0)
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
    register_schemas()
    try:
        check_plugins(sys.argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def run_job(composed: DictConfig, job: Callable[[Any, Path], int]) -> None:
    """Run one job in Hydra's folder for it and keep its exit status for ``finish``.

    A job that fails says why in one sentence; in a multirun the next one still runs, and all are put into its
    summary. Ctrl-C and SIGTERM end all.
    """
    if not stop.is_command():
        stop.take_signals_of_worker()
    if stop.asked() is not None:
        return
    run = Path(HydraConfig.get().runtime.output_dir)
    record({}, UNFINISHED)
    try:
        with stop.working():
            status = job(build_config(composed), run)
    except (ConfigError, RunError) as error:
        record_failure(error)
        # The first rank says it for all; were another one to fail before it does, torchrun would end it.
        status = int(launched_rank() == 0 or not error.everywhere)
        if status:
            print(f"error: {_which_rank()}{error}", file=sys.stderr)
    except RuntimeError as error:
        if launched_ranks() < 2 or not _LOST.search(str(error)):
            record_failure(error)
            raise
        print(f"error: {_which_rank()}another rank ended, which said why", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except SystemExit:
        asked = stop.asked()
        if asked is None:  # Slurm's time is over, and submitit has queued the cell again.
            raise
        print("interrupted", file=sys.stderr)
        status = 128 + asked
    except Exception as error:
        record_failure(error)
        raise
    if status > 128:
        record({}, "interrupted")
    stop.leave_orphaned()
    _statuses.append(status)
    # A worker returns instead: it would be ended, and with it the others, which may not have saved yet.
    asked = stop.asked()
    if stop.is_command() and (status > 128 or asked is not None):
        sys.exit(status if asked is None else 128 + asked)


def _which_rank() -> str:
    return f"rank {launched_rank()}: " if launched_rank() else ""


def finish() -> None:
    """Show the summary of a multirun, and exit with the status of the worst job."""
    sys.exit(max([*_statuses, finish_sweep()]))
