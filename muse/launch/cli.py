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

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from muse.config import build_config
from muse.errors import ConfigError, RunError
from muse.files import disk_full_as_run_error
from muse.launch.composition import one_line, prepare_hydra
from muse.launch.help import help_text
from muse.launch.sweep import check_plugins, digest, finish_sweep, record, record_failure, record_interruption
from muse.processes import signals, slurm
from muse.processes.torchrun import launched_rank, launched_ranks, report_exit
from muse.report.sweep import UNFINISHED
from muse.runs.options import stage_and_model

_statuses: list[int] = []
# How errors of gloo and of a collective's wait begin, which have no class of their own, where ranks do not
# find each other, or no longer. A failed check of gloo's begins with [enforce fail at and is none of them.
_DISCONNECTED = re.compile(
    r"\[\S*/gloo/\S+:\d+\]|Gloo connectFullMesh failed|Operation timed out!|Wait timeout"
)
# Flags with which Hydra only shows something.
INFORMATION_FLAGS = frozenset(("--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i"))

# Here and not in ``prepare``, which a launcher's workers never call. The command's own value is what counts
# there, too: Hydra hands the cache on.
OmegaConf.register_new_resolver("muse.pid", os.getpid, use_cache=True, replace=True)
OmegaConf.register_new_resolver("muse.digest", digest, replace=True)
# Its text is a template of Python's, in which Hydra puts nothing.
OmegaConf.register_new_resolver(
    "muse.help",
    lambda *topics, _root_: help_text(_root_, list(map(str, topics))).replace("$", "$$"),
    replace=True,
)
OmegaConf.register_new_resolver("muse.kind", stage_and_model, replace=True)


def prepare() -> None:
    """Make ready for Hydra: signals, what it is told beside the command line, and how it composes."""
    signals.install_command_handlers()
    # Those of a command that this process has run before are not this one's.
    _statuses.clear()
    # Errors come out of Hydra as they are, so that they can be told in one sentence.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        sys.argv[1:] = reordered(sys.argv[1:])
        if launched_ranks() > 1 and {"-m", "--multirun"} & set(sys.argv):
            raise ConfigError("a sweep (-m) starts a process for each cell; torchrun goes with a single run")
        check_plugins(sys.argv)
    except ConfigError as error:
        _print_error(error)
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
    prepare_hydra()


def reordered(arguments: list[str]) -> list[str]:
    """Arguments in an order that Hydra reads: flags may stand between options, and topics after ``--help``.

    Raises:
        ConfigError: a flag that Hydra does not have, or a topic that is no name.
    """
    parser = get_args_parser()
    parsed, others = parser.parse_known_args(arguments)
    for flag in others:
        if flag.startswith("-"):
            raise ConfigError(f"{flag} is not known; options have no dashes, as in train.steps=100")
    options = [*parsed.overrides, *others]
    flags = list(arguments)
    for option in options:
        flags.remove(option)
    topics = [option for option in options if parsed.help and re.fullmatch(r"[\w./]+", option)]
    if topics:
        options = [option for option in options if option not in topics]
        options.append("hydra.help.template=${muse.help:" + ",".join(topics) + "}")
    return [*flags, *options]


def start(main: Callable[[], Any]) -> None:
    """Run a command of Hydra and exit with the status of its worst job."""
    prepare()
    try:
        with disk_full_as_run_error("the folder of the run"):
            main()
    except (ConfigError, RunError) as error:
        _print_error(error)
        sys.exit(1)
    except (HydraException, OmegaConfBaseException) as error:
        # What a resolver raises comes inside of one of OmegaConf's own errors.
        _print_error(_config_error_in(error) or ConfigError(one_line(error)))
        sys.exit(1)
    except SystemExit as ended:
        if isinstance(ended.__cause__, ConfigError):
            _print_error(ended.__cause__)
        received = signals.received()
        if received is not None:
            # Of the status with which a signal ends the command Ray makes 1.
            sys.exit(128 + received)
        raise
    except BrokenPipeError:
        if not INFORMATION_FLAGS.intersection(sys.argv):
            raise
        # Whoever reads what is shown has read enough, as in --help | head.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finish()


def _config_error_in(error: BaseException | None) -> ConfigError | None:
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


def run_job(composed: DictConfig, job: Callable[[Any, Path], int]) -> None:
    """Run one job in Hydra's folder for it and keep its exit status for ``finish``.

    A job that fails says why in one sentence; in a multirun the next one still runs, and all are put into its
    summary. Ctrl-C and SIGTERM end all.
    """
    if not signals.is_command():
        signals.install_worker_handlers()
        slurm.install_slurm_handler()
    if signals.received() is not None:
        return
    run = Path(HydraConfig.get().runtime.output_dir)
    try:
        with signals.job_running(), disk_full_as_run_error(run):
            record({}, UNFINISHED)
            status = job(build_config(composed), run)
    except (ConfigError, RunError) as error:
        record_failure(error)
        _print_error(error)
        status = 1
    except RuntimeError as error:
        if launched_ranks() < 2 or not _is_disconnection(error):
            record_failure(error)
            raise
        reason = str(error).splitlines()[0]
        lost = RunError(f"the ranks do not reach each other ({reason}); if one of them ended, it said why")
        _print_error(lost, cause=False)
        status = 1
    except KeyboardInterrupt:
        _print_interrupted()
        status = 130
    except SystemExit:
        received = signals.received()
        if received is None:
            raise
        _print_interrupted()
        status = 128 + received
    except Exception as error:
        record_failure(error)
        raise
    if status > 128:
        record_interruption()
        try:
            slurm.queue_again()
        except RunError as error:
            record_failure(error)
            _print_error(error)
    signals.exit_if_orphaned()
    _statuses.append(status)
    # A worker returns instead: it would be ended, and with it the others, which may not have saved yet.
    received = signals.received()
    if signals.is_command() and (status > 128 or received is not None):
        sys.exit(status if received is None else 128 + received)


def _is_disconnection(error: RuntimeError) -> bool:
    """Whether an error is what torch.distributed, gloo or NCCL raise when ranks do not reach each other."""
    # Not above: a process that only waits for another one does not need torch.
    from torch.distributed import DistError

    return isinstance(error, DistError) or _DISCONNECTED.match(str(error)) is not None


def _print_error(error: ConfigError | RunError, cause: bool = True) -> None:
    """Print an error; one that every rank should raise is printed by the one that finds it first.

    torchrun ends all ranks with the first one that fails, whichever that is.
    """
    alone = f"rank {launched_rank()}: " if launched_rank() and not error.of_all_ranks else ""
    report_exit(f"error: {alone}{error}", once=error.of_all_ranks, cause=cause)


def _print_interrupted() -> None:
    # Not where torchrun has interrupted this rank because another one ended, and said why.
    if launched_rank() == 0:
        report_exit("interrupted", once=True, cause=False)


def finish() -> None:
    """Show the summary of a multirun, and exit with the status of the worst job."""
    try:
        with disk_full_as_run_error(Path()):
            status = finish_sweep()
    except RunError as error:
        _print_error(error)
        status = 1
    sys.exit(max([*_statuses, status]))
