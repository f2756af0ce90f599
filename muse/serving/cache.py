"""Answers that are given again: only where the engine would give the same to the last bit."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cachetools import TTLCache

from muse.serving.requests import Finished, Request, Token

SECONDS = 300.0
# What a token and one of the likeliest beside it take in memory, about.
TOKEN_BYTES, LIKELIEST_BYTES = 400, 160


@dataclass(frozen=True)
class Stored:
    """An answer that is over, and when that was.

    Attributes:
        tokens, finished: of the answer.
        time: by the cache's clock.
    """

    tokens: tuple[Token, ...]
    finished: Finished
    time: float = field(compare=False)

    @property
    def size(self) -> int:
        """Bytes of memory, about."""
        likeliest = sum(len(token.likeliest) for token in self.tokens)
        return TOKEN_BYTES * (len(self.tokens) + 1) + LIKELIEST_BYTES * likeliest


class Cache:
    """Stored answers for five minutes, the oldest given up where they would take more memory than allowed.

    Args:
        size: bytes at most; 0 for none.
        clock: seconds.
    """

    def __init__(self, size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._stored: TTLCache[bytes, Stored] = TTLCache(
            size, SECONDS, timer=clock, getsizeof=lambda stored: stored.size
        )

    def get(self, key: bytes) -> Stored | None:
        """What is stored under a key."""
        return self._stored.get(key)

    def put(self, key: bytes, tokens: list[Token], finished: Finished) -> None:
        """Store an answer, where it fits."""
        stored = Stored(tuple(tokens), finished, self.clock())
        if stored.size <= self._stored.maxsize:
            self._stored[key] = stored

    @property
    def size(self) -> int:
        """Bytes that are used, about."""
        return int(self._stored.currsize)


def key_of(request: Request, owner: str, fingerprint: str) -> bytes:
    """Equal for equal requests of one owner to the same model.

    Args:
        request: with every parameter resolved.
        owner: the API key; what another one asked is not told by how soon there is an answer.
        fingerprint: of the model.
    """
    return hashlib.sha256(repr((fingerprint, owner, request)).encode()).digest()


def deterministic(request: Request) -> bool:
    """Whether the same request always has the same answer."""
    return request.sampling.temperature == 0 or request.seed is not None
