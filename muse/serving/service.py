"""What stands between HTTP and the engine: admission, stored answers, and requests that share one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from muse.serving.answers import Answer
from muse.serving.cache import Cache, deterministic, key_of
from muse.serving.engine import Engine
from muse.serving.metrics import Metrics, heartbeat_age
from muse.serving.refusals import RATE, SERVER, Refusal, dead, draining, late
from muse.serving.requests import Draining, Finished, QueueFull, Request
from muse.serving.served import Served

# Seconds without a sign of the engine, while work waits, after which it is not well.
HEARTBEAT = 5.0
# Seconds between two looks at whether the engine is alive, for a request that waits.
LOOK = 0.5
# Seconds after which a request that a restart will answer may come again.
RESTART = 10.0
# How an answer ends that may be given again.
WHOLE = ("length", "stop")


@dataclass(frozen=True)
class Limits:
    """What a server takes and keeps at most.

    Attributes:
        slots: requests decoded at a time.
        queue: requests that may wait.
        seconds: of a request, from its first byte to its last.
        drain: seconds in which requests end when the server does.
        cache: bytes of stored answers; 0 for none.
        body: bytes of a request.
    """

    slots: int = 32
    queue: int = 256
    seconds: float = 30.0
    drain: float = 10.0
    cache: int = 64 * 2**20
    body: int = 2**20


class ClientGone(Exception):
    """Nobody reads what would be sent."""


class Service:
    """One engine and what all requests share.

    Args:
        engine: that has started.
        model: it answers with.
        limits: of requests.
        keys: of clients; empty where everybody may ask.
    """

    def __init__(self, engine: Engine, model: Served, limits: Limits, keys: Sequence[str] = ()) -> None:
        self.engine, self.model, self.limits, self.keys = engine, model, limits, tuple(keys)
        self.metrics = Metrics(engine)
        self.cache = Cache(limits.cache)
        # Set where the engine did not end what it had: nobody waits for it any longer.
        self.over = False
        self._shared: dict[bytes, Answer] = {}

    @property
    def capacity(self) -> int:
        """Requests that are taken at once, at most."""
        return self.limits.slots + self.limits.queue

    def refusal(self) -> Refusal | None:
        """Why no request is taken; None where they are."""
        state = self.engine.state()
        if state.draining:
            return draining(RESTART)
        return None if state.alive else dead(RESTART)

    def healthy(self) -> bool:
        """Whether the engine's thread runs and, while work waits, does something."""
        state = self.engine.state()
        return state.alive and (state.waiting + state.running == 0 or heartbeat_age(state) < HEARTBEAT)

    def ask(self, request: Request, owner: str, stored: bool) -> tuple[Answer, float | None]:
        """The answer to a request, which may have begun or be over, and its age in seconds if it was stored.

        Args:
            request: that was checked.
            owner: the client's key.
            stored: whether the client takes stored answers.

        Raises:
            Refusal: the queue is full, or the engine has ended.
        """
        stored = stored and self.limits.cache > 0 and deterministic(request) and self.engine.state().invariant
        key = key_of(request, owner, self.model.fingerprint) if stored else None
        if key is not None:
            if (kept := self.cache.get(key)) is not None:
                self.metrics.hits.inc()
                answer = Answer(request, lambda _: None)
                answer.tokens, answer.finished = list(kept.tokens), kept.finished
                return answer, self.cache.clock() - kept.time
            if key in self._shared:
                self.metrics.hits.inc()
                return self._shared[key], 0.0
            self.metrics.misses.inc()
        answer = Answer(request, self._ended)
        try:
            answer.number = self.engine.submit(request, answer.deliver)
        except QueueFull as error:
            message = "as many requests wait as may; ask again later"
            raise Refusal(429, message, RATE, "queue_full", None, error.retry_after) from error
        except Draining as error:
            raise self.refusal() or draining(RESTART) from error
        if key is not None:
            answer.key = key
            self._shared[key] = answer
        return answer, None

    def leave(self, answer: Answer, news: asyncio.Event) -> None:
        """Stop reading an answer; one that nobody reads ends."""
        answer.leave(news)
        if answer.readers == 0 and answer.finished is None:
            self._forget(answer)
            if answer.number is not None:
                self.engine.cancel(answer.number)

    def _ended(self, answer: Answer) -> None:
        assert answer.finished is not None
        self.metrics.count(answer)
        # One that nobody waited for is no longer shared, and no answer either.
        if self._forget(answer) and answer.finished.reason in WHOLE:
            assert answer.key is not None
            self.cache.put(answer.key, answer.tokens, answer.finished)

    def _forget(self, answer: Answer) -> bool:
        if answer.key is None or self._shared.get(answer.key) is not answer:
            return False
        del self._shared[answer.key]
        return True


class Exchange:
    """One request of HTTP: the answers it waits for, its time limit, and whether its client is there.

    Args:
        service: of the server.
        began: by ``time.monotonic()``, when its first byte came.
    """

    def __init__(self, service: Service, began: float) -> None:
        self.service = service
        self.answers: list[Answer] = []
        self.age: float | None = None
        self.cached: list[bool] = []
        self._deadline = began + service.limits.seconds
        self._news = asyncio.Event()
        self._gone = False

    def ask(self, requests: Sequence[Request], owner: str, stored: bool, each: bool) -> None:
        """Ask for all answers, or for none.

        Args:
            requests: that were checked.
            owner: the client's key.
            stored: whether the client takes stored answers.
            each: whether each token is news, not only the end.

        Raises:
            Refusal: not all of them are taken.
        """
        ages = []
        for request in requests:
            answer, age = self.service.ask(request, owner, stored)
            answer.read(self._news, each)
            self.answers.append(answer)
            ages.append(age)
        self.cached = [age is not None for age in ages]
        if all(self.cached):
            self.age = max(age for age in ages if age is not None)

    def client_gone(self) -> None:
        """Say that nobody reads any longer."""
        self._gone = True
        self._news.set()

    @property
    def left(self) -> float:
        """Seconds until the time limit."""
        return max(0.0, self._deadline - time.monotonic())

    async def news(self) -> None:
        """Wait until there is something to look at.

        Raises:
            ClientGone: the client is.
            Refusal: the time limit has passed, or the engine has ended.
        """
        try:
            async with asyncio.timeout(min(LOOK, self.left)):
                await self._news.wait()
        except TimeoutError:
            self._see_life()
        self._news.clear()
        if self._gone:
            raise ClientGone
        if self.left == 0 and not self._all_over():
            raise late(self.service.limits.seconds)

    def _all_over(self) -> bool:
        return all(answer.finished is not None for answer in self.answers)

    def _see_life(self) -> None:
        if self._all_over():
            return
        if self.service.over:
            raise draining(RESTART)
        if not self.service.engine.state().alive:
            raise dead(RESTART)

    def see_ends(self) -> bool:
        """Whether all answers are over.

        Raises:
            Refusal: one of them is none.
        """
        ends = [answer.finished for answer in self.answers]
        for finished in ends:
            if finished is not None and finished.reason not in WHOLE:
                raise refusal_of(finished)
        return None not in ends

    def close(self) -> None:
        """Leave all answers; what nobody else reads ends."""
        for answer in self.answers:
            self.service.leave(answer, self._news)


def refusal_of(finished: Finished) -> Refusal:
    """What a client is told of an answer that is none."""
    if finished.reason == "draining":
        return draining(RESTART)
    if finished.reason == "nonfinite":
        message = "a logit of the model was no number; other requests are not concerned"
        return Refusal(500, message, SERVER, "nonfinite_logits")
    return Refusal(500, "the engine could not answer this request", SERVER, "engine_failed")
