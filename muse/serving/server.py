"""A server of HTTP as a process: its socket, how it ends, and the line that a person sees."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import uvicorn
from starlette.types import ASGIApp

from muse.errors import ConfigError, RunError
from muse.serving.metrics import sum_of
from muse.serving.service import Service

# Seconds that connections have to end when all answers have, and a drain beyond its limit.
CLOSING = 3
# Seconds between two lines at a terminal.
LINE = 5.0


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that has its address, but is not listened to yet: connections are refused.

    Raises:
        ConfigError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"--host {host} --port {port} cannot be had: {reason}; --port 0 takes a free one"
        ) from error
    return bound


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # They are handled below: the engine is drained before connections are closed.
        yield


def run_server(app: ASGIApp, service: Service, bound: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until Ctrl-C or SIGTERM, then let what runs end within its limit.

    A second signal ends the process at once.

    Args:
        app: of ``create_app``.
        service: whose engine is drained.
        bound: of ``bound_socket``.
        ready: called when requests can come.

    Raises:
        RunError: another process has taken the address meanwhile.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=CLOSING,
    )
    asyncio.run(_serve(_Server(config), service, bound, ready))


async def _serve(
    server: uvicorn.Server, service: Service, bound: socket.socket, ready: Callable[[], None]
) -> None:
    loop, ending = asyncio.get_running_loop(), asyncio.Event()

    def end() -> None:
        if ending.is_set():
            sys.stdout.flush()
            os._exit(128 + signal.SIGINT)
        ending.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    serving = asyncio.create_task(server.serve([bound]))
    line = asyncio.create_task(_show_line(service)) if sys.stderr.isatty() else None
    while not server.started:
        await asyncio.sleep(0.01)
        if serving.done() and (error := serving.exception()) is not None:
            raise RunError(f"the server could not start: {error}") from error
    ready()
    await asyncio.wait({serving, asyncio.create_task(ending.wait())}, return_when=asyncio.FIRST_COMPLETED)
    await _drain(service)
    if line is not None:
        line.cancel()
    server.should_exit = True
    await serving


async def _drain(service: Service) -> None:
    """Let the engine end what it has; one that does not answer is left behind when its time is over."""
    loop, drained = asyncio.get_running_loop(), asyncio.Event()

    def drain() -> None:
        service.engine.drain(service.limits.drain)
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(drained.set)

    # Of a thread that the process does not wait for.
    threading.Thread(target=drain, daemon=True).start()
    with suppress(TimeoutError):
        async with asyncio.timeout(service.limits.drain + CLOSING):
            await drained.wait()
    service.over = True


async def _show_line(service: Service) -> None:
    before, shown = counts(service), time.monotonic()
    while True:
        await asyncio.sleep(LINE)
        now, moment = counts(service), time.monotonic()
        if now != before:
            print(line_of(service, before, now, moment - shown), file=sys.stderr, flush=True)
        before, shown = now, moment


def counts(service: Service) -> tuple[int, int, int]:
    """Answers, generated tokens and rejected requests so far."""
    metrics = service.metrics
    return sum_of(metrics.answers), service.engine.state().generated_tokens, sum_of(metrics.rejected)


def line_of(service: Service, before: tuple[int, int, int], now: tuple[int, int, int], seconds: float) -> str:
    """What a person at a terminal sees of some seconds.

    Args:
        service: of the server.
        before, now: of ``counts``.
        seconds: between the two.
    """
    state = service.engine.state()
    answered, made, rejected = (late - early for early, late in zip(before, now, strict=True))
    return (
        f"{answered} answers, {made / seconds:.0f} tokens/s, {rejected} rejected; "
        f"{state.running} running, {state.waiting} waiting"
    )
