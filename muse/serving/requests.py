"""What is asked of the engine, and what it says: one definition for the engine and for HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field

from muse.generation import Sampling


@dataclass(frozen=True)
class Request:
    """One text to go on with; checked before it reaches the engine.

    Attributes:
        ids: tokens of the prompt, at least one.
        max_tokens: to generate at most; 0 where only the prompt is scored.
        sampling: how a token is drawn; temperature 0 takes the likeliest.
        seed: of the draw, which then is the same in any company; None for another one each time.
        stops: texts that end the answer, and are not in it.
        logprobs: so many likeliest tokens are told with each token's own log-probability; None for neither.
        echo: whether the tokens of the prompt are told too, before the others; with logprobs they are scored
            (the first one has no log-probability).
    """

    ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False


@dataclass(frozen=True)
class Token:
    """A token of an answer, or of an echoed prompt.

    Attributes:
        id: of the vocabulary.
        text: what is new in the text by it; empty where it ends no character, or could begin a stop.
        logprob: of the model's distribution at temperature 1; None where it was not asked for, or is the
            first.
        likeliest: ids and log-probabilities of the likeliest tokens in its place, likeliest first.
        echoed: whether it is of the prompt.
    """

    id: int
    text: str
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()
    echoed: bool = False


@dataclass(frozen=True)
class Finished:
    """The end of an answer; nothing follows it.

    Attributes:
        reason: ``length``, ``stop``, ``cancelled``, ``nonfinite`` (a logit was), ``draining`` or ``failed``.
        text: what a stop had held back.
        queue: seconds until a slot was free.
        prefill: seconds from then to the first token.
        decode: seconds from then to the end.
    """

    reason: str
    text: str = ""
    queue: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


Event = Token | Finished


class QueueFull(Exception):
    """No more requests can wait.

    Attributes:
        retry_after: seconds until one likely can, from the throughput of late.
    """

    def __init__(self, retry_after: float) -> None:
        super().__init__("the queue is full")
        self.retry_after = retry_after


class Draining(Exception):
    """The engine takes no more requests: it is ending, or dead."""
