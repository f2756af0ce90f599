"""Every row of the table of answers: what is refused, how, and that the field is named."""

from __future__ import annotations

import asyncio
import json

import pytest
from support.serving import POISON, RETRY_AFTER, Client, events_of, until
from support.waiting import PATIENCE

from muse.serving.schema import CompletionBody, InferBody
from muse.serving.service import Exchange, Limits

INFER, COMPLETIONS = "/infer", "/v1/completions"
FORM = {"message", "type", "param", "code"}


def error_of(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (error,) = json.loads(response.content, parse_constant=pytest.fail).values()
    assert set(error) == FORM
    return error


# A field, a value that it must not have, and what the message says of those that it may.
WRONG = [
    ("prompts", [], "1 to 32 texts"),
    ("prompts", ["Line"] * 33, "1 to 32 texts"),
    ("prompts", "Line", "1 to 32 texts"),
    ("prompts", [""], "at least a word"),
    ("prompts", ["\ud800"], "half a surrogate pair"),
    ("prompts", ["Line " * 60], "window is 64"),
    ("prompts", ["x" * 200_000], "window is 64"),
    ("max_tokens", 0, "at least 1"),
    ("max_tokens", True, "a whole number"),
    ("max_tokens", "5", "a whole number"),
    ("temperature", -0.1, "from 0"),
    ("temperature", 10**400, "from 0"),
    ("top_k", 1.5, "a whole number"),
    ("top_p", 0, "above 0"),
    ("top_p", 1.01, "at most 1"),
    ("seed", -1, "from 0 to 2^53"),
    ("stop", "", "1 to 64 characters"),
    ("stop", "x" * 65, "1 to 64 characters"),
    ("stop", ["a", "b", "c", "d", "e"], "at most 4"),
    ("stop", ["a", 5], "at most 4"),
    ("logprobs", 21, "from 0 to 20"),
    ("stream", True, "no field 'stream'"),
]
WRONG_COMPLETION = [
    ("prompt", "\udfff", "half a surrogate pair"),
    ("user", "\udfff", "half a surrogate pair"),
    ("prompt", [[]], "a text, token ids"),
    ("prompt", [], "a text, token ids"),
    ("prompt", [[5], []], "a text, token ids"),
    ("prompt", [5, "a"], "a text, token ids"),
    ("prompt", [5, 300], "from 0 to 299"),
    ("prompt", [5, -1], "a text, token ids"),
    ("prompt", [5.5], "a text, token ids"),
    ("prompt", [5] * 65, "window is 64"),
    ("n", 9, "from 1 to 8"),
    ("n", 0, "from 1 to 8"),
    ("best_of", 3, "equal to n=1"),
    ("echo", 1, "true or false"),
    ("suffix", "end", "null"),
    ("frequency_penalty", 0.5, "0, as"),
    ("logit_bias", {"5": 1}, "null"),
    ("stream_options", {"include_usage": True}, "stream=true"),
    ("stream_options", {"include_usages": True}, "include_usage"),
    ("stop", "x" * 65, "1 to 64 characters"),
    ("max_tokens", -1, "a whole number"),
]


@pytest.mark.parametrize(
    ("path", "field", "value", "told"),
    [(INFER, *case) for case in WRONG] + [(COMPLETIONS, *case) for case in WRONG_COMPLETION],
    ids=lambda value: str(value)[:20],
)
def test_a_value_that_is_not_allowed_names_its_field_and_those_that_are(
    server, wait, path, field, value, told
):
    there = server()
    needed = {"prompts": ["Line"]} if path == INFER else {"prompt": "Line"}
    body = json.dumps({**needed, field: value})
    error = error_of(wait(there.post_raw(path, body)), 400)
    assert told in error["message"]
    assert error["param"].partition("[")[0] == field
    assert field in error["message"]
    assert len(error["message"]) < 300
    assert there.engine.asked == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"prompts": ["a"], "temperature": NaN}',
        b'{"prompts": ["a"], "temperature": -Infinity}',
        b'{"prompts": ["\xff"]}',
        b"[" * 100_000,
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b'["prompts"]',
        b"null",
    ],
    ids=lambda body: repr(body[:30]),
)
def test_what_is_no_json_is_said(server, wait, body):
    error = error_of(wait(server().post_raw(INFER, body)), 400)
    assert error["code"] == "invalid_json"


def test_a_number_beyond_all_bounds_is_one_that_is_not_allowed(server, wait):
    error = error_of(wait(server().post_raw(INFER, b'{"prompts": ["a"], "temperature": 1e999}')), 400)
    assert error["param"] == "temperature"


@pytest.mark.parametrize(
    ("body", "unknown", "near"),
    [
        ({"prompts": ["a"], "max_token": 5}, "max_token", "max_tokens"),
        ({"promts": ["a"]}, "promts", "prompts"),
        ({"prompts": ["a"], "zzz": 5}, "zzz", "max_tokens"),
    ],
)
def test_an_unknown_field_is_named_with_the_nearest(server, wait, body, unknown, near):
    error = error_of(wait(server().post(INFER, body)), 400)
    assert error["param"] == unknown
    assert repr(unknown) in error["message"]
    assert near in error["message"]


@pytest.mark.parametrize("kind", [InferBody, CompletionBody])
def test_each_field_says_what_it_may_be(kind):
    assert all(field.description for field in kind.model_fields.values())


def test_a_refusal_never_repeats_a_prompt(server, wait):
    there, secret = server(), "a secret of somebody"
    for body in ({"prompt": secret, "n": 9}, {"prompt": {"a": secret}}, {"prompt": [secret, 5]}):
        assert secret not in wait(there.post(COMPLETIONS, body)).text


def test_answers_that_can_never_be_taken_at_once_are_refused(server, wait):
    there = server(slots=2, queue=1)
    error = error_of(wait(there.post(COMPLETIONS, {"prompt": "Line", "n": 4})), 400)
    assert "which is 3" in error["message"]


def test_keys_open_all_but_health(server, wait):
    there = server(keys=("one", "two"))
    for headers in (
        {},
        {"authorization": "Bearer three"},
        {"authorization": "one"},
        {"authorization": "Bearer "},
    ):
        response = wait(there.post(INFER, {"prompts": ["Line"]}, **headers))
        error_of(response, 401)
        assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/metrics", "/v1/models", "/nowhere"):
            error_of(wait(there.get(path, **headers)), 401)
        assert wait(there.get("/health", **headers)).status_code == 200
        assert wait(there.get("/ready", **headers)).status_code == 200
    for key in there.service.keys:
        response = wait(there.post(INFER, {"prompts": ["Line"]}, authorization=f"Bearer {key}"))
        assert response.status_code == 200


def test_routes_models_methods_and_types_that_there_are_not(server, wait):
    there = server()
    error_of(wait(there.get("/v1/chat/completions")), 404)
    error_of(wait(there.get("/infer/")), 404)
    error_of(wait(there.get("/docs")), 404)
    error = error_of(wait(there.post(COMPLETIONS, {"model": "gpt", "prompt": "Line"})), 404)
    assert "small" in error["message"]
    response = wait(there.get(INFER))
    error_of(response, 405)
    assert response.headers["allow"] == "POST"
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        error_of(wait(there.post_raw(INFER, b'{"prompts": ["Line"]}', **{"content-type": kind})), 415)
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    error_of(wait(there.post_raw(INFER, b'{"prompts": ["Line"]}', **packed)), 415)
    kind = {"content-type": "Application/JSON; charset=utf-8"}
    assert wait(there.post_raw(INFER, b'{"prompts": ["Line"]}', **kind)).status_code == 200


def test_a_body_is_counted_while_it_is_read(server, wait):
    """One that says nothing of its length, and never ends, is given up soon after the limit."""
    there, sent = server(), []

    async def endless():
        while True:
            sent.append(2**16)
            yield b" " * 2**16

    async def ask():
        async with there.client() as client:
            return await client.post(INFER, content=endless(), headers={"content-type": "application/json"})

    error_of(wait(ask()), 413)
    assert sum(sent) < 20 * 2**20
    at_limit = json.dumps({"prompts": ["Line"]}).encode().ljust(2**20)
    assert wait(there.post_raw(INFER, at_limit)).status_code == 200
    error_of(wait(there.post_raw(INFER, at_limit + b" ")), 413)


def test_stops_beyond_number_cost_nothing(server, wait):
    there = server()
    for count, status in ((150_000, 400), (500_000, 413)):
        body = json.dumps({"prompt": "Line", "stop": ["a"] * count}, separators=(",", ":")).encode()
        error_of(wait(there.post_raw(COMPLETIONS, body)), status)
    assert there.engine.asked == []


def test_a_body_that_does_not_come_is_not_waited_for(server, wait):
    there = server(limits=Limits(4, 4, seconds=0.05))

    async def never():
        yield b'{"prompts"'
        await asyncio.Event().wait()

    async def ask():
        async with there.client() as client:
            return await client.post(INFER, content=never(), headers={"content-type": "application/json"})

    error_of(wait(ask()), 408)


def test_a_full_queue_says_when_to_come_again(server, wait):
    async def ask():
        there = server(slots=1, queue=1, held=True)
        waiting = [asyncio.create_task(there.post(INFER, {"prompts": [text]})) for text in ("a", "b")]
        await until(lambda: len(there.engine.work) == 2)
        refused = await there.post(INFER, {"prompts": ["c"]})
        there.engine.go()
        done = await asyncio.gather(*waiting)
        return refused, done

    refused, done = wait(ask())
    error = error_of(refused, 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    assert float(refused.headers["retry-after"]) >= RETRY_AFTER
    assert [response.status_code for response in done] == [200, 200]


def test_of_several_prompts_all_are_taken_or_none(server, wait):
    async def ask():
        there = server(slots=1, queue=2, held=True)
        first = asyncio.create_task(there.post(INFER, {"prompts": ["a"]}))
        await until(lambda: there.engine.work)
        refused = await there.post(INFER, {"prompts": ["b", "c", "d"]})
        await until(lambda: len(there.engine.work) == 1)
        there.engine.go()
        return refused, await first

    refused, first = wait(ask())
    error_of(refused, 429)
    assert first.status_code == 200


def test_a_server_that_ends_says_so(server, wait):
    there = server()
    there.engine.drain(0)
    for path, body in ((INFER, {"prompts": ["Line"]}), (COMPLETIONS, {"prompt": "Line", "stream": True})):
        response = wait(there.post(path, body))
        assert error_of(response, 503)["code"] == "draining"
        assert int(response.headers["retry-after"]) > 0
    assert wait(there.get("/ready")).status_code == 503
    assert wait(there.get("/health")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_limit_ends_a_request_and_its_work(server, wait, stream):
    async def ask():
        there = server(limits=Limits(4, 4, seconds=0.05), held=True)
        response = await there.post(COMPLETIONS, {"prompt": "Line", "stream": stream})
        await until(lambda: not there.engine.work)
        return response

    assert error_of(wait(ask()), 504)["code"] == "time_limit"


def test_the_time_limit_within_a_stream_is_its_last_event(server, wait, monkeypatch):
    async def ask():
        there = server(held_at=2)
        client = Client(there.app, COMPLETIONS, {"prompt": "Line", "stream": True})
        monkeypatch.setattr(Exchange, "left", property(lambda _: 0.0 if len(client.sent) > 1 else PATIENCE))
        await client.task
        return client

    *told, last = events_of(wait(ask()).text)
    assert told
    assert last["error"]["code"] == "time_limit"


@pytest.mark.parametrize("stream", [False, True])
def test_a_logit_that_is_no_number_ends_that_request_alone(server, wait, stream):
    async def ask():
        there = server(held=True)
        bodies = [{"prompt": [first, 30], "stream": stream} for first in (POISON, 20, 21)]
        asked = [asyncio.create_task(there.post(COMPLETIONS, body)) for body in bodies]
        await until(lambda: len(there.engine.work) == 3)
        there.engine.go()
        return await asyncio.gather(*asked)

    ill, *well = wait(ask())
    assert error_of(ill, 500)["code"] == "nonfinite_logits"
    assert [response.status_code for response in well] == [200, 200]


@pytest.mark.parametrize("path", [INFER, COMPLETIONS, "stream"])
def test_a_client_that_is_gone_is_worked_for_no_longer(server, wait, path):
    async def ask():
        there = server(held=True)
        if path == INFER:
            client = Client(there.app, path, {"prompts": ["a", "b"]})
        else:
            client = Client(there.app, COMPLETIONS, {"prompt": ["a", "b"], "stream": path == "stream"})
        await until(lambda: len(there.engine.work) == 2)
        client.gone.set()
        await client.task
        await until(lambda: not there.engine.work)
        return there, client

    there, client = wait(ask())
    assert len(there.engine.cancelled) == 2
    assert client.sent == []
    assert "muse_aborted_total 1.0" in there.service.metrics.text().decode()


def test_a_client_that_leaves_a_stream_is_worked_for_no_longer(server, wait):
    async def ask():
        there = server(held_at=2)
        client = Client(there.app, COMPLETIONS, {"prompt": "Line", "stream": True})
        await until(lambda: there.engine.held and len(client.sent) > 1)
        client.gone.set()
        await client.task
        await until(lambda: not there.engine.work)
        return there

    assert len(wait(ask()).engine.cancelled) == 1


def test_a_fault_of_the_server_is_no_secret_of_the_client(server, wait, monkeypatch, caplog):
    there = server()
    secret = "a secret of somebody"

    def fail(*_):
        raise KeyError(secret)

    monkeypatch.setattr("muse.serving.app.asked_to_infer", fail)
    error = error_of(wait(there.post(INFER, {"prompts": [secret]})), 500)
    assert error["code"] == "internal_error"
    assert "KeyError" in caplog.text
    assert secret not in caplog.text
