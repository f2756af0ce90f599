"""Serve a trained model over HTTP, in its own form and in OpenAI's.

python -m muse.serve outputs/train/stage1-tiny/2026-01-31_12-00-00-123
python -m muse.serve stage1.safetensors --port 9000 --slots 16
MUSE_API_KEY=secret python -m muse.serve stage2.safetensors --host 0.0.0.0
"""

from __future__ import annotations

import argparse
import importlib
import ipaddress
import logging
import os
from collections.abc import Iterable

from muse.commands import Parser, add_model, device_of, run_command
from muse.errors import ConfigError
from muse.trained import load

PACKAGES = ("fastapi", "uvicorn", "pydantic", "prometheus_client", "cachetools")
# The keys of clients, with commas between them.
KEY = "MUSE_API_KEY"
SIZES = (
    ("--port", int, 8000, 0, 65535, "to listen at; 0 takes a free one"),
    ("--slots", int, 32, 1, 1024, "requests decoded at a time"),
    ("--queue", int, 256, 1, 100_000, "requests that may wait; more are refused"),
    ("--speculate", int, 3, 0, 1023, "tokens of greedy texts that a step guesses, while few run; 0 for none"),
    ("--time-limit", float, 30.0, 0.001, 86_400, "seconds of a request"),
    ("--drain", float, 10.0, 0, 86_400, "seconds in which requests end when the server does"),
    ("--cache-mb", int, 64, 0, 1_000_000, "memory for answers that are given again; 0 for none"),
)


def main() -> None:
    """The command."""
    parser = Parser("muse.serve", __doc__)
    add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    for name, kind, default, _, _, meaning in SIZES:
        parser.add_argument(name, type=kind, default=default, help=f"{meaning} ({default:g})")
    parser.add_argument("--name", help="of the model, for clients (of its stage and size)")
    parser.add_argument("--docs", action="store_true", help="a page at /docs that shows and tries the routes")
    parser.add_argument("--log", action="store_true", help="a line a request: tokens and hash of its prompt")
    run_command(lambda: serve(parser.parse_args()))


def serve(arguments: argparse.Namespace) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        ConfigError: an argument is not allowed, the model cannot be used, or a package is missing.
        RunError: the model is damaged.
    """
    for option, _, _, least, most, _ in SIZES:
        given = getattr(arguments, option[2:].replace("-", "_"))
        if not least <= given <= most:
            raise ConfigError(f"{option} {given:g} is not allowed; it must be between {least:g} and {most:g}")
    keys = [key.strip() for key in os.environ.get(KEY, "").split(",") if key.strip()]
    if not keys and not is_loopback(arguments.host):
        raise ConfigError(
            f"--host {arguments.host} lets other machines ask, for which {KEY} must hold a key that they "
            "send; --host 127.0.0.1 needs none"
        )
    require("muse.serve", PACKAGES)
    from muse.serving.app import create_app
    from muse.serving.engine import Engine
    from muse.serving.served import served
    from muse.serving.server import bound_socket, run_server
    from muse.serving.service import Limits, Service

    limits = Limits(
        arguments.slots,
        arguments.queue,
        arguments.time_limit,
        arguments.drain,
        arguments.cache_mb * 2**20,
    )
    if arguments.log:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("muse.serving").setLevel(logging.INFO)
    # Before the model, which may take long: nobody connects before there is somebody who answers.
    with bound_socket(arguments.host, arguments.port) as bound:
        trained = load(arguments.model, arguments.which, device_of(arguments.device))
        model = served(trained, arguments.name)
        engine = Engine(trained, limits.slots, limits.queue, arguments.speculate)
        engine.start()
        service = Service(engine, model, limits, keys)
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        address = f"http://{host}:{bound.getsockname()[1]}"
        bits = "invariant" if engine.state().invariant else "not invariant"
        line = f"{model.name} is served at {address}; Ctrl-C ends it; bits are {bits}, {limits.slots} slots"
        run_server(create_app(service, arguments.docs), service, bound, lambda: print(line, flush=True))


def require(who: str, packages: Iterable[str]) -> None:
    """See that packages of the extra ``serve`` are there.

    Raises:
        ConfigError: one is not; names who needs it.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(
                f'{who} needs the package {package}; pip install -e ".[serve]" installs it'
            ) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    main()
