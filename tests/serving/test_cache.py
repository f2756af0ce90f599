"""Answers that are given again, and requests that share one under way."""

from __future__ import annotations

import asyncio

import pytest
from support.serving import Client, until

from muse.serving.cache import Cache, key_of
from muse.serving.requests import Finished, Request, Token

COMPLETIONS = "/v1/completions"
BODY = {"prompt": "Line", "temperature": 0, "max_tokens": 6}


def readers(there):
    """Requests that wait for an answer that others may share."""
    return sum(answer.readers for answer in there.service._shared.values())


def test_a_deterministic_answer_is_given_again(server, wait):
    there = server()
    first, again = (wait(there.post(COMPLETIONS, BODY)) for _ in range(2))
    assert len(there.engine.asked) == 1
    assert [response.headers["x-cache"] for response in (first, again)] == ["MISS", "HIT"]
    assert "age" not in first.headers
    assert int(again.headers["age"]) >= 0
    assert again.json()["choices"] == first.json()["choices"]
    assert again.json()["usage"] == first.json()["usage"]
    streamed = wait(there.post(COMPLETIONS, {**BODY, "stream": True}))
    assert streamed.headers["x-cache"] == "HIT"
    text = wait(there.post("/infer", {"prompts": ["Line"], "temperature": 0, "max_tokens": 6})).json()
    assert text["results"][0]["cached"]
    assert text["timing_ms"] == {"queue": 0, "prefill": 0, "decode": 0}
    assert len(there.engine.asked) == 1


def test_a_sampled_answer_is_never_given_again(server, wait):
    there = server()
    texts = {wait(there.post(COMPLETIONS, {"prompt": "Line"})).json()["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 3


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 6}, {"max_tokens": 7}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1},
        {"repetition_penalty": 1.2}, {"stop": "q"}, {"logprobs": 1}, {"echo": True}, {"prompt": "Lines"},
    ],
    ids=str,
)  # fmt: skip
def test_a_request_that_differs_in_anything_has_an_answer_of_its_own(server, wait, changed):
    there = server()
    body = {"prompt": "Line", "temperature": 0.5, "seed": 5, "max_tokens": 6}
    for one in (body, {**body, **changed}, body):
        wait(there.post(COMPLETIONS, one))
    assert len(there.engine.asked) == 2


def test_no_store_is_honoured(server, wait):
    there = server()
    for control in ("no-store", "max-age=0, No-Store"):
        response = wait(there.post(COMPLETIONS, BODY, **{"cache-control": control}))
        assert response.headers["x-cache"] == "MISS"
    assert wait(there.post(COMPLETIONS, BODY)).headers["x-cache"] == "MISS"
    assert len(there.engine.asked) == 3


def test_nothing_is_stored_where_bits_depend_on_company(server, wait):
    there = server(invariant=False)
    responses = [wait(there.post(COMPLETIONS, BODY)) for _ in range(2)]
    assert [response.headers["x-cache"] for response in responses] == ["MISS", "MISS"]
    assert not any("x-muse-bits" in response.headers for response in responses)
    assert wait(server().post(COMPLETIONS, BODY)).headers["x-muse-bits"] == "invariant"


def test_one_key_learns_nothing_of_what_another_asked(server, wait):
    """Not from an answer, nor from how soon it comes, nor by sharing one under way."""

    async def ask(there):
        there.engine.hold()
        asked = [
            asyncio.create_task(there.post(COMPLETIONS, BODY, authorization=f"Bearer {key}"))
            for key in ("one", "two", "one")
        ]
        await until(lambda: readers(there) == 3)
        there.engine.go()
        return await asyncio.gather(*asked)

    there = server(keys=("one", "two"))
    assert [response.headers["x-cache"] for response in wait(ask(there))] == ["MISS", "MISS", "HIT"]
    request = Request((5,), 3)
    assert len({key_of(request, owner, model) for owner in "ab" for model in "cd"}) == 4


def test_equal_requests_at_a_time_are_one_and_a_leader_that_leaves_ends_nothing(server, wait):
    async def ask():
        there = server(held=True)
        clients = [Client(there.app, COMPLETIONS, BODY) for _ in range(3)]
        clients.append(Client(there.app, COMPLETIONS, {**BODY, "stream": True}))
        await until(lambda: there.engine.work)
        # All of them have come before the first one leaves.
        await until(lambda: readers(there) == 4)
        clients[0].gone.set()
        await clients[0].task
        there.engine.go()
        await asyncio.gather(*(client.task for client in clients))
        return there, clients

    there, (leader, *others) = wait(ask())
    assert len(there.engine.asked) == 1
    assert there.engine.cancelled == []
    assert leader.sent == []
    assert [client.status for client in others] == [200, 200, 200]


def test_the_last_one_that_leaves_ends_the_work(server, wait):
    async def ask():
        there = server(held=True)
        clients = [Client(there.app, COMPLETIONS, BODY) for _ in range(3)]
        await until(lambda: readers(there) == 3)
        for client in clients:
            client.gone.set()
            await client.task
        await until(lambda: not there.engine.work)
        there.engine.go()
        # What was cut short is no answer to another one.
        return there, await there.post(COMPLETIONS, BODY)

    there, response = wait(ask())
    assert len(there.engine.cancelled) == 1
    assert len(there.engine.asked) == 2
    assert response.json()["usage"]["completion_tokens"] == 6


def test_an_answer_that_is_none_is_not_stored(server, wait):
    there = server()
    for _ in range(2):
        assert wait(there.post(COMPLETIONS, {**BODY, "prompt": [7, 8]})).status_code == 500
    assert len(there.engine.asked) == 2


def test_answers_are_kept_for_five_minutes_within_their_bytes():
    now = [0.0]
    cache = Cache(20_000, lambda: now[0])
    tokens, end = [Token(5, "a")] * 10, Finished("length")
    cache.put(b"old", tokens, end)
    now[0] = 299.0
    assert cache.get(b"old").time == 0.0
    now[0] = 301.0
    assert cache.get(b"old") is None
    for number in range(100):
        cache.put(bytes([number]), tokens, end)
        assert cache.size <= 20_000
    assert cache.get(bytes([99])) is not None
    assert cache.get(bytes([0])) is None
    cache.put(b"large", tokens * 100, end)
    assert cache.get(b"large") is None
    scored = [Token(5, "a", -1.0, ((5, -1.0),) * 20)] * 10
    cache.put(b"scored", scored, end)
    assert cache.get(b"scored") is None
