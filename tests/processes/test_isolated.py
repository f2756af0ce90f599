"""A job in a fresh process; the jobs are here, where that process can import them."""

import logging
import os
import signal
import sys

import pytest

from muse.errors import ConfigError, RunError
from muse.processes.isolated import run_isolated


def change_everything(folder):
    # Here, so that the other jobs do not wait for it.
    import torch

    (folder / "told").write_text(f"{torch.get_num_threads()} {os.getpid()}")
    torch.set_num_threads(torch.get_num_threads() + 1)
    return 0


def refuse(folder):
    raise ConfigError("option=1 is not allowed")


def cannot_go_on(folder):
    raise RunError("the disk is full")


def explain_at_length(folder):
    raise RunError("and then " * 100_000)


def break_down(folder):
    raise KeyError("a fault of ours")


def tell(folder):
    logging.getLogger("muse").info("what the run is about")
    return 0


def die(folder):
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def leave(folder):
    sys.exit(3)


@pytest.mark.slow
def test_what_a_job_logs_is_shown(tmp_path, capfd):
    assert run_isolated(tell, tmp_path) == 0
    assert capfd.readouterr().out == "what the run is about\n"


@pytest.mark.slow
def test_nothing_passes_from_one_job_to_the_next(tmp_path):
    told = []
    for _ in range(2):
        assert run_isolated(change_everything, tmp_path) == 0
        told.append((tmp_path / "told").read_text().split())
    assert told[0][0] == told[1][0]
    assert len({told[0][1], told[1][1], str(os.getpid())}) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "kind", "message"),
    [
        (refuse, ConfigError, "option=1 is not allowed"),
        (cannot_go_on, RunError, "the disk is full"),
        (explain_at_length, RunError, "and then and then"),
        (break_down, RunError, "KeyError: 'a fault of ours'"),
        (die, RunError, "killed by signal 9"),
        (leave, RunError, "ended with status 3"),
    ],
)
def test_a_job_that_fails_says_why_and_leaves_this_process_alone(tmp_path, job, kind, message):
    with pytest.raises(kind, match=message):
        run_isolated(job, tmp_path)
