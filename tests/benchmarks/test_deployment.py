"""Each check of a deployment: a server that is well passes it, and one with that fault does not."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
import uvicorn
from support.commands import default_stage
from support.serving import POISON, FakeEngine
from support.trained import make_trained
from support.waiting import wait_until

import muse
from muse.benchmarks import deployment, suite
from muse.benchmarks import deployment_checks as checks
from muse.benchmarks import deployment_ends as ends
from muse.benchmarks.deployment_checks import Failed
from muse.benchmarks.deployment_refusals import (
    body_that_never_comes,
    invalid_cases,
    key_cases,
    other_cases,
    refused,
)
from muse.errors import ConfigError, RunError
from muse.generation import Sampling, continuation
from muse.serving.app import create_app
from muse.serving.served import served
from muse.serving.service import Limits, Service

# Between the steps of an engine that is seen at work, and a time limit that it does not keep.
SLOW, SHORT = 0.01, 0.3
KEPT = 3600.0


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_trained(tmp_path_factory.mktemp("served"), seq_len=64)[0]


@pytest.fixture(scope="module")
def trained(run_folder):
    return muse.load(run_folder)


@pytest.fixture(scope="module")
def model(trained):
    return served(trained, "small")


@contextmanager
def listening(app):
    """The address of an application of ASGI that a thread of this process serves."""
    config = uvicorn.Config(app, port=0, log_config=None, lifespan="off", ws="none", access_log=False)
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started, thread.is_alive)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


@pytest.fixture
def live(model):
    """Builds a target, whose engine and application are those of the fields given."""
    opened = []

    @contextmanager
    def build(around=lambda app: app, seconds=KEPT, keys=(), slots=32, queue=256, **engine):
        fake = FakeEngine(model.tokenizer, slots, queue, **engine)
        fake.start()
        opened.append(fake)
        # Nothing is stored, as the benchmark has it.
        service = Service(fake, model, Limits(slots, queue, seconds, cache=0), keys)
        with (
            listening(around(create_app(service))) as address,
            checks.client_of(address, keys[0] if keys else "") as client,
        ):
            target = checks.Target(client, model.tokenizer, model.vocabulary, model.window, 60)
            yield target, fake

    yield build
    for fake in opened:
        fake.stop()


def changing(start=lambda message: None, body=lambda message: None):
    """An application whose messages are changed on their way out."""

    def around(app):
        async def changed(scope, receive, send):
            async def forward(message):
                (start if message["type"] == "http.response.start" else body)(message)
                await send(message)

            await app(scope, receive, forward)

        return changed

    return around


def with_status(old, new):
    def start(message):
        message["status"] = new if message["status"] == old else message["status"]

    return changing(start)


def without(*names):
    def start(message):
        gone = [name.encode() for name in names]
        message["headers"] = [pair for pair in message["headers"] if pair[0].lower() not in gone]

    return changing(start)


def with_text(old, new):
    """Equally long texts."""
    assert len(old) == len(new)

    def body(message):
        message["body"] = message.get("body", b"").replace(old, new)

    return changing(body=body)


def hidden_disconnects(app):
    """As some middleware has it."""

    async def hidden(scope, receive, send):
        async def forward():
            message = await receive()
            if message["type"] == "http.disconnect":
                await asyncio.Event().wait()
            return message

        async def ignored(message):
            with suppress(OSError):
                await send(message)

        await app(scope, forward, ignored)

    return hidden


def test_a_server_that_is_ready_after_its_test_is_well(live):
    with live() as (target, _):
        assert "3 connections" in checks.ready_after_test(target, 3, 200)
        for refusals, status, told in ((0, 200, "at once"), (3, 503, "503"), (3, None, "None")):
            with pytest.raises(Failed, match=told):
                checks.ready_after_test(target, refusals, status)


@pytest.mark.parametrize("fault", [{"invariant": False}, {"dead": True}, {"around": without("x-muse-bits")}])
def test_a_server_whose_bits_depend_on_others_is_not(live, fault):
    with live(**fault) as (target, _), pytest.raises(Failed):
        checks.ready_after_test(target, 3, 200)


def test_the_first_answer_comes_after_connections_that_are_refused(live):
    ended = threading.Event()
    with live() as (target, _):
        assert checks.first_answer(str(target.client.base_url), ended) == (0, 200)
    threading.Timer(0.2, ended.set).start()
    refusals, status = checks.first_answer(f"http://127.0.0.1:{deployment.free_port()}", ended)
    assert refusals > 0
    assert status is None


def test_a_server_of_another_model_is_found(live, model):
    with live() as (target, _):
        assert checks.same_model(target, model.fingerprint) == model.fingerprint
        with pytest.raises(Failed, match="its fingerprint"):
            checks.same_model(target, "0" * 16)
        with pytest.raises(Failed, match="its window"):
            checks.same_model(dataclasses.replace(target, window=65), model.fingerprint)


def greedy(trained, wrong_at=None):
    def script(request):
        tokens = list(continuation(trained.model, request.ids, request.max_tokens, 64, Sampling(0.0)))
        if wrong_at is not None:
            tokens[wrong_at] = (tokens[wrong_at] + 1) % 300
        return tokens

    return script


def test_greedy_answers_are_those_of_the_model(live, trained):
    with live(script=greedy(trained)) as (target, _):
        assert checks.greedy_as_offline(target, trained, 3).endswith("tokens")


@pytest.mark.parametrize("place", [0, 5])
def test_one_other_token_is_found(live, trained, place):
    with live(script=greedy(trained, place)) as (target, _), pytest.raises(Failed, match=f"token {place} "):
        checks.greedy_as_offline(target, trained, 3)


def test_another_text_of_the_same_tokens_is_found(live, trained):
    def body(message):
        message["body"] = message.get("body", b"").replace(b'"text":"', b'"text":"x')

    def start(message):
        message["headers"] = [pair for pair in message["headers"] if pair[0] != b"content-length"]

    around = changing(start, body)
    with live(around, script=greedy(trained)) as (target, _), pytest.raises(Failed, match="another text"):
        checks.greedy_as_offline(target, trained, 1)


def test_questions_differ_and_fit(live, model):
    with live() as (target, _):
        bodies = checks.questions(target, 32)
    assert len({body["prompts"][0] for body in bodies}) > 20
    assert {body["temperature"] for body in bodies} == {0, 1}
    for body in bodies:
        assert len(model.tokenizer.encode(body["prompts"][0])) + body["max_tokens"] <= 64


def test_answers_in_company_are_those_alone(live):
    with live(pause=SLOW) as (target, _):
        assert checks.same_in_company(target, checks.questions(target, 8)).startswith("16 equal")


def test_an_answer_that_depends_on_the_company_is_found(live):
    there = {}

    def script(request):
        return [20 + len(there["engine"].work)] * request.max_tokens

    with live(pause=SLOW, script=script) as (target, engine):
        there["engine"], bodies = engine, checks.questions(target, 8)
        with pytest.raises(Failed, match="differs in text, tokens"):
            checks.same_in_company(target, bodies)


def test_requests_that_never_meet_prove_nothing(live):
    with live(slots=1) as (target, _), pytest.raises(Failed, match="never decoded together"):
        checks.same_in_company(target, checks.questions(target, 4))


def test_a_bit_that_changed_in_a_restart_is_found(live):
    with live() as (target, _):
        bodies = checks.questions(target, 2)
        before = [checks.ask(target, body) for body in bodies]
        assert checks.same_as_before(target, bodies, before) == "2 equal"
        before[1]["logprobs"][0] += 1e-16 * abs(before[1]["logprobs"][0]) * 4
        with pytest.raises(Failed, match="prompt 1 differs in logprobs"):
            checks.same_as_before(target, bodies, before)


def cases_of(target, status):
    return invalid_cases(target) if status == 400 else other_cases()[status]


@pytest.mark.parametrize("status", [400, 404, 405, 413, 415])
def test_what_must_be_refused_is(live, status):
    with live() as (target, engine):
        count = len(cases_of(target, status))
        assert refused(target, cases_of(target, status)) == f"{count} of {count}"
        assert engine.asked == []


@pytest.mark.parametrize("status", [400, 404, 405, 413, 415])
def test_another_status_is_found(live, status):
    with live(with_status(status, 422)) as (target, _), pytest.raises(Failed, match=f"422, not {status}"):
        refused(target, cases_of(target, status))


@pytest.mark.parametrize(
    ("status", "around"),
    [
        (400, with_text(b"at most", b"whatsoe")),
        (400, with_text(b'"param":"top_p"', b'"param":"top_k"')),
        (400, with_text(b'{"error"', b'{"wrong"')),
        (405, without("allow")),
        (404, with_text(b'"code"', b'"cod_"')),
    ],
)
def test_a_refusal_that_says_too_little_is_found(live, status, around):
    with live(around) as (target, _), pytest.raises(Failed):
        refused(target, cases_of(target, status))


def test_a_case_that_is_answered_is_found(live):
    """As of a server that has no such limit: each case alone would be seen."""
    with live() as (target, _):
        cases = invalid_cases(target)
        assert len(cases) > 45
        well = dataclasses.replace(cases[0], body={"prompts": ["a"], "max_tokens": 1})
        for place in (0, len(cases)):
            with pytest.raises(Failed, match="200, not 400"):
                refused(target, [*cases[:place], well, *cases[place:]])


def test_keys(live):
    with live(keys=(checks.KEY,)) as (target, _):
        assert refused(target, key_cases()) == "12 of 12"
    with live() as (target, _), pytest.raises(Failed, match="not 401"):
        refused(target, key_cases())
    without_challenge = live(without("www-authenticate"), keys=(checks.KEY,))
    with without_challenge as (target, _), pytest.raises(Failed, match="WWW-Authenticate is None"):
        refused(target, key_cases())


def test_a_body_that_never_comes(live):
    with live(seconds=SHORT) as (target, _):
        assert body_that_never_comes(target) == "408"
    with live() as (target, _), pytest.raises(TimeoutError):
        body_that_never_comes(dataclasses.replace(target, patience=0.3))


SMALL = {"slots": 1, "queue": 255, "pause": SLOW}


def test_a_full_queue(live):
    with live(**SMALL, seconds=1) as (target, _):
        assert ends.queue_full(target) == "429, Retry-After 3"
    silent = live(without("retry-after"), **SMALL, seconds=1)
    with silent as (target, _), pytest.raises(Failed, match="Retry-After is missing"):
        ends.queue_full(target)
    with live(slots=1, queue=1000, pause=SLOW, seconds=1) as (target, _), pytest.raises(Failed, match="429"):
        ends.queue_full(target)


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_limit(live, stream):
    with live(**SMALL, seconds=SHORT) as (target, _):
        assert ends.too_slow(target, stream)
    with live(slots=1, queue=255) as (target, _), pytest.raises(Failed):
        ends.too_slow(target, stream)
    around = with_text(b'"code":"time_limit"', b'"code":"other_code"')
    with live(around, **SMALL, seconds=SHORT) as (target, _), pytest.raises(Failed, match="other_code"):
        ends.too_slow(target, stream)


def test_clients_that_leave(live):
    with live(**SMALL) as (target, engine):
        assert ends.left_alone(target, 8) == "8 of 8 noticed, no slot taken"
        assert not engine.work


def test_work_that_goes_on_without_clients_is_found(live):
    with live(hidden_disconnects, pause=0.001) as (target, _), pytest.raises(Failed, match="only 0 of 4"):
        ends.left_alone(target, 4)


def test_a_logit_that_is_no_number(live):
    with live(pause=SLOW) as (target, _):
        bodies = checks.questions(target, 3, greedy=True)
        assert ends.one_fails_alone(target, POISON, bodies) == "500, 3 others answered"
        with pytest.raises(Failed, match="200, not 500"):
            ends.one_fails_alone(target, POISON + 1, bodies)
    around = with_text(b"nonfinite_logits", b"internal__error_")
    with live(around) as (target, _), pytest.raises(Failed, match="internal"):
        ends.one_fails_alone(target, POISON, bodies)


class Process:
    """Of a server that is a thread: what its signals do."""

    def __init__(self, **does):
        self.does = does

    def send_signal(self, number):
        self.does.get(signal.Signals(number).name, lambda: None)()

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def wait(self, limit):
        if "status" not in self.does:
            raise subprocess.TimeoutExpired("server", limit)
        return self.does["status"]


def test_a_process_that_is_stopped(live, monkeypatch):
    monkeypatch.setattr(ends, "SILENCE", 0.2)
    goes = threading.Event()
    goes.set()

    def around(app):
        async def waiting(scope, receive, send):
            await asyncio.to_thread(goes.wait)
            await app(scope, receive, send)

        return waiting

    with live(around) as (target, _):
        body = checks.questions(target, 1)[0]
        before = checks.ask(target, body)
        process = Process(SIGSTOP=goes.clear, SIGCONT=goes.set)
        assert ends.stopped(target, process, body, before).startswith("a timeout")
        with pytest.raises(Failed, match="differs"):
            ends.stopped(target, process, body, {**before, "text": "other"})
        with pytest.raises(Failed, match="by a process that is stopped"):
            ends.stopped(target, Process(), body, before)


def test_a_stream_that_ends_whole_was_not_killed(live):
    with live() as (target, _), pytest.raises(Failed, match="as if it were whole"):
        ends.killed(target, Process(status=-signal.SIGKILL))


def test_an_end_in_the_middle_of_streams(live):
    with live(pause=SLOW) as (target, engine):

        def drain():
            threading.Thread(target=engine.drain, args=(60,), daemon=True).start()

        ending = ends.end_in_streams(target, Process(SIGTERM=drain, status=0), 60, 2)
    assert ends.refused_while_ending(ending) == "503, Retry-After 10"
    assert ends.ended_with_answers(ending).startswith("128 answers ended, 0 told so")


def test_a_server_that_goes_on_is_found(live):
    with live(pause=0.001) as (target, _):
        target = dataclasses.replace(target, patience=2)
        with pytest.raises(Failed, match="still ready"):
            ends.end_in_streams(target, Process(), 0.1, 1)


def stream(count, reason="length", last=()):
    choices = [json.dumps({"choices": [{"index": i, "finish_reason": reason}]}) for i in range(count)]
    return [*choices, *map(json.dumps, last), ends.DONE]


TOLD = {"error": {"code": "draining"}}
WELL = ends.Ending((503, "10", "draining"), [stream(2), stream(1, last=[TOLD])], 2, 0, 1.0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"status": None}, "had not ended"),
        ({"status": 1}, "the status is 1"),
        ({"streams": [stream(2)[:-1]]}, "broke off"),
        ({"streams": [[]]}, "broke off"),
        ({"streams": [stream(1)]}, "1 of 2"),
        ({"streams": [stream(2, None)]}, "0 of 2"),
        ({"streams": [stream(0, last=[TOLD])]}, "no answer was ended"),
        ({"streams": [stream(1, last=[{"error": {"code": "engine_dead"}}])]}, "1 of 2"),
    ],
)
def test_an_end_without_answers_is_found(changes, told):
    assert ends.ended_with_answers(WELL) == "3 answers ended, 1 told so, in 1.0 s"
    with pytest.raises(Failed, match=told):
        ends.ended_with_answers(dataclasses.replace(WELL, **changes))


@pytest.mark.parametrize(
    "refusal", [(200, "10", "draining"), (503, "", "draining"), (503, "10", "x"), (0, "", "no connection")]
)
def test_a_request_that_is_taken_while_it_ends_is_found(refusal):
    with pytest.raises(Failed):
        ends.refused_while_ending(dataclasses.replace(WELL, refused=refusal))


def servers_of(run_folder, trained, folder):
    return deployment.Servers(run_folder, folder, trained)


def test_damaged_weights_have_one_nan_and_are_removed(run_folder, trained, tmp_path):
    with deployment.damaged_weights(servers_of(run_folder, trained, tmp_path), 9) as place:
        damaged = muse.load(place)
    assert list(tmp_path.iterdir()) == []
    assert sum(int(value.isnan().sum()) for value in damaged.model.state_dict().values()) == 1
    with torch.no_grad():
        well, ill = (damaged.model(torch.tensor([tokens])) for tokens in ([1, 2, 3], [1, 9, 3]))
        torch.testing.assert_close(well, trained.model(torch.tensor([[1, 2, 3]])))
    assert ill[:, 1:].isnan().all()


@pytest.mark.parametrize(
    ("error", "passed"),
    [
        (RunError("the server ended with status 1 before it was ready: error: not finite, so"), True),
        (RunError("the server ended with status -11 before it was ready: it said nothing"), False),
        (None, False),
    ],
)
def test_damaged_weights_must_not_be_served(run_folder, trained, tmp_path, monkeypatch, error, passed):
    @contextmanager
    def running(self, *_, **__):
        if error is not None:
            raise error
        yield None, None

    monkeypatch.setattr(deployment.Servers, "running", running)
    scenes = deployment.Scenes()
    scenes.see("damaged", deployment._refuses_to_start, servers_of(run_folder, trained, tmp_path))
    assert scenes.found["damaged"]["passed"] is passed


def test_what_a_server_does_not_live_to_see_has_failed(capsys):
    scenes = deployment.Scenes()
    with scenes.of("model", "greedy"):
        scenes.see("model", lambda: "well")
        raise RunError("it fell over")
    assert scenes.found["model"] == {"seen": "well", "passed": True}
    assert scenes.found["greedy"]["passed"] is False
    assert "it fell over" in capsys.readouterr().out


def reported(bench_config, monkeypatch, found):
    measured = {"checks": found, "versions": {"python": "3"}, "served_on": "CPU"}
    monkeypatch.setattr(suite, "measure_isolated", lambda name, config: measured)
    return suite.run_suite(bench_config(1, name="deployment"), Path("unused"), default_stage)


def test_one_check_that_fails_fails_the_command(bench_config, monkeypatch):
    well = {name: {"seen": "so", "passed": True} for name in deployment.CHECKS}
    results = reported(bench_config, monkeypatch, well)
    assert results.values["all_pass"] is True
    assert results.failures == {}
    assert len(results.criteria) == len(deployment.CHECKS)
    ill = {**well, "queue": {"seen": "status 200", "passed": False}}
    results = reported(bench_config, monkeypatch, ill)
    assert results.values["all_pass"] is False
    assert results.values["deployment_queue_pass"] is False
    assert results.values["deployment_key_pass"] is True
    assert results.failures == {"a full queue": "status 200"}
    del ill["queue"]
    results = reported(bench_config, monkeypatch, ill)
    assert results.failures == {"a full queue": "not reached"}


@pytest.mark.parametrize("package", ["httpx", "fastapi"])
def test_a_missing_package_is_one_sentence(bench_config, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs the package {package}; pip install"):
        suite.check_benchmark(bench_config(1, name="deployment"), ())


@pytest.mark.slow
def test_the_real_server_passes_every_check(bench_config, run_folder, tmp_path):
    config = bench_config(1, name="deployment", checkpoint=str(run_folder))
    config = dataclasses.replace(config, output_root=str(tmp_path))
    measured = deployment.measure_deployment(config, torch.device("cpu"))
    assert list(measured["checks"]) == list(deployment.CHECKS)
    assert {name: found["seen"] for name, found in measured["checks"].items() if not found["passed"]} == {}
    assert [file.name for file in tmp_path.iterdir()] == ["server.log"]
