"""Bodies that are read within a limit, answers that are written, and clients that are gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from muse.serving.formats import END_OF_STREAM, as_event, as_json
from muse.serving.refusals import INVALID, Refusal
from muse.serving.service import ClientGone, Exchange

JSON, EVENTS = "application/json", "text/event-stream"
# What is read of a body that is too long, and for how many seconds, so that its sender hears why.
DROPPED_BYTES, DROPPED_SECONDS = 16 * 2**20, 2.0
# What a client has to read the end, where the time limit is the end.
LAST_SECONDS = 1.0


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """The body of a request, of which no more than ``limit`` bytes are ever kept.

    Raises:
        Refusal: it is not JSON by its type, has more bytes, or does not come within ``seconds``.
        ClientGone: its sender is.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON or request.headers.get("content-encoding", "identity").lower() != "identity":
        message = f"the body must be sent as it is, with Content-Type: {JSON}"
        raise Refusal(415, message, INVALID, "content_type", closes=True)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    body.clear()
                    await _drop(request)
                    message = f"the body has more than {limit} bytes, the limit of a request"
                    raise Refusal(413, message, INVALID, "body_too_large", closes=True)
    except TimeoutError:
        message = f"the body did not come within {seconds:g} s"
        raise Refusal(408, message, INVALID, "body_timeout", closes=True) from None
    except ClientDisconnect as error:
        raise ClientGone from error
    return bytes(body)


async def _drop(request: Request) -> None:
    """Read on for a while: who still sends when a connection ends does not see what was answered."""
    dropped = 0
    try:
        async with asyncio.timeout(DROPPED_SECONDS):
            while dropped < DROPPED_BYTES:
                message = await request.receive()
                dropped += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


@contextmanager
def watched(receive: Receive, exchange: Exchange) -> Iterator[None]:
    """While it lasts, an exchange is told when its client goes; nothing else reads ``receive`` then."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        exchange.client_gone()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()


class Answering(Response):
    """A response that is written while it is made.

    Args:
        exchange: that has asked; it is closed in any case.
        write: sends it; told how.
    """

    def __init__(self, exchange: Exchange, write: Callable[[Send], Awaitable[None]]) -> None:
        self.status_code, self.background = 200, None
        self.init_headers()
        self._exchange, self._write = exchange, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with watched(receive, self._exchange):
                await self._write(send)
        except ClientGone:
            # The server closes what is left of the connection.
            self._exchange.service.metrics.aborted.inc()
        finally:
            self._exchange.close()


def whole(exchange: Exchange, made: Callable[[], object], headers: Mapping[str, str]) -> Response:
    """An answer in one piece, when the engine has ended it.

    Args:
        exchange: that has asked.
        made: JSON of it, asked then.
        headers: sent with it.
    """

    async def write(send: Send) -> None:
        while not exchange.see_ends():
            await exchange.news()
        body = as_json(made())
        await _start(exchange, send, {**headers, "Content-Type": JSON, "Content-Length": str(len(body))})
        await _send(exchange, send, body, False)

    return Answering(exchange, write)


def stream(
    exchange: Exchange, new: Callable[[], bytes], last: Callable[[], bytes], headers: Mapping[str, str]
) -> Response:
    """An answer in pieces, as server-sent events.

    What is not read stays with the answer, which is bounded, and is one piece when it is; the engine waits
    for nobody. A client that has not read all within the time limit of its request is gone.

    Args:
        exchange: that has asked.
        new: events of what has come since it was last asked.
        last: events after all of them.
        headers: sent before.
    """

    async def write(send: Send) -> None:
        # As long as nothing is sent, what goes wrong has a status of its own.
        while not exchange.see_ends() and not any(answer.tokens for answer in exchange.answers):
            await exchange.news()
        await _start(exchange, send, {**headers, "Content-Type": EVENTS, "Cache-Control": "no-store"})
        try:
            while True:
                over = exchange.see_ends()
                if piece := new():
                    await _send(exchange, send, piece, True)
                if over:
                    break
                await exchange.news()
            ending = last()
        except Refusal as refusal:
            ending = as_event(refusal.body)
        await _send(exchange, send, ending + END_OF_STREAM, False)

    return Answering(exchange, write)


async def _start(exchange: Exchange, send: Send, headers: Mapping[str, str]) -> None:
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await _within(exchange, send({"type": "http.response.start", "status": 200, "headers": raw}))


async def _send(exchange: Exchange, send: Send, body: bytes, more: bool) -> None:
    await _within(exchange, send({"type": "http.response.body", "body": body, "more_body": more}))


async def _within(exchange: Exchange, sending: Awaitable[None]) -> None:
    try:
        async with asyncio.timeout(max(exchange.left, LAST_SECONDS)):
            await sending
    except TimeoutError:
        raise ClientGone from None
