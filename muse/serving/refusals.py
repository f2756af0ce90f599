"""What a client is told when there is no answer: OpenAI's form, in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

INVALID, AUTHENTICATION, RATE, SERVER = (
    "invalid_request_error",
    "authentication_error",
    "rate_limit_error",
    "server_error",
)


@dataclass
class Refusal(Exception):
    """No answer, and why; with the attributes of OpenAI's errors.

    Attributes:
        status: of HTTP.
        message: one sentence.
        type: a class of errors.
        code: that programs know it by; one of few.
        param: the field of the request that is wrong.
        retry_after: seconds after which it may be asked again.
        allow: the methods that a route has.
        closes: whether the connection ends, since a part of the request is unread.
    """

    status: int
    message: str
    type: str
    code: str
    param: str | None = None
    retry_after: float | None = None
    allow: str | None = None
    closes: bool = False

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What is sent with it."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.allow is not None:
            headers["Allow"] = self.allow
        if self.closes:
            headers["Connection"] = "close"
        return headers


def invalid(param: str | None, message: str, code: str = "invalid_value") -> Refusal:
    """A field of a request has a value that is not allowed."""
    return Refusal(400, message, INVALID, code, param)


def draining(retry_after: float) -> Refusal:
    """The server is ending."""
    return Refusal(503, "the server is ending; ask another one", SERVER, "draining", None, retry_after)


def dead(retry_after: float) -> Refusal:
    """There is nobody to answer."""
    return Refusal(
        503,
        "the engine has ended; the server must be started again",
        SERVER,
        "engine_dead",
        None,
        retry_after,
    )


def late(seconds: float) -> Refusal:
    """The time limit has passed."""
    message = f"there was no whole answer in {seconds:g} s, the limit of a request; ask for fewer tokens"
    return Refusal(504, message, SERVER, "time_limit")
