"""Continuous batching over the slots of a static cache, in one thread that owns the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from muse.serving.requests import Event, Request
from muse.trained import Trained


@dataclass
class EngineState:
    """What ``/metrics`` and the line in a terminal read; a copy, made under no lock.

    Attributes:
        running: requests in slots.
        waiting: in the queue.
        slots: there are.
        heartbeat: ``time.monotonic()`` of the last step, or of the last look at an empty queue.
        alive: whether the engine's thread runs.
        draining: whether requests are refused.
        invariant: whether the self-test found answers equal to the last bit in any company.
        steps: taken.
        rows: decoded tokens over all steps.
        prompt_tokens: read.
        generated_tokens: made.
        nonfinite: requests that ended by a logit that is no number.
    """

    running: int
    waiting: int
    slots: int
    heartbeat: float
    alive: bool
    draining: bool
    invariant: bool
    steps: int
    rows: int
    prompt_tokens: int
    generated_tokens: int
    nonfinite: int


class Engine:
    """Answers requests; every method may be called from any thread.

    Args:
        trained: model, tokenizer and options.
        slots: requests decoded at a time.
        queue: requests that may wait.
    """

    def __init__(self, trained: Trained, slots: int = 32, queue: int = 256) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Start the thread, warm up and run the self-test; returns when requests can come.

        Raises:
            RunError: the self-test found logits that are no numbers.
        """
        raise NotImplementedError

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> int:
        """Ask for an answer; its number. ``deliver`` is called in the engine's thread and must not wait.

        Raises:
            QueueFull, Draining: it is not taken.
        """
        raise NotImplementedError

    def cancel(self, number: int) -> None:
        """End a request: its slot is free in the next step. One that has ended is left alone."""
        raise NotImplementedError

    def state(self) -> EngineState:
        """What it does now."""
        raise NotImplementedError

    def drain(self, seconds: float) -> None:
        """Take no more requests, end those that run, within a limit; what is left ends as ``draining``."""
        raise NotImplementedError
