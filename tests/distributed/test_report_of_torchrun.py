"""What is to be read where processes that torchrun started end: why, once, and a crash in its report."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
from support.distributed import Job
from support.processes import copying_context
from support.runs import errors
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from muse.processes import torchrun
from muse.processes.torchrun import ERROR_FILE, report_exit


@pytest.fixture
def error_files(tmp_path) -> list[Path]:
    """Those of four processes of a machine, where torchrun has them."""
    files = [tmp_path / "attempt_0" / str(rank) / "error.json" for rank in range(4)]
    for file in files:
        file.parent.mkdir(parents=True)
    return files


@pytest.fixture
def be_rank(monkeypatch, error_files):
    def be(rank: int) -> None:
        for name, value in (
            ("TORCHELASTIC_RUN_ID", "test"),
            ("WORLD_SIZE", "4"),
            ("RANK", str(rank)),
            (ERROR_FILE, str(error_files[rank])),
        ):
            monkeypatch.setenv(name, value)

    return be


def report(files: list[Path]) -> str:
    """What torchrun tells of processes that ended with status 1."""
    failures = {rank: ProcessFailure(rank, 100 + rank, 1, str(file)) for rank, file in enumerate(files)}
    return str(ChildFailedError("train.py", failures))


def test_a_sentence_that_all_have_is_printed_by_the_first_one_and_in_the_report_of_torchrun(
    be_rank, error_files, capsys
):
    for rank in (2, 0, 1):
        be_rank(rank)
        report_exit("error: stage=9", once=True)
    assert capsys.readouterr().err == "error: stage=9\n"
    told = report(error_files)
    assert told.count("traceback : error: stage=9\n") == 3
    # The last one has said nothing.
    assert told.count("traceback : To enable traceback") == 1


def test_a_sentence_of_one_rank_is_printed_beside_others_and_keeps_those_of_all_away(be_rank, capsys):
    be_rank(1)
    report_exit("error: rank 1: the disk is full", once=False)
    be_rank(2)
    report_exit("error: rank 2: the disk is full", once=False)
    be_rank(0)
    report_exit("interrupted", once=True, cause=False)
    assert capsys.readouterr().err == "error: rank 1: the disk is full\nerror: rank 2: the disk is full\n"


def test_what_is_no_cause_is_left_to_the_report_of_torchrun(be_rank, error_files, capsys):
    be_rank(0)
    report_exit("error: the ranks do not reach each other", once=False, cause=False)
    be_rank(1)
    report_exit("error: stage=9", once=True)
    assert capsys.readouterr().err == "error: the ranks do not reach each other\nerror: stage=9\n"
    assert not error_files[0].exists()


def test_without_torchrun_everything_is_printed(capsys):
    for _ in range(2):
        report_exit("error: stage=9", once=True)
    assert capsys.readouterr().err == 2 * "error: stage=9\n"


def test_a_full_disk_does_not_keep_the_sentence_back(be_rank, error_files, monkeypatch, capsys):
    def fail(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "no space", str(path))

    monkeypatch.setattr(torchrun, "write_json", fail)
    be_rank(0)
    report_exit("error: the disk is full", once=True)
    assert capsys.readouterr().err == "error: the disk is full\n"
    assert "To enable traceback" in report(error_files)


def say_at_once(file: Path, output: Path, start: multiprocessing.Barrier) -> None:
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "4", "RANK": "0", ERROR_FILE: str(file)}
    with open(output, "a", encoding="utf-8") as sys.stderr:
        start.wait()
        report_exit("error: stage=9", once=True)


def test_processes_that_find_the_same_at_once_print_it_once(tmp_path, error_files):
    context = copying_context()
    start = context.Barrier(len(error_files))
    processes = [
        context.Process(target=say_at_once, args=(file, tmp_path / "err", start)) for file in error_files
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "err").read_text() == "error: stage=9\n"


def run_ranks(place: Path, body: str, torchrun: str = "muse.torchrun") -> tuple[int, str]:
    """Exit status and standard error of a script in two processes of ``python -m <torchrun>``."""
    script = place / "script.py"
    script.write_text(
        f"import os, signal, sys\nfrom muse.processes.torchrun import launched_rank, report_exit\n{body}",
        encoding="utf-8",
    )
    status, _, err = Job(place, [], script, torchrun).finish()
    return status, err


REFUSED = "report_exit('error: stage=9', once=True)\nsys.exit(1)\n"


@pytest.mark.slow
def test_nothing_is_added_to_an_error_that_a_process_has_printed(tmp_path):
    assert run_ranks(tmp_path, REFUSED) == (1, "error: stage=9\n")


@pytest.mark.slow
def test_torchs_own_torchrun_has_the_error_in_its_report_and_on_one_line_of_its_own(tmp_path):
    status, err = run_ranks(tmp_path, REFUSED, "torch.distributed.run")
    assert status != 0
    assert errors(err) == ["error: stage=9"]
    assert "traceback : error: stage=9\n" in err


@pytest.mark.slow
def test_nothing_is_added_to_a_signal_that_the_processes_were_sent(tmp_path):
    # torchrun ends a process that has not got to its end when the other one ends, by a signal of its own.
    told, awaited = "f'there {launched_rank()}'", "f'there {1 - launched_rank()}'"
    both = f"open({told}, 'w')\nwhile not os.path.exists({awaited}): pass\n"
    late = "signal.signal(signal.SIGTERM, lambda *given: sys.exit(128 + signal.SIGTERM))\n"
    status, err = run_ranks(tmp_path, f"{late}{both}sys.exit(128 + signal.SIGTERM)\n")
    assert (status, err) == (128 + signal.SIGTERM, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("crash", "told"),
    [
        ("raise KeyError('a fault of ours')", "KeyError: 'a fault of ours'"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "Signal 9 (SIGKILL) received by PID"),
    ],
)
def test_a_crash_is_reported_as_ever(tmp_path, crash, told):
    """Whatever the process beside it says of having lost it."""
    lost = "report_exit('error: the ranks do not reach each other', once=False, cause=False)\n"
    lost += "signal.pause()\n"
    status, err = run_ranks(tmp_path, f"if launched_rank():\n    {crash}\n{lost}")
    assert status == 1
    assert told in err
    assert "script.py FAILED" in err
    assert "rank      : 1 (local_rank: 1)" in err
