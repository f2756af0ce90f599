"""What every request of HTTP passes first: whose it is, and that it is counted."""

from __future__ import annotations

import hmac
import logging
import time
import traceback
from collections.abc import Sequence

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from muse.serving.formats import as_json
from muse.serving.metrics import UNMATCHED
from muse.serving.refusals import AUTHENTICATION, Refusal
from muse.serving.service import Service

log = logging.getLogger(__name__)

# Routes that tell nothing but whether the server is there.
OPEN = ("/health", "/ready")
# The status in the metrics of a client that was gone before it had one.
GONE = 499


class Front:
    """Around the application: refuses who has no key, counts and times what is answered.

    Args:
        app: that answers.
        service: of the server.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["began"], status = time.monotonic(), GONE

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            owner = None if scope["path"] in OPEN else owner_of(scope, self._service.keys)
            scope["owner"] = owner
            await self._app(scope, receive, counted)
        except Refusal as refusal:
            await respond(refusal, self._service)(scope, receive, counted)
        except Exception as error:  # noqa: BLE001 - one request's, which has been answered with 500
            where = traceback.extract_tb(error.__traceback__)[-1]
            # Not the message, which could have a prompt in it.
            log.error("%s in %s, line %s", type(error).__name__, where.filename, where.lineno)
        finally:
            route = getattr(scope.get("route"), "path", UNMATCHED)
            self._service.metrics.responses.labels(route, str(status)).inc()
            self._service.metrics.request.labels(route).observe(time.monotonic() - scope["began"])


def owner_of(scope: Scope, keys: Sequence[str]) -> str:
    """The key that a request came with; empty where none is needed.

    Raises:
        Refusal: it has none, or not one of these.
    """
    if not keys:
        return ""
    given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    scheme, _, token = given.partition(b" ")
    # All of them, each in the same time, whichever it is.
    fit = [key for key in keys if hmac.compare_digest(token.strip(), key.encode())]
    if scheme.lower() != b"bearer" or not fit:
        message = "a key is needed, as in Authorization: Bearer KEY"
        raise Refusal(401, message, AUTHENTICATION, "invalid_api_key")
    return fit[0]


def respond(refusal: Refusal, service: Service) -> Response:
    """The response that tells a refusal, which is counted by its code."""
    service.metrics.rejected.labels(refusal.code).inc()
    return Response(as_json(refusal.body), refusal.status, refusal.headers, "application/json")
