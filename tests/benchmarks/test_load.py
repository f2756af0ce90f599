"""The load, in a time that only passes where everybody sleeps, and what is made of recorded times."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import subprocess
import sys

import httpx
import pytest

from muse.benchmarks.load import Answered, Question, ask, closed_loop, open_loop, poisson_schedule
from muse.benchmarks.load_figures import (
    KNEE,
    OK,
    TOO_MANY,
    drift,
    growth,
    knee,
    load_figures,
    overload_figures,
    percentiles,
    span,
    tokens_per_second,
)
from muse.benchmarks.process_use import use_of

TOKENS = [3, 1, 2]
QUESTION = Question("/infer", b"{}", expected=[TOKENS])


class Hours(asyncio.SelectorEventLoop):
    """An event loop whose sleepers wake at once, at the time at which they wanted to."""

    def __init__(self):
        super().__init__()
        self.moment = 0.0
        select = self._selector.select

        def passing(timeout=None):
            assert timeout is not None, "nobody wakes"
            self.moment += timeout
            return select(0)

        self._selector.select = passing

    def time(self):
        return self.moment


def wait(coroutine):
    with asyncio.Runner(loop_factory=Hours) as runner:
        return runner.run(coroutine)


class Server:
    """Answers one question after the other; some take as long as is said, and what is too much is refused."""

    def __init__(self, seconds=0.1, slow=(), places=math.inf):
        self.seconds, self.slow, self.places = seconds, dict(slow), places
        self.there, self.numbers, self.turn = 0, itertools.count(), None

    async def answer(self, request):
        if self.there >= self.places:
            return httpx.Response(429)
        self.turn = self.turn or asyncio.Lock()
        self.there += 1
        async with self.turn:
            seconds = self.slow.get(next(self.numbers), self.seconds)
            await asyncio.sleep(seconds)
        self.there -= 1
        body = {"results": [{"tokens": TOKENS}], "timing_ms": {"decode": 1000 * seconds}}
        return httpx.Response(200, json=body)

    def load(self, way, *arguments):
        async def ask_all():
            transport = httpx.MockTransport(self.answer)
            async with httpx.AsyncClient(transport=transport, base_url="http://there") as client:
                return await way(client, itertools.repeat(QUESTION), *arguments)

        return wait(ask_all())


def answered(due, seconds, status=OK, tokens=(), right=True, late=0.0):
    return Answered(due, due + late, due + seconds, status, tuple(tokens), right=right)


def test_a_server_that_stalls_shows_in_an_open_loop_and_hides_in_a_closed_one():
    schedule = [float(second) for second in range(30)]
    stalled = {5: 6.0}
    opened = Server(slow=stalled).load(open_loop, schedule)
    closed = Server(slow=stalled).load(closed_loop, 1, 30.0)
    assert sum(one.seconds > 1 for one in opened) >= 4
    assert sum(one.seconds > 1 for one in closed) == 1
    assert load_figures([opened])["p95_ms"] > 20 * load_figures([closed])["p95_ms"]
    # Who asks after it waits for what is left of it.
    assert [round(one.seconds, 6) for one in opened[4:8]] == [0.1, 6.0, 5.1, 4.2]


@pytest.mark.parametrize("slow", [{}, {0: 100.0}, {3: 7.0, 9: 2.0}])
def test_questions_of_an_open_loop_come_when_they_are_due_whatever_is_answered(slow):
    schedule = poisson_schedule(4.0, 20.0, seed=3)
    found = Server(slow=slow).load(open_loop, schedule)
    assert [one.due for one in found] == schedule
    assert [one.sent for one in found] == pytest.approx(schedule)
    assert all(one.status == OK and one.right for one in found)


def test_a_poisson_schedule_has_its_rate_and_depends_on_its_seed_alone():
    schedule = poisson_schedule(50.0, 200.0, seed=1)
    assert schedule == poisson_schedule(50.0, 200.0, seed=1) == sorted(schedule)
    assert schedule[:10] != poisson_schedule(50.0, 200.0, seed=2)[:10]
    assert 0 < schedule[0] < schedule[-1] < 200
    gaps = [after - before for before, after in itertools.pairwise(schedule)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.05)
    # As long a deviation as the mean, and as many long gaps as there should be.
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.1)
    assert sum(gap > 2 * mean for gap in gaps) / len(gaps) == pytest.approx(math.exp(-2), rel=0.1)
    # A longer one begins alike.
    assert poisson_schedule(50.0, 300.0, seed=1)[: len(schedule)] == schedule


def test_a_schedule_has_a_question_and_never_too_many(monkeypatch):
    assert len(poisson_schedule(1e-6, 1.0, seed=0)) == 1
    monkeypatch.setattr("muse.benchmarks.load.MOST_QUESTIONS", 7)
    assert len(poisson_schedule(1000.0, 1.0, seed=0)) == 7


@pytest.mark.parametrize("clients", [1, 3, 8])
def test_a_closed_loop_has_as_many_questions_under_way_as_clients(clients):
    server = Server()
    found = server.load(closed_loop, clients, 10.0)
    for one in found:
        assert sum(other.sent < one.ended and other.ended > one.sent for other in found) <= 2 * clients - 1
    assert max(one.sent for one in found) < 10.0
    assert max(one.ended for one in found) == pytest.approx(10.0 + 0.1 * (clients - 1), abs=0.11)
    # One after the other, whoever asks.
    assert load_figures([found])["answers_per_second"] == pytest.approx(10.0, rel=0.01)


def test_a_client_that_reaches_nobody_stops():
    def nobody(request):
        raise httpx.ConnectError("refused")

    async def ask_all():
        async with httpx.AsyncClient(transport=httpx.MockTransport(nobody), base_url="http://x") as client:
            return await closed_loop(client, itertools.repeat(QUESTION), 4, 1e6)

    found = wait(ask_all())
    assert [one.status for one in found] == [0] * 4
    assert load_figures([found])["errors"] == 4
    assert load_figures([found])["p95_ms"] is None


def asked(content, question=QUESTION, status=200, **headers):
    async def one():
        def answer(request):
            return httpx.Response(status, content=content, headers=headers)

        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://x") as client:
            return await ask(client, question)

    return wait(one())


def events(*values):
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    return "".join(f"data: {line}\n\n" for line in lines).encode()


def piece(*tokens):
    own = {"tokens": list(tokens), "token_logprobs": [-1.5] * len(tokens)}
    return {"choices": [{"text": "", "logprobs": own}]}


def test_every_token_of_a_stream_counts_also_one_that_ends_no_character():
    question = Question("/v1/completions", b"{}", True)
    found = asked(events(piece("a"), piece("bytes:\\xc3", "b"), piece(), "[DONE]"), question)
    assert len(found.tokens) == 3
    assert found.answer == [("a", -1.5), ("bytes:\\xc3", -1.5), ("b", -1.5)]
    expected = Question("/v1/completions", b"{}", True, expected=found.answer)
    assert asked(events(piece("a"), piece("bytes:\\xc3", "b"), "[DONE]"), expected).right is True
    assert asked(events(piece("a", "b", "b"), "[DONE]"), expected).right is False


def test_what_is_no_answer_is_none():
    error = {"error": {"message": "late", "code": "time_limit"}}
    question = Question("/v1/completions", b"{}", True)
    assert asked(events(piece("a"), error, "[DONE]"), question).status == 0
    refused = asked(b"", status=429)
    assert (refused.status, refused.tokens, refused.right) == (429, (), None)
    figures = load_figures([[refused]])
    assert (figures["questions"], figures["errors"], figures["wrong"]) == (1, 1, 0)


def test_what_the_server_says_of_an_answer_is_kept():
    body = json.dumps({"results": [{"tokens": TOKENS}], "timing_ms": {"decode": 0.0}})
    found = asked(body, **{"X-Cache": "HIT", "X-Muse-Bits": "invariant"})
    assert found.stored
    assert found.invariant
    assert not asked(body, **{"X-Cache": "MISS"}).stored
    wrong = json.dumps({"results": [{"tokens": [3, 1, 1]}], "timing_ms": {"decode": 0.0}})
    assert load_figures([[found, asked(wrong)]])["wrong"] == 1


def test_percentiles_are_times_that_there_were():
    times = [0.001 * number for number in range(1, 101)]
    found = percentiles(times[::-1], "first_")
    assert list(found) == ["first_p50_ms", "first_p95_ms", "first_p99_ms"]
    for key, share in zip(found, (0.5, 0.95, 0.99), strict=True):
        assert any(found[key] == 1e3 * time for time in times)
        assert sum(1e3 * time < found[key] for time in times) / len(times) >= share - 1e-9
    assert percentiles([0.2]) == {"p50_ms": 200.0, "p95_ms": 200.0, "p99_ms": 200.0}
    assert percentiles([]) == {"p50_ms": None, "p95_ms": None, "p99_ms": None}


def test_times_count_from_when_a_question_was_due():
    figures = load_figures([[answered(0.0, 0.5, tokens=(0.3, 0.5), late=0.2)]], streamed=True)
    assert figures["p50_ms"] == pytest.approx(500)
    assert figures["first_p50_ms"] == pytest.approx(300)
    assert figures["between_p50_ms"] == pytest.approx(200)
    assert figures["late_p95_ms"] == pytest.approx(200)


def test_throughput_is_over_the_spells_and_not_over_what_was_between_them():
    spell = [answered(0.0, 1.0, tokens=(0.5, 1.0)), answered(1.0, 1.0, tokens=(2.0, 2.0))]
    later = [answered(100.0, 4.0, tokens=(104.0,) * 8)]
    assert load_figures([spell])["tokens_per_second"] == 2
    assert load_figures([spell, later])["tokens_per_second"] == 2
    assert span(later) == 4
    assert load_figures([[]])["tokens_per_second"] is None


def test_tokens_count_where_they_were_made():
    one = [answered(0.0, 4.0, tokens=(1.0, 2.0, 3.0, 4.0)), answered(0.0, 4.0, status=0)]
    assert tokens_per_second(one, 1.0, 3.0) == 1
    assert tokens_per_second(one, 5.0, 6.0) == 0
    assert tokens_per_second(one, 2.0, 2.0) is None


def test_twice_the_capacity_leaves_the_throughput_and_refuses_the_rest():
    server = Server(seconds=0.1, places=8)
    found = server.load(open_loop, poisson_schedule(20.0, 60.0, seed=0))
    figures = overload_figures(found)
    assert figures["tokens_per_second"] == pytest.approx(10 * len(TOKENS), rel=0.02)
    assert figures["refused"] == sum(one.status == TOO_MANY for one in found) > 400
    assert figures["refused_p99_ms"] == pytest.approx(0, abs=1e-6)
    assert figures["errors"] == figures["wrong"] == 0


def test_without_a_refusal_an_overload_has_no_throughput():
    figures = overload_figures([answered(0.0, 1.0, tokens=(1.0,)), answered(1.0, 1.0, status=504)])
    assert figures["tokens_per_second"] is figures["refused_p95_ms"] is None
    assert figures["errors"] == 1


@pytest.mark.parametrize(("last", "found"), [(0.1, 0.0), (0.15, 0.5), (0.05, -0.5)])
def test_drift_is_of_the_last_third_beside_the_first(last, found):
    load = [answered(float(due), 0.1 if due < 60 else last) for due in range(90)]
    assert drift(load) == pytest.approx(found)
    # In any order, and whatever is between.
    load[45] = answered(45.0, 99.0)
    assert drift(load[::-1]) == pytest.approx(found)


def test_what_is_too_short_or_unanswered_has_no_drift():
    assert drift([answered(float(due), 0.1, OK if due < 60 else 504) for due in range(90)]) is None
    assert growth([1.0, 1.0]) is growth([]) is growth([None] * 9) is None
    assert growth([100.0, None, 100.0, 500.0, 500.0, 101.0, 101.0]) == pytest.approx(0.01)
    assert growth([7.0] * 30) == 0


def test_the_knee_is_the_last_rate_before_times_grow():
    points = [(10.0, 5.0), (30.0, 5.0 * KNEE), (20.0, 6.0), (40.0, 5.0 * KNEE + 0.1), (50.0, 5.0)]
    assert knee(points) == 30
    assert knee([(1.0, 2.0)]) == 1
    assert knee([(1.0, 2.0), (2.0, None)]) == 1
    assert knee([(1.0, None), (2.0, 3.0)]) is knee([]) is None


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="the system does not tell")
def test_a_process_that_works_uses_time_and_memory():
    before = use_of(os.getpid())
    kept = bytearray(os.urandom(64 * 2**20))
    after = use_of(os.getpid())
    assert after.memory - before.memory > len(kept) / 2
    assert after.seconds >= before.seconds > 0
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert use_of(ended.pid) is None
