"""The application of ASGI: routes, and what each answers."""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from muse.serving.formats import as_event, as_json, choice, inferred, usage
from muse.serving.front import GONE, Front, respond
from muse.serving.refusals import INVALID, SERVER, Refusal
from muse.serving.schema import (
    AnyBody,
    Asked,
    CompletionBody,
    InferBody,
    asked_to_complete,
    asked_to_infer,
    checked,
    parsed,
)
from muse.serving.service import ClientGone, Exchange, Service
from muse.serving.transport import JSON, read_body, stream, whole

log = logging.getLogger(__name__)

ROUTES = ("/infer", "/v1/completions", "/v1/models", "/health", "/ready", "/metrics")
# Of the hashes in a log, so that nobody finds a prompt by trying some.
SALT = secrets.token_bytes(16)


def create_app(service: Service, docs: bool = False) -> ASGIApp:
    """The application.

    Args:
        service: that answers.
        docs: whether there is a page that shows and tries the routes.
    """
    app = FastAPI(
        title="MUSE",
        docs_url="/docs" if docs else None,
        openapi_url="/openapi.json" if docs else None,
        redoc_url=None,
        redirect_slashes=False,
    )

    async def refused(request: Request, error: Any) -> Response:
        return respond(error, service)

    async def unknown(request: Request, error: Any) -> Response:
        return respond(_refusal(error, request), service)

    async def gone(request: Request, error: Any) -> Response:
        service.metrics.aborted.inc()
        return Response(status_code=GONE)

    async def failed(request: Request, error: Any) -> Response:
        message = "the server could not answer this request, by a fault of its own"
        return respond(Refusal(500, message, SERVER, "internal_error"), service)

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(ClientGone, gone)
    app.add_exception_handler(Exception, failed)

    @app.post("/infer", openapi_extra=_schema(InferBody))
    async def infer(request: Request) -> Response:
        """Go on with some texts."""
        body = await _body(request, service, InferBody)
        asked = asked_to_infer(body, service.model, service.capacity)
        exchange, headers = _ask(request, service, asked, each=False)

        def made() -> object:
            return inferred(exchange.answers, exchange.cached, service.model.name, asked.prompt_tokens)

        return whole(exchange, made, headers)

    @app.post("/v1/completions", openapi_extra=_schema(CompletionBody))
    async def completions(request: Request) -> Response:
        """As OpenAI's."""
        body = await _body(request, service, CompletionBody)
        asked = asked_to_complete(body, service.model, service.capacity)
        exchange, headers = _ask(request, service, asked, each=body.stream)
        return _completion(exchange, body, asked, headers)

    @app.get("/v1/models")
    async def models() -> Response:
        """The one that there is."""
        model = {"id": service.model.name, "object": "model", "created": started, "owned_by": "muse"}
        model |= {"max_model_len": service.model.window, "fingerprint": service.model.fingerprint}
        return _json({"object": "list", "data": [model]})

    @app.get("/health")
    async def health() -> Response:
        """Whether the process and its engine are alive."""
        well = service.healthy()
        return _json({"status": "ok" if well else "failed"}, 200 if well else 503)

    @app.get("/ready")
    async def ready() -> Response:
        """Whether requests are taken."""
        refusal = service.refusal()
        return _json({"status": refusal.code if refusal else "ready"}, 503 if refusal else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    started = int(time.time())
    return Front(app, service)


def _schema(kind: type[AnyBody]) -> dict[str, Any]:
    content = {JSON: {"schema": kind.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


def _json(value: object, status: int = 200) -> Response:
    return Response(as_json(value), status, media_type=JSON)


async def _body(request: Request, service: Service, kind: type[AnyBody]) -> AnyBody:
    refusal = service.refusal()
    if refusal is not None:
        raise refusal
    raw = await read_body(request, service.limits.body, service.limits.seconds)
    return checked(kind, parsed(raw))


def _ask(request: Request, service: Service, asked: Asked, each: bool) -> tuple[Exchange, dict[str, str]]:
    """Ask the engine, and what a client is told of that by headers."""
    exchange = Exchange(service, request.scope["began"])
    stored = "no-store" not in request.headers.get("cache-control", "").lower()
    try:
        exchange.ask(asked.requests, request.scope["owner"], stored, each)
    except BaseException:
        exchange.close()
        raise
    _log(request, asked)
    headers = {"X-Cache": "HIT" if exchange.age is not None else "MISS"}
    if exchange.age is not None:
        headers["Age"] = str(int(exchange.age))
    if service.engine.state().invariant:
        headers["X-Muse-Bits"] = "invariant"
    return exchange, headers


def _log(request: Request, asked: Asked) -> None:
    if log.isEnabledFor(logging.INFO):
        ids = repr([one.ids for one in asked.requests]).encode()
        name = hashlib.blake2b(ids, key=SALT, digest_size=6).hexdigest()
        log.info(
            "%s %d answers, prompts of %d tokens, %s",
            request.url.path,
            len(asked.requests),
            asked.prompt_tokens,
            name,
        )


def _completion(exchange: Exchange, body: CompletionBody, asked: Asked, headers: dict[str, str]) -> Response:
    model, answers = exchange.service.model, exchange.answers
    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model.name,
        "system_fingerprint": model.fingerprint,
    }

    def made() -> object:
        choices = [
            choice(index, answer, answer.tokens, answer.finished, model.tokenizer)
            for index, answer in enumerate(answers)
        ]
        return {**head, "choices": choices, "usage": usage(answers, asked.prompt_tokens)}

    if not body.stream:
        return whole(exchange, made, headers)
    # Of each choice the tokens and characters that were sent, and whether its end was.
    sent, characters, ended = [0] * len(answers), [0] * len(answers), [False] * len(answers)

    def new() -> bytes:
        events = []
        for index, answer in enumerate(answers):
            # In this order: once it has finished all tokens are there.
            finished = answer.finished
            tokens = answer.tokens[sent[index] :]
            if ended[index] or not (tokens or finished):
                continue
            piece = choice(index, answer, tokens, finished, model.tokenizer, characters[index])
            sent[index] += len(tokens)
            characters[index] += len(piece["text"])
            ended[index] = finished is not None
            # A token that ends no character has nothing to show yet.
            if piece["text"] or piece["logprobs"] or finished:
                events.append(as_event({**head, "choices": [piece]}))
        return b"".join(events)

    def last() -> bytes:
        if not (body.stream_options or {}).get("include_usage"):
            return b""
        return as_event({**head, "choices": [], "usage": usage(answers, asked.prompt_tokens)})

    return stream(exchange, new, last, headers)


def _refusal(error: HTTPException, request: Request) -> Refusal:
    """Of a route or method that there is not."""
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow")
        message = f"this route has no such method; it has {allow}"
        return Refusal(405, message, INVALID, "method_not_allowed", allow=allow)
    if error.status_code == 404:
        message = f"there is no such route; there are {', '.join(ROUTES)}"
        return Refusal(404, message, INVALID, "route_not_found")
    return Refusal(error.status_code, str(error.detail), INVALID, "invalid_request")
