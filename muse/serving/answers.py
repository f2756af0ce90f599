"""An answer of the engine as it comes, for any number of readers on the event loop of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from muse.serving.requests import Event, Finished, Request, Token


class Answer:
    """Tokens that the engine's thread adds, and that readers take at their own pace.

    Nothing here waits for a reader, and what is kept is bounded by the request: its prompt and its tokens.

    Args:
        request: that it is the answer to.
        ended: called on the loop when there is nothing more to come.
    """

    def __init__(self, request: Request, ended: Callable[[Answer], None]) -> None:
        self.request = request
        self.tokens: list[Token] = []
        self.finished: Finished | None = None
        self.began = time.monotonic()
        # Of generated tokens, by time.monotonic().
        self.times: list[float] = []
        # Of the engine; None where it was never asked.
        self.number: int | None = None
        # Under which equal requests find it; None where none may.
        self.key: bytes | None = None
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._readers: dict[asyncio.Event, bool] = {}
        # Whether one of them wants each token.
        self._followed = False
        self._waking = False
        self._told = False

    @property
    def readers(self) -> int:
        """How many wait for it."""
        return len(self._readers)

    def read(self, news: asyncio.Event, each: bool) -> None:
        """Be told by ``news`` of its end, or of ``each`` token."""
        self._readers[news] = each
        self._followed = any(self._readers.values())

    def leave(self, news: asyncio.Event) -> None:
        """Be told no longer."""
        self._readers.pop(news, None)
        self._followed = any(self._readers.values())

    def deliver(self, event: Event) -> None:
        """Add what the engine says, in its thread; a loop that has ended is told nothing."""
        if isinstance(event, Finished):
            self.finished = event
        else:
            self.tokens.append(event)
            if not event.echoed:
                self.times.append(time.monotonic())
            if not self._followed:
                return
        # The loop is woken once for all that comes before it looks.
        if not self._waking:
            self._waking = True
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._waking = False
        # The end may come in the middle of this, and wakes once more then.
        if self.finished is not None and not self._told:
            self._told = True
            self._ended(self)
        for news in self._readers:
            news.set()
