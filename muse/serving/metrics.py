"""What Prometheus reads; its labels are route templates, statuses and a few reasons, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from muse.serving.answers import Answer
from muse.serving.engine import Engine, EngineState

# They would be a second series for each one, of when it was made.
disable_created_metrics()

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# The path of a request that no route has.
UNMATCHED = "unmatched"
# What the engine says of itself: name, kind, meaning.
ENGINE = (
    ("running", GaugeMetricFamily, "requests in slots"),
    ("waiting", GaugeMetricFamily, "requests in the queue"),
    ("slots", GaugeMetricFamily, "requests decoded at a time, at most"),
    ("steps", CounterMetricFamily, "steps of the engine"),
    ("rows", CounterMetricFamily, "tokens decoded over all steps"),
    ("guessed", CounterMetricFamily, "tokens guessed in steps"),
    ("guessed_right", CounterMetricFamily, "guessed tokens that were decoded"),
    ("prompt_tokens", CounterMetricFamily, "tokens of prompts read"),
    ("generated_tokens", CounterMetricFamily, "tokens generated"),
    ("nonfinite", CounterMetricFamily, "requests ended by a logit that is no number"),
)


class _OfEngine(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        state = self._engine.state()
        for name, kind, meaning in ENGINE:
            yield kind(f"muse_{name}", meaning, value=getattr(state, name))
        age = heartbeat_age(state)
        yield GaugeMetricFamily(
            "muse_heartbeat_age_seconds", "since the engine was last seen at work", value=age
        )


class Metrics:
    """Counters and histograms of one server.

    Args:
        engine: whose state and steps they tell.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_OfEngine(engine))

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(f"muse_{name}", meaning, labels, registry=self.registry)

        def histogram(name: str, meaning: str, *labels: str) -> Histogram:
            return Histogram(f"muse_{name}_seconds", meaning, labels, buckets=SECONDS, registry=self.registry)

        def count_step(seconds: float, rows: int) -> None:
            self.step.observe(seconds)
            self.step_rows.observe(rows)

        self.responses = counter("responses", "responses of HTTP", "route", "status")
        self.answers = counter("answers", "answers of the engine by how they finished", "reason")
        self.rejected = counter("rejected", "requests refused, by the code of the error", "reason")
        self.aborted = counter("aborted", "requests whose client was gone")
        self.hits = counter("cache_hits", "answers that were stored, or under way for another request")
        self.misses = counter("cache_misses", "answers that could have been stored, and were not")
        self.request = histogram("request", "a whole request", "route")
        self.first_token = histogram("first_token", "from admission to the first generated token")
        self.between_tokens = histogram("between_tokens", "from one generated token to the next")
        self.queue = histogram("queue", "from admission to a slot")
        self.step = histogram("step", "a step of the engine")
        self.step_rows = Histogram(
            "muse_step_rows", "tokens decoded in a step", buckets=ROWS, registry=self.registry
        )
        engine.on_step = count_step

    def count(self, answer: Answer) -> None:
        """Count an answer that has finished."""
        finished = answer.finished
        assert finished is not None
        self.answers.labels(finished.reason).inc()
        self.queue.observe(finished.queue)
        before = answer.began
        for number, moment in enumerate(answer.times):
            (self.between_tokens if number else self.first_token).observe(moment - before)
            before = moment

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)


def sum_of(counter: Counter) -> int:
    """The value of a counter over all labels."""
    samples = (sample for family in counter.collect() for sample in family.samples)
    return int(sum(sample.value for sample in samples if sample.name.endswith("_total")))


def heartbeat_age(state: EngineState) -> float:
    """Seconds since the engine was last seen at work."""
    return max(0.0, time.monotonic() - state.heartbeat)
