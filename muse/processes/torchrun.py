"""What torchrun and the ranks, the processes that it starts, tell each other.

``python -m muse.torchrun`` is torchrun without its own report where a process has said why it ends.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from muse.errors import ConfigError
from muse.files import write_json

# Names the file in which torchrun looks for the error of a process; those of a machine have it in folders of
# their own in the same folder.
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
# Marks, in that file, an error that its process has printed.
REPORTED = "reported"
# Seconds that a step and its checkpoint may take after a signal, from torch 2.13 on; torchrun has 30.
SHUTDOWN_TIMEOUT = 600
# How the lines begin in which torchrun tells of the end of its processes.
_END_MESSAGES = ("Received ", "Sending process ", "failed (exitcode: ")


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
            f"hardware.parallel={parallel} needs python -m muse.torchrun --nproc-per-node=<processes> "
            "train.py ...; hardware.parallel=none trains in one process"
        )


def report_exit(sentence: str, once: bool, cause: bool = True) -> None:
    """Print on standard error what this process ends with.

    Args:
        sentence: to be printed.
        once: whether not to print it where a process that torchrun started beside this one, on the same
            machine, has said why it ends. No such process ends before the sentence is printed.
        cause: whether the sentence says why, so that torchrun need not tell that a process has failed.
    """
    file = os.environ.get(ERROR_FILE) if launched_ranks() else None
    if file is None:
        print(sentence, file=sys.stderr, flush=True)
        return
    if cause:
        # Where the disk is full, torchrun reports what it knows.
        with suppress(OSError):
            _write_error_file(Path(file), sentence)
    with open(Path(file).parents[1] / REPORTED, "ab") as reported:
        # torchrun ends all with the first one that ends, which must have printed by then.
        fcntl.flock(reported, fcntl.LOCK_EX)
        if once and os.fstat(reported.fileno()).st_size:
            return
        print(sentence, file=sys.stderr, flush=True)
        if cause:
            reported.write(b".")
            reported.flush()


def _write_error_file(file: Path, sentence: str) -> None:
    error = {"message": sentence, "extraInfo": {"py_callstack": sentence, "timestamp": str(int(time.time()))}}
    write_json(file, {"message": error, REPORTED: True})


def main(arguments: Sequence[str] | None = None) -> None:
    """Be torchrun, but leave out its report of an error that a process has printed, or of a signal.

    A crash is reported as ever. After a signal the processes have ten minutes to save, from torch 2.13 on.

    Args:
        arguments: torchrun's own; those of the command line by default.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_TIMEOUT))
    for name in ("agent.server.api", "multiprocessing.api"):
        logger = logging.getLogger(f"torch.distributed.elastic.{name}")
        logger.addFilter(lambda record: not str(record.msg).startswith(_END_MESSAGES))
    try:
        run.run(run.parse_args(arguments))
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        failures = error.failures.values()
        reported = [failure.exitcode for failure in failures if failure.error_file_data.get(REPORTED)]
        ended = {failure.exitcode for failure in failures}
        if not reported and not ended <= {128 + signal.SIGINT, 128 + signal.SIGTERM}:
            raise
        sys.exit(max(reported or ended))


if __name__ == "__main__":
    main()
