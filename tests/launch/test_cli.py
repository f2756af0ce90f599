"""What a job of train.py or bench.py says when it fails on one of several ranks."""

from __future__ import annotations

import signal
from datetime import timedelta
from types import SimpleNamespace

import pytest
from torch.distributed import DistBackendError, TCPStore

from muse.launch import cli


@pytest.fixture
def run_failing(tmp_path, monkeypatch):
    """Runs a job that raises an error on the first of two ranks."""
    runtime = SimpleNamespace(output_dir=str(tmp_path))
    monkeypatch.setattr(cli.HydraConfig, "get", lambda: SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(cli.signals, "is_command", lambda: True)
    monkeypatch.setattr(cli, "build_config", lambda composed: composed)
    monkeypatch.setattr(cli, "launched_ranks", lambda: 2)
    monkeypatch.setattr(cli, "_statuses", [])
    for name in ("record", "record_failure"):
        monkeypatch.setattr(cli, name, lambda *_: None)

    def run(error):
        def job(config, run):
            raise error

        cli.run_job(None, job)
        return cli._statuses

    return run


def store_without_server():
    try:
        TCPStore("127.0.0.1", 1, is_master=False, timeout=timedelta(milliseconds=100))
    except RuntimeError as error:
        return error
    raise AssertionError("there is a server")


PAIR = "/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"[{PAIR}:547] Connection closed by peer [127.0.0.1]:39741"),
        RuntimeError(f"[{PAIR}:525] Read error [127.0.0.1]:39741: Connection reset by peer"),
        RuntimeError(
            "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms"
        ),
        RuntimeError(f"Gloo connectFullMesh failed with [{PAIR}:149] no error"),
        DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited"),
        store_without_server(),
    ],
    ids=lambda error: str(error)[:60],
)
def test_a_lost_rank_is_one_sentence(run_failing, capsys, error):
    assert run_failing(error) == [1]
    told = capsys.readouterr().err
    assert told.startswith("error: the ranks do not reach each other (")
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    "message",
    [
        "cannot restore the state of the store",
        "blocks.0.flow: cannot connect the peer planes",
        "the solver timed out",
        "expected a socket, found a gloo device",
        # A collective of different sizes on two ranks: both are there, and the program is wrong.
        f"[enforce fail at {PAIR}:446] op.preamble.length <= op.nbytes. 32 vs 16",
    ],
)
def test_another_error_on_one_of_several_ranks_keeps_its_trace(run_failing, capsys, message):
    with pytest.raises(RuntimeError) as caught:
        run_failing(RuntimeError(message))
    assert str(caught.value) == message
    assert "reach each other" not in capsys.readouterr().err


def test_after_a_signal_the_status_tells_it_whatever_a_launcher_makes_of_it(monkeypatch):
    def launch():
        monkeypatch.setattr(cli.signals, "_received", signal.SIGTERM)
        raise SystemExit(1)

    monkeypatch.setattr(cli, "prepare", lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.start(launch)
    assert ended.value.code == 128 + signal.SIGTERM
