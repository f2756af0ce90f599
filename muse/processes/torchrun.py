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
SAID = "said"
# Seconds that a step and its checkpoint may take after a signal, from torch 2.13 on; torchrun has 30.
SHUTDOWN_TIMEOUT = 600
# How the lines begin in which torchrun tells of the end of its processes.
_ENDS = ("Received ", "Sending process ", "failed (exitcode: ")


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


def say_last(sentence: str, once: bool, cause: bool = True) -> None:
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
            _leave_for_torchrun(Path(file), sentence)
    with open(Path(file).parents[1] / SAID, "ab") as said:
        # torchrun ends all with the first one that ends, which must have printed by then.
        fcntl.flock(said, fcntl.LOCK_EX)
        if once and os.fstat(said.fileno()).st_size:
            return
        print(sentence, file=sys.stderr, flush=True)
        if cause:
            said.write(b".")
            said.flush()


def _leave_for_torchrun(file: Path, sentence: str) -> None:
    told = {"message": sentence, "extraInfo": {"py_callstack": sentence, "timestamp": str(int(time.time()))}}
    write_json(file, {"message": told, SAID: True})


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
        logger.addFilter(lambda record: not str(record.msg).startswith(_ENDS))
    try:
        run.run(run.parse_args(arguments))
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        failures = error.failures.values()
        said = [failure.exitcode for failure in failures if failure.error_file_data.get(SAID)]
        ended = {failure.exitcode for failure in failures}
        if not said and not ended <= {128 + signal.SIGINT, 128 + signal.SIGTERM}:
            raise
        sys.exit(max(said or ended))


if __name__ == "__main__":
    main()
