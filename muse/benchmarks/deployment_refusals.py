"""Requests that a server must refuse, and how, for ``benchmark=deployment``."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from muse.benchmarks.deployment_checks import COMPLETIONS, INFER, KEY, Target, error_of, expect

JSON = {"Content-Type": "application/json"}
MIB = 2**20
# What a value must not be, and how it is sent where JSON of Python has no such thing.
SURROGATE = '"\\ud800"'


@dataclass(frozen=True)
class Case:
    """A request that is refused.

    Attributes:
        body: bytes, or what becomes JSON.
        status: of the answer.
        path: of the route.
        told: parts of the message; the field first, where one is wrong.
        method: of HTTP.
        headers: beside those of JSON.
        sent: with the answer, names and values; an empty value may be any.
    """

    body: Any
    status: int = 400
    path: str = INFER
    told: tuple[str, ...] = ()
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=dict)
    sent: Mapping[str, str] = field(default_factory=dict)


def invalid_cases(target: Target) -> list[Case]:
    """Requests of which a value is not allowed."""
    last, over = target.vocabulary - 1, target.window + 1
    fields: list[tuple[str, Any, str]] = [
        ("prompts", [], "1 to 32"),
        ("prompts", ["a"] * 33, "1 to 32"),
        ("prompts", "a", "1 to 32"),
        ("prompts", [""], "at least a word"),
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", "5", "whole number"),
        ("temperature", -0.1, "from 0"),
        ("temperature", 101, "to 100"),
        ("top_k", -1, "at least 0"),
        ("top_p", 0, "above 0"),
        ("top_p", 1.01, "at most 1"),
        ("min_p", 1, "below 1"),
        ("repetition_penalty", 0, "above 0"),
        ("seed", -1, "from 0"),
        ("stop", "", "1 to 64 characters"),
        ("stop", "x" * 65, "1 to 64 characters"),
        ("stop", ["a", "b", "c", "d", "e"], "at most 4"),
        ("logprobs", 21, "0 to 20"),
    ]
    of_completions: list[tuple[str, Any, str]] = [
        ("prompt", "", "at least a word"),
        ("prompt", [], "1 to 32"),
        ("prompt", ["a"] * 33, "1 to 32"),
        ("prompt", [last + 1], f"0 to {last}"),
        ("prompt", [-1], "token ids"),
        ("prompt", [0] * over, "window"),
        ("n", 9, "1 to 8"),
        ("n", 0, "1 to 8"),
        ("logprobs", 21, "0 to 20"),
        ("stop", ["a"] * 5, "at most 4"),
        ("stop", ["a"] * 150_000, "at most 4"),
        ("max_tokens", -1, "whole number"),
        ("suffix", "a", "null"),
        ("echo", 1, "true or false"),
    ]
    cases = [Case({"prompts": ["a"], name: value}, told=(name, allowed)) for name, value, allowed in fields]
    cases += [
        Case({"prompt": "a", name: value}, path=COMPLETIONS, told=(name, allowed))
        for name, value, allowed in of_completions
    ]
    for path, name, there in ((INFER, "prompts", ["a"]), (COMPLETIONS, "prompt", "a")):
        needed = json.dumps({name: there})[1:-1]
        half = f"[{SURROGATE}]" if isinstance(there, list) else SURROGATE
        cases += [
            Case({name: there, "max_token": 5}, path=path, told=("max_token", "max_tokens")),
            Case(f'{{"{name}": {half}}}'.encode(), path=path, told=(name, "surrogate")),
            Case(f'{{{needed}, "temperature": NaN}}'.encode(), path=path, told=("JSON",)),
            Case(f'{{{needed}, "temperature": 1e999}}'.encode(), path=path, told=("temperature",)),
            Case(f'{{{needed}, "top_p": "\xff"}}'.encode("latin-1"), path=path, told=("UTF-8",)),
            Case(b"{", path=path, told=("JSON",)),
            Case(b"", path=path, told=("JSON",)),
            Case(b"[" * 100_000, path=path, told=("nested",)),
            Case([name], path=path, told=("object",)),
            # Of two fields that together are too much, the prompt is the one that is told.
            Case({name: there, "max_tokens": over}, path=path, told=(name, "max_tokens", "window")),
        ]
    return cases


def other_cases() -> dict[int, list[Case]]:
    """Requests that are wrong in another way, by the status that says so."""
    ask, complete = {"prompts": ["a"]}, {"prompt": "a"}
    kinds = ("text/plain", "application/x-www-form-urlencoded", "")
    return {
        404: [
            Case(None, 404, "/v1/chat/completions", told=("route",)),
            Case(None, 404, "/docs", method="GET", told=("route",)),
            Case({**complete, "model": "another"}, 404, COMPLETIONS, told=("model",)),
        ],
        405: [
            Case(None, 405, path, method=method, sent={"Allow": allowed}, told=("method",))
            for path, method, allowed in (
                (INFER, "GET", "POST"),
                (COMPLETIONS, "DELETE", "POST"),
                ("/v1/models", "POST", "GET"),
            )
        ],
        413: [
            Case(b" " * (MIB + 1), 413, told=(str(MIB),)),
            Case(_pieces(2 * MIB), 413, told=(str(MIB),)),
            Case({**complete, "stop": ["a"] * 500_000}, 413, COMPLETIONS, told=(str(MIB),)),
        ],
        415: [
            *(Case(json.dumps(ask).encode(), 415, headers={"Content-Type": kind}) for kind in kinds),
            Case(json.dumps(ask).encode(), 415, headers={"Content-Encoding": "gzip"}),
        ],
    }


def key_cases() -> list[Case]:
    """Requests without a key, or with a wrong one."""
    challenge = {"WWW-Authenticate": "Bearer"}
    return [
        Case(body, 401, path, method=method, headers={"Authorization": given}, sent=challenge, told=("key",))
        for given in ("", "Bearer wrong", KEY, "Bearer")
        for path, method, body in (
            (INFER, "POST", {"prompts": ["a"]}),
            ("/metrics", "GET", None),
            ("/v1/models", "GET", None),
        )
    ]


def refused(target: Target, cases: list[Case]) -> str:
    """See that each case is refused as it says; how many there were.

    Raises:
        Failed: one is not; says which.
    """
    for case in cases:
        _see_refusal(target, case)
    # Whatever was sent, others are answered.
    expect(target.ready(), "no longer ready after what was refused")
    return f"{len(cases)} of {len(cases)}"


def _see_refusal(target: Target, case: Case) -> None:
    raw = isinstance(case.body, bytes) or hasattr(case.body, "__next__")
    content = case.body if raw else None if case.body is None else json.dumps(case.body).encode()
    headers = {**(JSON if content is not None else {}), **case.headers}
    response = target.client.request(case.method, case.path, content=content, headers=headers)
    sent = f"{case.method} {case.path} {_shown(case.body)}"
    expect(response.status_code == case.status, f"{sent}: status {response.status_code}, not {case.status}")
    error = error_of(response.content, sent)
    for part in case.told:
        expect(part in error["message"], f"{sent}: {part!r} is not in {error['message']!r}")
    if case.status == 400 and isinstance(case.body, dict):
        named = str(error["param"]).partition("[")[0]
        expect(named == case.told[0], f"{sent}: the field told is {named}, not {case.told[0]}")
    for name, value in case.sent.items():
        given = response.headers.get(name)
        expect(given is not None and value in ("", given), f"{sent}: {name} is {given}, not {value}")


def body_that_never_comes(target: Target) -> str:
    """Say that a body will come, send none, and see that the server does not wait for it for ever.

    Raises:
        Failed: it does, or says something else.
    """
    url = target.client.base_url
    head = f"POST {INFER} HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((url.host, url.port or 80), target.patience) as connection:
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n".encode())
        answer = connection.recv(2**16).decode("latin-1")
    status = answer.partition("\r\n")[0]
    expect(" 408 " in f"{status} ", f"the answer is {status or 'nothing'}, not 408")
    return "408"


def _shown(body: Any) -> str:
    text = body.decode("latin-1") if isinstance(body, bytes) else json.dumps(body, default=lambda _: "pieces")
    return text if len(text) <= 60 else f"{text[:60]}..."


def _pieces(size: int) -> Iterator[bytes]:
    """A body whose length is not told before."""
    for _ in range(size // 2**16):
        yield b" " * 2**16
