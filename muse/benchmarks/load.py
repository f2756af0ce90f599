"""A load on a server: questions that are sent in two ways, and when what came of each.

In a closed loop every client asks again when it has its answer, so that a slow server is asked less. In an
open loop questions come when they come, whatever has become of those before, as from many people; times count
from when a question was due.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

# Of one load, whatever its time.
MOST_QUESTIONS = 500_000
# Of an open loop; beyond them a question that is due waits here, and its time goes on.
MOST_CONNECTIONS = 512
# Seconds after which nobody waits any longer; a server's own limit is shorter.
PATIENCE = 120.0
# Seconds that a connection is kept without use; fewer than those after which a server ends it.
KEPT = 2.0
# As the status of what was no answer of HTTP.
NO_ANSWER = 0
EVENT = "data: "


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        path: of the server.
        content: JSON.
        streamed: whether the answer comes token by token; it then must have been asked for with logprobs, so
            that every token is told, also one that ends no character.
        headers: sent with it.
        expected: of ``Answered.answer``; None where any will do.
    """

    path: str
    content: bytes
    streamed: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    expected: object = None


@dataclass(frozen=True)
class Answered:
    """What came of a question; times in seconds by the clock of the event loop.

    Attributes:
        due: when it was to be sent.
        sent: when it was.
        ended: when its answer was over.
        status: of HTTP; 0 where there was none.
        tokens: times of the generated tokens: when they came, and of an answer in one piece, which says how
            long it was decoded, evenly over that.
        answer: of ``/infer`` the ids of each prompt's answer; of a stream its tokens with their
            log-probabilities; None where there is none, or the expected one.
        right: whether it is the one that was expected; None where none was.
        stored: whether it came from the server's memory.
        invariant: whether the server promises equal bits.
    """

    due: float
    sent: float
    ended: float
    status: int
    tokens: tuple[float, ...] = ()
    answer: object = None
    right: bool | None = None
    stored: bool = False
    invariant: bool = False

    @property
    def seconds(self) -> float:
        """From when it was due to the end of its answer."""
        return self.ended - self.due


def new_client(address: str) -> httpx.AsyncClient:
    """A client that keeps its connections, and has as many as there are questions under way."""
    # What is not needed to import the other benchmarks.
    import httpx

    # It tells of each request otherwise.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    limits = httpx.Limits(
        max_connections=MOST_CONNECTIONS, max_keepalive_connections=MOST_CONNECTIONS, keepalive_expiry=KEPT
    )
    headers = {"content-type": "application/json"}
    # Not through a proxy that the environment names.
    return httpx.AsyncClient(
        base_url=address, timeout=PATIENCE, limits=limits, headers=headers, trust_env=False
    )


async def ask(client: httpx.AsyncClient, question: Question, due: float | None = None) -> Answered:
    """Send a question; what came of it, also where that is no answer."""
    import httpx

    now = asyncio.get_running_loop().time
    sent = now()
    due = sent if due is None else due
    lines: list[tuple[float, str]] = []
    content = b""
    try:
        async with client.stream(
            "POST", question.path, content=question.content, headers=question.headers
        ) as response:
            if question.streamed:
                # They are read when the times have been taken.
                lines = [(now(), line) async for line in response.aiter_lines()]
            else:
                content = await response.aread()
        ended = now()
    except httpx.HTTPError:
        return Answered(due, sent, now(), NO_ANSWER)
    if response.status_code != httpx.codes.OK:
        return Answered(due, sent, ended, response.status_code)
    answer, tokens = _streamed(lines) if question.streamed else _whole(content, ended)
    if answer is None:
        return Answered(due, sent, ended, NO_ANSWER)
    right = None if question.expected is None else answer == question.expected
    return Answered(
        due,
        sent,
        ended,
        response.status_code,
        tokens,
        # Not a million times the same.
        None if right else answer,
        right,
        response.headers.get("x-cache") == "HIT",
        response.headers.get("x-muse-bits") == "invariant",
    )


def _whole(content: bytes, ended: float) -> tuple[object, tuple[float, ...]]:
    body = json.loads(content)
    seconds = body["timing_ms"]["decode"] / 1000
    answers = [result["tokens"] for result in body["results"]]
    times = [
        ended - seconds * (len(tokens) - 1 - place) / max(1, len(tokens) - 1)
        for tokens in answers
        for place in range(len(tokens))
    ]
    return answers, tuple(sorted(times))


def _streamed(lines: Sequence[tuple[float, str]]) -> tuple[object, tuple[float, ...]]:
    tokens: list[Any] = []
    times: list[float] = []
    for time, line in lines:
        if not line.startswith(EVENT) or line == f"{EVENT}[DONE]":
            continue
        event = json.loads(line.removeprefix(EVENT))
        if "error" in event:
            return None, ()
        for choice in event["choices"]:
            new = choice["logprobs"]
            tokens += zip(new["tokens"], new["token_logprobs"], strict=True)
            times += [time] * len(new["tokens"])
    return tokens, tuple(times)


def poisson_schedule(rate: float, seconds: float, seed: int) -> list[float]:
    """When questions are due that come on average ``rate`` times a second, each without regard to the others.

    Returns:
        Seconds from the begin, in order, below ``seconds``; at least one, at most ``MOST_QUESTIONS``.
    """
    generator = random.Random(seed)
    arrivals = itertools.accumulate(generator.expovariate(rate) for _ in range(MOST_QUESTIONS))
    return list(itertools.takewhile(lambda arrival: arrival < seconds, arrivals)) or [0.0]


async def open_loop(
    client: httpx.AsyncClient, questions: Iterator[Question], schedule: Sequence[float]
) -> list[Answered]:
    """Send a question at each time of a schedule, whatever has become of the others, and wait for all.

    Args:
        client: of ``new_client``.
        questions: that are asked, in order.
        schedule: seconds from now.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    tasks = []
    for arrival in schedule:
        due = began + arrival
        # Also where it is late: those under way have a turn.
        await asyncio.sleep(max(0.0, due - loop.time()))
        tasks.append(asyncio.create_task(ask(client, next(questions), due)))
    return list(await asyncio.gather(*tasks))


async def closed_loop(
    client: httpx.AsyncClient, questions: Iterator[Question], clients: int, seconds: float
) -> list[Answered]:
    """Let each of some clients ask again as soon as it has its answer, for a time, at least once.

    A client that could not reach the server stops.

    Args:
        client: of ``new_client``.
        questions: that are asked, in order.
        clients: that ask at the same time.
        seconds: after which no question is sent.
    """
    now = asyncio.get_running_loop().time
    deadline = now() + seconds
    answered: list[Answered] = []

    async def one() -> None:
        while True:
            found = await ask(client, next(questions))
            answered.append(found)
            over = now() >= deadline or len(answered) >= MOST_QUESTIONS
            if over or found.status == NO_ANSWER:
                return

    await asyncio.gather(*(one() for _ in range(clients)))
    return answered
