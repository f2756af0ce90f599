"""The loads on a server that ``benchmark=serving`` measures, one after the other."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from tqdm import tqdm

from muse.benchmarks.criteria import ratio
from muse.benchmarks.load import Answered, Question, ask, closed_loop, new_client, open_loop, poisson_schedule
from muse.benchmarks.load_figures import OK, Figures, drift, growth, knee, load_figures, overload_figures
from muse.benchmarks.offline import Offline, gap_of
from muse.benchmarks.process_use import use_of
from muse.benchmarks.server import RunningServer
from muse.config import BenchConfig
from muse.errors import RunError
from muse.trained import Trained

# Tokens of the shorter answers.
SHORT = 8
# Prompts of one request whose first tokens are timed.
TOGETHER = 8
# Clients that ask for all that the server can do.
MANY = 32
# Questions a second, and shares of what the server can do, that come in an open loop.
RATE, SHARES = 20.0, (0.25, 0.5, 0.7, 0.85, 1.0, 1.25)
# Of what it can do, for minutes.
SUSTAINED = 0.5
# Times in which each number of clients has its turn.
ROUNDS = 3
# Of the server that is asked for more than it can do: requests that may wait, and how much more.
QUEUE, OVERLOAD = 32, 2.0
# Questions whose answer is stored.
HITS = 200
# Seconds between two looks at the server, at least, and how many there are at most.
LOOK, LOOKS = 0.25, 240
# Two logits that differ by less, as a share of the largest, may change places: arithmetic differs.
TIE, TIE_OF_LESS = 1e-5, 2e-2
# How answers come: in one piece, and token by token.
WHOLE, STREAMED = "whole", "streamed"
NO_CACHE = {"cache-control": "no-store"}


@dataclass(frozen=True)
class Shape:
    """Tokens of a prompt, and of its answer."""

    prompt: int
    tokens: int

    def within(self, window: int) -> Shape:
        """The same, or less of both where they do not fit."""
        tokens = min(self.tokens, max(1, window * self.tokens // (self.prompt + self.tokens)))
        return Shape(max(1, min(self.prompt, window - tokens)), tokens)

    def __str__(self) -> str:
        return f"{self.prompt} + {self.tokens} tokens"


class Progress:
    """Says which load comes, and how long all that is left takes, about."""

    def __init__(self, seconds: float, loads: int) -> None:
        self._left, self._loads, self._done = seconds, loads, 0

    def begin(self, title: str, seconds: float) -> None:
        """Say it of a load."""
        self._done += 1
        left = tqdm.format_interval(max(0.0, self._left))
        print(f"  {self._done} of {self._loads}: {title}, about {left} left", flush=True)
        self._left -= seconds


@dataclass
class Bench:
    """A server under measurement.

    Attributes:
        server: that is asked.
        client: of the load.
        progress: is told of each load.
        headers: of each question.
    """

    server: RunningServer
    client: Any
    progress: Progress
    headers: Mapping[str, str]

    async def closed(
        self, questions: Sequence[Question], clients: int, seconds: float
    ) -> tuple[list[Answered], dict[str, float | None]]:
        """A load in a closed loop, and the processors that it took."""
        before = self._used()
        answered = await closed_loop(self.client, self._turns(questions), clients, seconds)
        return answered, self._cores(before)

    async def opened(
        self, questions: Sequence[Question], rate: float, seconds: float, seed: int
    ) -> tuple[list[Answered], dict[str, float | None]]:
        """A load that comes ``rate`` times a second, likewise."""
        before = self._used()
        schedule = poisson_schedule(rate, seconds, seed)
        answered = await open_loop(self.client, self._turns(questions), schedule)
        return answered, self._cores(before)

    def _turns(self, questions: Sequence[Question]) -> Iterator[Question]:
        return itertools.cycle([replace(one, headers=self.headers) for one in questions])

    def _used(self) -> tuple[float, float, float | None]:
        used = use_of(self.server.process.pid)
        return time.perf_counter(), time.process_time(), used.seconds if used else None

    def _cores(self, before: tuple[float, float, float | None]) -> dict[str, float | None]:
        status = self.server.process.poll()
        if status is not None:
            raise RunError(f"the server ended with status {status} under load")
        wall, own, others = (
            None if None in (late, early) else late - early  # type: ignore[operator]
            for late, early in zip(self._used(), before, strict=True)
        )
        return {"server_cores": ratio(others, wall), "generator_cores": ratio(own, wall)}

    @asynccontextmanager
    async def watched(self, seconds: float) -> AsyncIterator[list[dict[str, float | None]]]:
        """Looks at the server while it lasts, which is ``seconds``, about."""
        samples: list[dict[str, float | None]] = []
        pause = min(max(LOOK, seconds / LOOKS), seconds / 8)
        task = asyncio.create_task(self._watch(samples, pause))
        try:
            yield samples
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _watch(self, samples: list[dict[str, float | None]], pause: float) -> None:
        import httpx

        began, before = time.perf_counter(), self._used()
        # With a connection of its own.
        async with new_client(self.server.address) as client:
            while True:
                await asyncio.sleep(pause)
                try:
                    gauges = gauges_of((await client.get("/metrics")).text)
                except httpx.HTTPError:
                    # Seen by the load, too.
                    gauges = {}
                used, cores = use_of(self.server.process.pid), self._cores(before)
                before = self._used()
                sample = {
                    "seconds": time.perf_counter() - began,
                    "memory_mb": used.memory / 1e6 if used else None,
                    "cores": cores["server_cores"],
                }
                samples.append(sample | {name: gauges.get(f"muse_{name}") for name in ("running", "waiting")})


def gauges_of(text: str) -> dict[str, float]:
    """What Prometheus reads, of values without labels."""
    pairs = (line.split() for line in text.splitlines() if line[:1] not in ("", "#") and "{" not in line)
    return {name: float(value) for name, value in pairs}


def whole_question(texts: Sequence[str], tokens: int) -> Question:
    """To ``/infer``."""
    body = {"prompts": list(texts), "max_tokens": tokens, "temperature": 0}
    return Question("/infer", json.dumps(body).encode())


def streamed_question(ids: Sequence[int], tokens: int) -> Question:
    """For an answer that comes token by token."""
    body = {"prompt": list(ids), "max_tokens": tokens, "temperature": 0, "stream": True, "logprobs": 0}
    return Question("/v1/completions", json.dumps(body).encode(), streamed=True)


class Loads:
    """The loads of one model.

    Args:
        config: of the benchmark.
        shape: of most questions.
        texts: prompts.
        prompts: their ids.
        offline: answers and figures without a server.
    """

    def __init__(
        self,
        config: BenchConfig,
        shape: Shape,
        texts: Sequence[str],
        prompts: Sequence[Sequence[int]],
        offline: Offline,
    ) -> None:
        self._options, self._seed, self._shape, self._offline = config.benchmark, config.seed, shape, offline
        self._texts, self._prompts = texts, prompts
        self._short = Shape(shape.prompt, min(SHORT, shape.tokens))
        self._wholes = [whole_question([text], shape.tokens) for text in texts]
        self._streams = [streamed_question(ids, shape.tokens) for ids in prompts]
        self._levels = sorted({1, *self._options.clients})
        seconds = self._options.seconds
        # A request of several prompts, the capacity, rates, stored answers, and what is too much, which takes
        # twice the time, between two others.
        loads = 1 + 1 + 1 + len(SHARES) + 1 + 3
        total = (2 * len(self._levels) + loads + 1) * seconds + 60 * self._options.minutes
        self._progress = Progress(total, ROUNDS + loads + 1)

    @asynccontextmanager
    async def _bench(self, server: RunningServer) -> AsyncIterator[Bench]:
        async with new_client(server.address) as client:
            yield Bench(server, client, self._progress, NO_CACHE)

    async def of_answers(self, server: RunningServer, trained: Trained) -> dict[str, Any]:
        """Whether answers are right: as the offline model's, and beside others as alone."""
        print("  comparing answers ...", flush=True)
        async with self._bench(server) as bench:
            self._wholes = await alone(bench, self._wholes)
            self._streams = await alone(bench, self._streams)
            served = [one.expected[0] for one in self._wholes]  # type: ignore[index]
            tasks = (
                ask(bench.client, one)
                for pair in zip(self._wholes, self._streams, strict=True)
                for one in pair
            )
            beside = await asyncio.gather(*tasks)
        answers = self._offline.answers
        gaps = [gap_of(trained, *own) for own in zip(self._prompts, answers, served, strict=True)]
        precise = trained.config.stage.precision == "fp32"
        return {
            "answers": len(gaps),
            "answers_equal": sum(one == other for one, other in zip(answers, served, strict=True)),
            "answers_gap": max(gaps),
            "answers_right": max(gaps) <= (TIE if precise else TIE_OF_LESS),
            "invariant": all(one.invariant for one in beside),
            "beside_wrong": sum(one.right is not True for one in beside),
        }

    async def of_server(self, server: RunningServer) -> dict[str, Any]:
        """What it carries as long as it can."""
        seconds, begin = self._options.seconds, self._progress.begin
        async with self._bench(server) as bench:
            found: dict[str, Any] = {}
            batch = await alone(bench, [whole_question(self._texts[:TOGETHER], 1)])
            begin(f"{TOGETHER} prompts in a request, 1 new token", seconds)
            answered, cores = await bench.closed(batch, 1, seconds)
            found["infer"] = load_figures([answered]) | cores
            found["clients"] = await self._clients(bench)
            short = await alone(bench, [whole_question([text], self._short.tokens) for text in self._texts])
            begin(f"{MANY} clients, {self._short}", seconds)
            answered, _ = await bench.closed(short, MANY, seconds)
            found["capacity"] = capacity = capacity_of(load_figures([answered]))
            rates = sorted(
                [(RATE, None), *((share * capacity, share) for share in SHARES)], key=lambda one: one[0]
            )
            found["rates"] = []
            for number, (rate, share) in enumerate(rates):
                begin(f"{rate:.3g} questions a second, {self._short}", seconds)
                answered, cores = await bench.opened(short, rate, seconds, self._seed + number)
                row = {"rate": rate, "share": share, **load_figures([answered]), **cores}
                found["rates"].append(row)
            found["knee"] = knee([(row["rate"], row["p95_ms"]) for row in found["rates"]])
            minutes = 60 * self._options.minutes
            begin(f"{SUSTAINED * capacity:.3g} questions a second for {minutes:g} s", minutes)
            async with bench.watched(minutes) as samples:
                answered, cores = await bench.opened(short, SUSTAINED * capacity, minutes, self._seed)
            found["sustained"] = {
                "rate": SUSTAINED * capacity,
                **load_figures([answered]),
                **cores,
                "drift": drift(answered),
                "memory_growth": growth([sample["memory_mb"] for sample in samples]),
            }
            found["samples"] = samples
        return found

    async def _clients(self, bench: Bench) -> list[dict[str, Any]]:
        """A row for each number of clients and each form, taken in turns."""
        seconds = self._options.seconds
        forms = {WHOLE: self._wholes, STREAMED: self._streams}
        kinds = [(form, clients) for form in forms for clients in self._levels]
        spells: dict[tuple[str, int], list[list[Answered]]] = {kind: [] for kind in kinds}
        used: dict[tuple[str, int], list[dict[str, float | None]]] = {kind: [] for kind in kinds}
        for number in range(ROUNDS):
            levels = ", ".join(map(str, self._levels))
            self._progress.begin(
                f"{levels} clients, {self._shape}, round {number + 1}", len(kinds) * seconds / ROUNDS
            )
            for form, clients in kinds:
                answered, cores = await bench.closed(forms[form], clients, seconds / ROUNDS)
                spells[form, clients].append(answered)
                used[form, clients].append(cores)
        rows = []
        offline = self._offline.figures["tokens_per_second"]
        for form, clients in kinds:
            own = load_figures(spells[form, clients], form == STREAMED)
            by_round, alone_by_round = (
                [load_figures([spell])["tokens_per_second"] or 0.0 for spell in spells[form, level]]
                for level in (clients, 1)
            )
            ratios = [ratio(many, one) or 0.0 for many, one in zip(by_round, alone_by_round, strict=True)]
            means = {
                key: mean_of([one[key] for one in used[form, clients]]) for key in used[form, clients][0]
            }
            rows.append(
                {
                    "form": form,
                    "clients": clients,
                    "ratio": median(ratios),
                    "ratio_offline": ratio(own["tokens_per_second"], offline),
                    **own,
                    **means,
                }
            )
        return rows

    async def beyond(self, server: RunningServer) -> dict[str, Any]:
        """Stored answers, and what becomes of more questions than it can answer."""
        seconds, begin = self._options.seconds, self._progress.begin
        async with self._bench(server) as bench:
            begin("stored answers", seconds)
            cache = await hits(bench, self._wholes[0], seconds)
            begin(f"{MANY} clients, {self._shape}", seconds)
            before = load_figures([(await bench.closed(self._wholes, MANY, seconds))[0]])
            capacity = capacity_of(before)
            rate = OVERLOAD * capacity
            # Until there is no place, and as long again as any load.
            offered = seconds + (MANY + QUEUE) / (rate - capacity)
            begin(f"{rate:.3g} questions a second, which is too much", 2 * seconds)
            async with bench.watched(offered) as samples:
                answered, cores = await bench.opened(self._wholes, rate, offered, self._seed)
            begin(f"{MANY} clients, {self._shape}, again", seconds)
            after = load_figures([(await bench.closed(self._wholes, MANY, seconds))[0]])
        overload = overload_figures(answered) | cores
        peak = mean_of([before["tokens_per_second"], after["tokens_per_second"]])
        overload |= {"rate": rate, "peak": peak, "kept": ratio(overload["tokens_per_second"], peak)}
        return {"cache": cache, "overload": overload, "overload_samples": samples}


def capacity_of(figures: Figures) -> float:
    """Answers a second.

    Raises:
        RunError: there were none.
    """
    if not figures["answers_per_second"]:
        raise RunError(f"none of the {figures['questions']} questions of a load had an answer")
    return figures["answers_per_second"]


async def alone(bench: Bench, questions: Sequence[Question]) -> list[Question]:
    """The questions with the answers that each has alone.

    Raises:
        RunError: one has none.
    """
    known = []
    for question in questions:
        found = await ask(bench.client, replace(question, headers=bench.headers))
        if found.status != OK:
            raise RunError(f"the server answered {question.path} alone with status {found.status}")
        known.append(replace(question, expected=found.answer))
    return known


async def hits(bench: Bench, question: Question, seconds: float) -> dict[str, float | None]:
    """Ask for an answer that is stored, one time after the other."""
    question = replace(question, headers={})
    await ask(bench.client, question)
    answered: list[Answered] = []
    deadline = time.perf_counter() + seconds
    while len(answered) < HITS and (not answered or time.perf_counter() < deadline):
        answered.append(await ask(bench.client, question))
    return {"hits": sum(one.stored for one in answered), **load_figures([answered])}


def mean_of(values: Sequence[float | None]) -> float | None:
    """None where one is missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
