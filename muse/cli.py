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
from muse.files import full_disk_told
from muse.report.sweep import UNFINISHED
from muse.sweep import check_plugins, digest, finish_sweep, record, record_failure, record_interruption
from muse.torchrun import launched_rank, launched_ranks, say_last

_statuses: list[int] = []
# How errors of gloo and of a collective's wait begin, which have no class of their own, where ranks do not
# find each other, or no longer. A failed check of gloo's begins with [enforce fail at and is none of them.
_LOST = re.compile(r"\[\S*/gloo/\S+:\d+\]|Gloo connectFullMesh failed|Operation timed out!|Wait timeout")

# Here and not in ``prepare``, which a launcher's workers never call. The command's own value is what counts
# there, too: Hydra hands the cache on.
OmegaConf.register_new_resolver("muse.pid", os.getpid, use_cache=True, replace=True)
OmegaConf.register_new_resolver("muse.digest", digest, replace=True)


def prepare() -> None:
    """Make ``stage=1`` work on the command line, and the schemas known to Hydra."""
    stop.take_signals_of_command()
    sys.argv[1:] = quote_stage(sys.argv[1:])
    try:
        if launched_ranks() > 1 and {"-m", "--multirun"} & set(sys.argv):
            raise ConfigError("a sweep (-m) starts a process for each cell; torchrun goes with a single run")
        check_plugins(sys.argv)
    except ConfigError as error:
        _say(error)
        sys.exit(1)
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
    try:
        with stop.working(), full_disk_told(run):
            record({}, UNFINISHED)
            status = job(build_config(composed), run)
    except (ConfigError, RunError) as error:
        record_failure(error)
        _say(error)
        status = 1
    except RuntimeError as error:
        if launched_ranks() < 2 or not _of_lost_ranks(error):
            record_failure(error)
            raise
        reason = str(error).splitlines()[0]
        lost = RunError(f"the ranks do not reach each other ({reason}); if one of them ended, it said why")
        _say(lost, cause=False)
        status = 1
    except KeyboardInterrupt:
        _say_interrupted()
        status = 130
    except SystemExit:
        asked = stop.asked()
        if asked is None:  # Slurm's time is over, and submitit has queued the cell again.
            raise
        _say_interrupted()
        status = 128 + asked
    except Exception as error:
        record_failure(error)
        raise
    if status > 128:
        record_interruption()
    stop.leave_orphaned()
    _statuses.append(status)
    # A worker returns instead: it would be ended, and with it the others, which may not have saved yet.
    asked = stop.asked()
    if stop.is_command() and (status > 128 or asked is not None):
        sys.exit(status if asked is None else 128 + asked)


def _of_lost_ranks(error: RuntimeError) -> bool:
    """Whether an error is what torch.distributed, gloo or NCCL raise when ranks do not reach each other."""
    # Not above: a process that only waits for another one does not need torch.
    from torch.distributed import DistError

    return isinstance(error, DistError) or _LOST.match(str(error)) is not None


def _say(error: ConfigError | RunError, cause: bool = True) -> None:
    """Print an error; one that every rank should raise is printed by the one that finds it first.

    torchrun ends all ranks with the first one that fails, whichever that is.
    """
    alone = f"rank {launched_rank()}: " if launched_rank() and not error.everywhere else ""
    say_last(f"error: {alone}{error}", once=error.everywhere, cause=cause)


def _say_interrupted() -> None:
    # Not where torchrun has interrupted this rank because another one ended, and said why.
    if launched_rank() == 0:
        say_last("interrupted", once=True, cause=False)


def finish() -> None:
    """Show the summary of a multirun, and exit with the status of the worst job."""
    try:
        with full_disk_told(Path()):
            status = finish_sweep()
    except RunError as error:
        _say(error)
        status = 1
    sys.exit(max([*_statuses, status]))
