"""The command: what it refuses, and as a process with connections of its own."""

from __future__ import annotations

import json
import signal
import socket
import sys

import httpx
import pytest
from support.commands import run_here
from support.serving import server_process
from support.waiting import PATIENCE, wait_until

BODY = {"prompt": "Line", "max_tokens": 30, "temperature": 0}
# Seconds between the tokens of an engine: some that are seen, and a first one alone.
SLOW, STOPS = {"pause": 0.05}, {"pause": 1e6}


@pytest.fixture
def command(capsys, monkeypatch):
    """Status, standard output and standard error of the command."""
    monkeypatch.delenv("MUSE_API_KEY", raising=False)

    def serve(*arguments):
        status = run_here("muse.serve", list(map(str, arguments)))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return serve


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--host", "0.0.0.0"], "for which MUSE_API_KEY must hold a key"),
        (["--host", "::"], "for which MUSE_API_KEY must hold a key"),
        (["--port", "70000"], "--port 70000 is not allowed; it must be between 0 and 65535"),
        (["--port", "web"], "argument --port: invalid int value"),
        (["--slots", "0"], "--slots 0 is not allowed"),
        (["--time-limit", "nan"], "--time-limit nan is not allowed"),
        (["--prt", "80"], "unrecognized arguments: --prt 80"),
        (["--which", "first"], "invalid choice"),
    ],
)
def test_bad_arguments_are_one_sentence(run_folder, command, arguments, told):
    status, out, err = command(run_folder, *arguments)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: ")
    assert told in err


def test_a_model_that_is_none_and_a_port_that_is_taken_are_one_sentence(run_folder, command, tmp_path):
    status, _, err = command(tmp_path, "--port", 0)
    assert (status, err.count("\n")) == (1, 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, _, err = command(run_folder, "--port", port)
    assert (status, err.count("\n")) == (1, 1)
    assert f"--port {port} cannot be had: Address already in use" in err


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_missing_package_is_one_sentence(run_folder, command, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    status, _, err = command(run_folder, "--port", 0)
    assert (status, err) == (
        1,
        f'error: muse.serve needs the package {package}; pip install -e ".[serve]" installs it\n',
    )


def events(response):
    """The events of a stream as they come."""
    for line in response.iter_lines():
        if line:
            yield line.removeprefix("data: ")


@pytest.mark.slow
def test_a_signal_lets_streams_end_with_an_answer(run_folder, tmp_path):
    with server_process(tmp_path, run_folder, "--drain", 600, engine=SLOW) as server:
        assert server.copies.out()[0].count("\n") == 1
        with httpx.Client(base_url=server.address, timeout=PATIENCE) as client:
            with client.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
                told = events(response)
                first = json.loads(next(told))
                server.signal(signal.SIGTERM)
                wait_until(lambda: client.get("/ready").status_code == 503)
                refused = client.post("/v1/completions", json=BODY)
                *_, last, end = told
            assert refused.status_code == 503
            assert first["choices"][0]["finish_reason"] is None
            assert json.loads(last)["choices"][0]["finish_reason"] == "length"
            assert end == "[DONE]"
        assert server.wait() == 0
        assert server.copies.err()[0] == ""


@pytest.mark.slow
@pytest.mark.parametrize("engine", [STOPS, {**STOPS, "hangs": True}], ids=["slow", "hangs"])
def test_no_work_keeps_a_server_from_ending(run_folder, tmp_path, engine):
    """Neither what does not end within the limit, nor an engine that never answers, nor who never reads."""
    with server_process(tmp_path, run_folder, "--drain", 0.2, "--time-limit", 9999, engine=engine) as server:
        with httpx.Client(base_url=server.address, timeout=PATIENCE) as client:
            with client.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
                told = events(response)
                next(told)
                server.signal(signal.SIGINT)
                *_, last, end = told
            assert json.loads(last)["error"]["code"] == "draining"
            assert end == "[DONE]"
        assert server.wait() == 0


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(run_folder, tmp_path):
    options = ("--drain", 9999, "--time-limit", 9999)
    with (
        server_process(tmp_path, run_folder, *options, engine=STOPS) as server,
        httpx.Client(base_url=server.address, timeout=PATIENCE) as client,
        client.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response,
    ):
        next(events(response))
        server.signal(signal.SIGINT)
        wait_until(lambda: client.get("/ready").status_code == 503)
        server.signal(signal.SIGINT)
        assert server.wait() == 130


@pytest.mark.slow
def test_connections_that_break_or_bring_too_much(run_folder, tmp_path):
    with (
        server_process(tmp_path, run_folder, "--time-limit", 9999, engine=STOPS) as server,
        httpx.Client(base_url=server.address, timeout=PATIENCE) as client,
    ):

        def metric(name):
            lines = client.get("/metrics").text.splitlines()
            return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])

        with client.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
            next(events(response))
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=BODY, timeout=0.3)
        wait_until(lambda: metric("muse_aborted_total") == 2)
        wait_until(lambda: metric("muse_running") == 0)
        # Its sender hears why, although it had not sent all.
        assert client.post("/infer", json={"prompts": ["x" * 4 * 2**20]}).status_code == 413
        assert client.get("/ready").status_code == 200
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


@pytest.mark.slow
def test_a_key_lets_other_hosts_in(run_folder, tmp_path):
    options = {"engine": {}, "environment": {"MUSE_API_KEY": "one, two"}}
    with server_process(tmp_path, run_folder, "--host", "0.0.0.0", "--docs", **options) as server:
        address = server.address.replace("0.0.0.0", "127.0.0.1")
        for key, status in (("one", 200), ("two", 200), ("one, two", 401), ("x", 401)):
            response = httpx.get(f"{address}/v1/models", headers={"authorization": f"Bearer {key}"})
            assert response.status_code == status
        assert httpx.get(f"{address}/docs", headers={"authorization": "Bearer one"}).status_code == 200
