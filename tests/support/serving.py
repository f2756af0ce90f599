"""An engine without a model, a client without a network, and the real command as a process."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import re
import runpy
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muse.data import Tokenizer
from muse.generation import TextStream
from muse.serving import engine as real
from muse.serving.engine import EngineState
from muse.serving.requests import Draining, Event, Finished, QueueFull, Request, Token
from support.processes import Copies
from support.waiting import PATIENCE, wait_until

# A prompt that begins with this token has no answer that is a number.
POISON = 7
RETRY_AFTER = 2.5


@dataclass
class Work:
    request: Request
    deliver: Callable[[Event], None]
    tokens: Iterator[Token]
    made: int = 0
    stream: TextStream | None = None
    cancelled: bool = False


@dataclass
class FakeEngine:
    """Answers by arithmetic on ids, a token a step for all that run; as strict as the interface.

    Attributes:
        script: ids that it answers with, in place of those by arithmetic.
        invariant: as the self-test found.
        held: whether no step is taken.
        held_at: generated tokens after which none is.
        dead: whether its thread has ended, as it seems.
        heartbeat: that it tells, in place of now.
        pause: seconds between steps.
        hangs: whether it never ends what it has.
        asked: requests in order of submission.
        cancelled: numbers of those that were.
    """

    tokenizer: Tokenizer
    slots: int = 4
    queue: int = 4
    script: Callable[[Request], Sequence[int]] | None = None
    invariant: bool = True
    held: bool = False
    held_at: int | None = None
    dead: bool = False
    heartbeat: float | None = None
    pause: float = 0.0
    hangs: bool = False
    asked: list[Request] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.condition = threading.Condition()
        self.work: dict[int, Work] = {}
        self.numbers = itertools.count()
        self.draws = itertools.count()
        self.draining = self.ended = False
        self.steps = self.rows = self.prompt_tokens = self.generated_tokens = self.nonfinite = 0
        self.on_step: Callable[[float, int], None] = lambda seconds, rows: None
        self.thread = threading.Thread(target=self.run, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> int:
        assert request.ids
        with self.condition:
            if self.draining or self.dead:
                raise Draining
            if len(self.work) >= self.slots + self.queue:
                raise QueueFull(RETRY_AFTER)
            number = next(self.numbers)
            self.asked.append(request)
            self.work[number] = Work(request, deliver, self.tokens_of(request))
            self.condition.notify_all()
        return number

    def cancel(self, number: int) -> None:
        with self.condition:
            self.cancelled.append(number)
            if number in self.work:
                self.work[number].cancelled = True
            self.condition.notify_all()

    def state(self) -> EngineState:
        count = len(self.work)
        heartbeat = time.monotonic() if self.heartbeat is None else self.heartbeat
        running = min(count, self.slots)
        return EngineState(
            running=running,
            waiting=count - running,
            slots=self.slots,
            heartbeat=heartbeat,
            alive=not self.dead,
            draining=self.draining,
            invariant=self.invariant,
            steps=self.steps,
            rows=self.rows,
            guessed=0,
            guessed_right=0,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            nonfinite=self.nonfinite,
        )

    def drain(self, seconds: float) -> None:
        with self.condition:
            self.draining = True
            self.condition.wait_for(lambda: not self.work and not self.hangs, None if self.hangs else seconds)
            for number in list(self.work):
                self.finish(number, "draining")

    def hold(self) -> None:
        """Take no step from now on."""
        with self.condition:
            self.held = True

    def go(self) -> None:
        """Take steps again."""
        with self.condition:
            self.held = False
            self.condition.notify_all()

    def stop(self) -> None:
        """End the thread."""
        with self.condition:
            self.ended = True
            self.condition.notify_all()

    def tokens_of(self, request: Request) -> Iterator[Token]:
        if request.echo:
            for place, index in enumerate(request.ids):
                yield self.token(request, index, place > 0, self.tokenizer.decode([index]), True)
        ids = self.script(request) if self.script is not None else self.by_arithmetic(request)
        for index in ids[: request.max_tokens]:
            yield self.token(request, index, True, "", False)

    def by_arithmetic(self, request: Request) -> Sequence[int]:
        draw = 0
        if request.sampling.temperature > 0:
            draw = request.seed if request.seed is not None else 1000 + next(self.draws)
        return [
            20 + (sum(request.ids) * 31 + place * 17 + draw * 7) % 70 for place in range(request.max_tokens)
        ]

    def token(self, request: Request, index: int, scored: bool, text: str, echoed: bool) -> Token:
        if request.logprobs is None or not scored:
            return Token(index, text, echoed=echoed)
        others = [(index, -0.5), (index + 1, -math.inf)][: request.logprobs]
        return Token(index, text, -0.5, tuple(others), echoed)

    def run(self) -> None:
        while True:
            with self.condition:
                self.condition.wait_for(self.may_go)
                if self.ended:
                    return
                for number in [number for number, work in self.work.items() if work.cancelled]:
                    self.finish(number, "cancelled")
                if self.held or self.dead:
                    continue
                self.steps += 1
                before = self.rows
                for number in list(self.work)[: self.slots]:
                    if not self.held:
                        self.step(number)
                if self.rows > before:
                    self.on_step(0.001, self.rows - before)
                self.condition.wait_for(self.must_go, self.pause)

    def may_go(self) -> bool:
        return self.must_go() or (bool(self.work) and not self.held and not self.dead)

    def must_go(self) -> bool:
        return self.ended or any(work.cancelled for work in self.work.values())

    def step(self, number: int) -> None:
        work = self.work[number]
        request = work.request
        if request.ids[0] == POISON:
            self.nonfinite += 1
            self.finish(number, "nonfinite")
            return
        if work.stream is None:
            self.prompt_tokens += len(request.ids)
            work.stream = TextStream(self.tokenizer, request.stops)
        token = next(work.tokens, None)
        if token is None:
            self.finish(number, "length", work.stream.end())
            return
        if not token.echoed:
            self.rows += 1
            self.generated_tokens += 1
            self.held = self.held or self.generated_tokens == self.held_at
            token = Token(token.id, work.stream.push(token.id), token.logprob, token.likeliest)
        work.deliver(token)
        if work.stream.stopped:
            self.finish(number, "stop", work.stream.end())

    def finish(self, number: int, reason: str, text: str = "") -> None:
        work = self.work.pop(number)
        work.deliver(Finished(reason, text, 0.001, 0.002, 0.003))
        self.condition.notify_all()


@dataclass
class Client:
    """One request of ASGI by hand, whose client may go away or read slowly.

    Attributes:
        app: that is asked.
        sent: messages that came back.
    """

    app: Any
    path: str
    body: Any
    headers: dict[str, str] = field(default_factory=dict)
    sent: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gone, self.reads = asyncio.Event(), asyncio.Event()
        self.reads.set()
        self._asked = False
        headers = {"content-type": "application/json", **self.headers}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        self.task = asyncio.create_task(self.app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": json.dumps(self.body).encode(), "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self.reads.wait()
        self.sent.append(message)

    @property
    def text(self) -> str:
        """What was read of the body."""
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None


async def until(happens: Callable[[], Any]) -> Any:
    """What ``happens`` returns, once that is true, while the loop goes on."""
    deadline = time.monotonic() + PATIENCE
    while not (found := happens()):
        assert time.monotonic() < deadline, "it hangs"
        await asyncio.sleep(0.002)
    return found


def events_of(text: str) -> list[Any]:
    """The events of a stream, whose last one says that it is over."""
    pieces = [piece.removeprefix("data: ") for piece in text.split("\n\n") if piece]
    assert pieces[-1] == "[DONE]"
    return [json.loads(piece) for piece in pieces[:-1]]


@dataclass
class ServerProcess:
    """The command in a process of its own, at a free port.

    Attributes:
        copies: that process, and what it prints.
    """

    copies: Copies

    @property
    def address(self) -> str:
        """Where it is, once it is ready; empty before."""
        found = re.search(r"served at (\S+);", self.copies.out()[0])
        return found[1] if found else ""

    def signal(self, number: int) -> None:
        """Send it a signal."""
        (process,) = self.copies.processes
        assert process.pid is not None
        os.kill(process.pid, number)

    def wait(self) -> int:
        """Its exit status, when it has ended."""
        return self.copies.wait()[0]


@contextmanager
def server_process(
    folder: Path,
    *arguments: object,
    engine: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
) -> Iterator[ServerProcess]:
    """``python -m muse.serve`` while the block lasts, ready.

    Args:
        folder: for what it prints.
        arguments: of the command.
        engine: fields of a ``FakeEngine`` that it has in place of the real one.
        environment: beside what is there.
    """
    words = [*map(str, arguments), "--port", "0"]
    there = {"MUSE_API_KEY": "", **(environment or {})}
    copies = Copies(folder / "server", [there], be_server, words, engine)
    server = ServerProcess(copies)
    try:
        wait_until(lambda: server.address, copies.alive)
        yield server
    except BaseException:
        print(copies.err()[0][-2000:], file=sys.stderr)
        raise
    finally:
        for process in copies.processes:
            process.kill()
        copies.wait()


def be_server(arguments: list[str], engine: dict[str, Any] | None) -> None:
    """Become the command, with a ``FakeEngine`` where its fields are given."""
    if engine is not None:

        def fake(trained: Any, slots: int, queue: int, guesses: int) -> FakeEngine:
            return FakeEngine(trained.tokenizer, slots, queue, **engine)

        real.Engine = fake  # type: ignore[assignment, misc]
    sys.argv = ["muse.serve", *arguments]
    runpy.run_module("muse.serve", run_name="__main__", alter_sys=True)
