"""What a server does beyond its limits, with clients that are gone, and when its process stops or ends."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from muse.benchmarks.deployment_checks import (
    COMPLETIONS,
    INFER,
    TOKENS,
    Target,
    ask,
    asked_together,
    error_of,
    expect,
)

# The most prompts, and choices of each, that one request may have.
PROMPTS, CHOICES = 32, 8
# Seconds in which a server that is stopped does not answer.
SILENCE = 2.0
# Seconds until a client that gets no stream goes.
LEAVES = 0.05
DONE = "[DONE]"


def many(target: Target, prompts: int, **options: Any) -> dict[str, Any]:
    """A body for ``/v1/completions`` with eight answers to each of some prompts of one token."""
    ids = [[target.vocabulary - 1 - number % target.vocabulary] for number in range(prompts)]
    tokens = min(TOKENS, target.window - 1)
    return {"prompt": ids, "n": CHOICES, "max_tokens": tokens, "temperature": 1.0, **options}


def events(response: httpx.Response) -> Iterator[str]:
    """The events of a stream, as they come."""
    for line in response.iter_lines():
        if line:
            yield line.removeprefix("data: ")


def received(target: Target, body: dict[str, Any]) -> Iterator[str]:
    """The events of a stream until it ends or breaks off."""
    with (
        suppress(httpx.TransportError),
        target.client.stream("POST", COMPLETIONS, json=body) as response,
    ):
        yield from events(response)


def queue_full(target: Target) -> str:
    """Fill a server that holds 256 requests, and see that it takes no more and says when to come again.

    Raises:
        Failed: it takes more, or does not say so.
    """
    body = many(target, PROMPTS)
    with target.client.stream("POST", COMPLETIONS, json={**body, "stream": True}) as taken:
        expect(taken.status_code == 200, f"the first request: status {taken.status_code}")
        # Kept: a connection ends with what reads it.
        told = events(taken)
        next(told)
        response = target.client.post(COMPLETIONS, json=body)
    expect(response.status_code == 429, f"status {response.status_code}, not 429")
    code, after = error_of(response.content, "429")["code"], response.headers.get("Retry-After", "")
    expect(code == "queue_full", f"the code is {code}")
    expect(after.isdecimal() and int(after) > 0, f"Retry-After is {after or 'missing'}")
    target.until(lambda: idle(target), "slots are taken")
    return f"429, Retry-After {after}"


def too_slow(target: Target, stream: bool) -> str:
    """Ask a server with a time limit for more than it can make, and see that it says so.

    Raises:
        Failed: it does not.
    """
    body = {**many(target, PROMPTS), "stream": stream}
    with target.client.stream("POST", COMPLETIONS, json=body) as response:
        if not stream:
            expect(response.status_code == 504, f"status {response.status_code}, not 504")
            code = error_of(response.read(), "504")["code"]
        else:
            expect(response.status_code == 200, f"status {response.status_code} of a stream")
            *told, last, end = events(response)
            expect(end == DONE, f"the stream ends with {end[:60]!r}")
            expect(told, "the stream had no token before the limit")
            code = error_of(last.encode(), "the last event")["code"]
    expect(code == "time_limit", f"the code is {code}")
    target.until(lambda: idle(target), "slots are taken")
    return "a last event" if stream else "504"


def idle(target: Target) -> bool:
    """Whether nothing runs and nothing waits."""
    return target.metric("muse_running") + target.metric("muse_waiting") == 0


def left_alone(target: Target, count: int = 100) -> str:
    """Leave a server in the middle of answers, streamed or not, and see that it stops working on them.

    Raises:
        Failed: it goes on, or slots are taken.
    """
    aborted, cancelled = (
        target.metric("muse_aborted_total"),
        target.metric("muse_answers_total", reason="cancelled"),
    )
    for number in range(count):
        if number % 2:
            timeout = httpx.Timeout(target.patience, read=LEAVES)
            with suppress(httpx.ReadTimeout):
                response = target.client.post(COMPLETIONS, json=many(target, 1), timeout=timeout)
                expect(response.status_code == 200, f"client {number + 1} was told {response.status_code}")
            continue
        body = many(target, 4, stream=True)
        with target.client.stream("POST", COMPLETIONS, json=body) as response:
            expect(response.status_code == 200, f"client {number + 1} was told {response.status_code}")
            next(events(response))
    target.until(lambda: idle(target), "slots are taken")
    noted = target.metric("muse_aborted_total") - aborted
    stopped = target.metric("muse_answers_total", reason="cancelled") - cancelled
    # A slow client may see the end of an answer.
    expect(noted >= count / 2, f"only {noted:g} of {count} clients that left were noticed")
    expect(stopped >= count / 2, f"work on {stopped:g} answers was stopped for {count} clients that left")
    expect(target.ready(), "no longer ready")
    return f"{noted:g} of {count} noticed, no slot taken"


def one_fails_alone(target: Target, token: int, bodies: Sequence[dict[str, Any]]) -> str:
    """Send a token whose weights have a NaN beside others, and see that these are answered.

    Raises:
        Failed: it is not so.
    """
    alone = [ask(target, body) for body in bodies]
    with ThreadPoolExecutor(1) as threads:
        together = threads.submit(asked_together, target, bodies)
        for stream in (False, True):
            body = {"prompt": [token], "max_tokens": 1, "stream": stream}
            response = target.client.post(COMPLETIONS, json=body)
            expect(response.status_code == 500, f"status {response.status_code}, not 500")
            code = error_of(response.content, "500")["code"]
            expect(code == "nonfinite_logits", f"the code is {code}")
        expect(together.result() == alone, "others have other answers beside it")
    return f"500, {len(bodies)} others answered"


def stopped(target: Target, process: subprocess.Popen[bytes], body: dict[str, Any], before: object) -> str:
    """Stop a server's process, see that clients are not kept for ever, and that it goes on as it was.

    Raises:
        Failed: it answers while it is stopped, or not as before when it goes on.
    """
    process.send_signal(signal.SIGSTOP)
    try:
        for method, path in (("GET", "/health"), ("POST", INFER)):
            answered = True
            try:
                content = body if method == "POST" else None
                target.client.request(method, path, json=content, timeout=SILENCE)
            except httpx.TimeoutException:
                answered = False
            expect(not answered, f"{path} was answered by a process that is stopped")
    finally:
        process.send_signal(signal.SIGCONT)
    target.until(lambda: target.client.get("/health").status_code == 200, "not well")
    told = ask(target, body)
    expect(told == before, "the answer differs when it goes on")
    return "a timeout, then the same answer"


def killed(target: Target, process: subprocess.Popen[bytes]) -> str:
    """Kill a server in the middle of a stream, and see that its client is not kept for ever.

    Raises:
        Failed: the stream ends as if it were whole.
    """
    told: list[str] = []
    for event in received(target, many(target, PROMPTS, stream=True)):
        if not told:
            process.kill()
        told.append(event)
    status = process.wait(target.patience)
    expect(DONE not in told, "the stream ended as if it were whole")
    expect(status == -signal.SIGKILL, f"the status is {status}")
    return "the stream breaks off"


@dataclass(frozen=True)
class Ending:
    """How a server ended that was told to in the middle of streams.

    Attributes:
        refused: status, Retry-After and code of a request that came then.
        streams: events of each.
        answers: that each stream has, if it is whole.
        status: of the process; None where it had to be killed.
        seconds: that it took.
    """

    refused: tuple[int, str, str]
    streams: list[list[str]]
    answers: int
    status: int | None
    seconds: float


def end_in_streams(target: Target, process: subprocess.Popen[bytes], limit: float, count: int = 4) -> Ending:
    """Send SIGTERM in the middle of ``count`` streams, and ask once more.

    Args:
        target: the server.
        process: of it.
        limit: seconds after which it is killed.
        count: streams.

    Raises:
        Failed: a stream does not begin, or requests are taken to the end.
    """
    prompts = CHOICES
    started = threading.Barrier(count + 1)

    def read() -> list[str]:
        told: list[str] = []
        for event in received(target, many(target, prompts, stream=True)):
            told.append(event)
            if len(told) == 1:
                started.wait(target.patience)
        return told

    with ThreadPoolExecutor(count) as threads:
        streams = [threads.submit(read) for _ in range(count)]
        started.wait(target.patience)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        refused = _refused_while_ending(target)
        status = None
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(limit)
        seconds = time.monotonic() - began
        if status is None:
            process.kill()
        return Ending(refused, [one.result() for one in streams], prompts * CHOICES, status, seconds)


def _refused_while_ending(target: Target) -> tuple[int, str, str]:
    try:
        target.until(lambda: not target.ready(), "still ready")
        response = target.client.post(COMPLETIONS, json=many(target, 1))
    except httpx.TransportError:
        return 0, "", "no connection"
    return (
        response.status_code,
        response.headers.get("Retry-After", ""),
        str(error_of(response.content, "while it ends")["code"]),
    )


def refused_while_ending(ending: Ending) -> str:
    """See that a request was refused while a server ended.

    Raises:
        Failed: it was not, or not so.
    """
    status, after, code = ending.refused
    expect((status, code) == (503, "draining"), f"status {status}, {code}, not 503, draining")
    expect(after.isdecimal() and int(after) > 0, f"Retry-After is {after or 'missing'}")
    return f"503, Retry-After {after}"


def ended_with_answers(ending: Ending) -> str:
    """See that each stream came to its end, and that the server ended by itself.

    Raises:
        Failed: it is not so.
    """
    expect(ending.status is not None, f"it had not ended after {ending.seconds:.0f} s")
    expect(ending.status == 0, f"the status is {ending.status}")
    whole = cut = 0
    for told in ending.streams:
        expect(told and told[-1] == DONE, "a stream broke off")
        parts = [json.loads(event) for event in told[:-1]]
        ends = [choice["finish_reason"] for part in parts for choice in part.get("choices", ())]
        finished = sum(reason is not None for reason in ends)
        whole += finished
        if finished < ending.answers:
            code = parts[-1].get("error", {}).get("code")
            expect(code == "draining", f"a stream ended with {finished} of {ending.answers} answers, {code}")
            cut += ending.answers - finished
    expect(whole, "no answer was ended")
    return f"{whole} answers ended, {cut} told so, in {ending.seconds:.1f} s"
