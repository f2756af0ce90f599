"""What a server answers to requests that are well: that of the model, in any company and after a restart."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families

from muse.data import Tokenizer
from muse.generate import generate_text
from muse.generation import Sampling
from muse.generation.decoder import Decoder
from muse.trained import Trained

INFER, COMPLETIONS = "/infer", "/v1/completions"
# Of clients of a server that wants one.
KEY = "a-key-of-the-deployment-check"
# Seconds after which something hangs rather than works, on any machine and beside any load.
PATIENCE = 300.0
# Tokens of an answer, at most, and likeliest ones told beside each.
TOKENS, LIKELIEST = 32, 3
# Beside others at a time.
CLIENTS = 32
# Between the logits of two tokens of which each may be the likeliest, where arithmetic differs.
TIE = {"cpu": 1e-4, "cuda": 1e-2}
# Seconds between two looks at a server.
LOOK = 0.05
# What an error says, as OpenAI's.
FORM = {"message", "type", "param", "code"}


class Failed(Exception):
    """A check found something else than it must; says what."""


def expect(holds: object, otherwise: str) -> None:
    """Raise Failed, which says ``otherwise``, unless something holds."""
    if not holds:
        raise Failed(otherwise)


@dataclass(frozen=True)
class Target:
    """A server that is asked.

    Attributes:
        client: of its address.
        tokenizer: of its model.
        vocabulary, window: of its model.
        patience: seconds after which it hangs.
    """

    client: httpx.Client
    tokenizer: Tokenizer
    vocabulary: int
    window: int
    patience: float = PATIENCE

    def ready(self) -> bool:
        """Whether it takes requests."""
        return self.client.get("/ready").status_code == 200

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over all its labels but those given."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def until(self, happens: Callable[[], bool], otherwise: str) -> None:
        """Wait until something happens.

        Raises:
            Failed: it does not.
        """
        deadline = time.monotonic() + self.patience
        while not happens():
            expect(time.monotonic() < deadline, f"{otherwise} after {self.patience:g} s")
            time.sleep(LOOK)


def client_of(address: str, key: str = "") -> httpx.Client:
    """A client of a server that knows no proxy."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=CLIENTS)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=address, timeout=PATIENCE, limits=limits, headers=headers, trust_env=False)


def questions(target: Target, count: int, greedy: bool = False) -> list[dict[str, Any]]:
    """Bodies for ``/infer``: texts of different lengths, half of them greedy and half drawn by a seed."""
    generator = torch.Generator().manual_seed(0)
    longest = max(1, target.window // 2)
    texts: list[str] = []
    for number in range(100 * count):
        length = 1 + number % longest
        ids = torch.randint(target.vocabulary, (length,), generator=generator).tolist()
        text = target.tokenizer.decode(ids)
        if 0 < len(target.tokenizer.encode(text)) <= longest:
            texts.append(text)
        if len(texts) == count:
            break
    expect(texts, "no text is as short as half a window")
    bodies = []
    for number, text in zip(range(count), itertools.cycle(texts), strict=False):
        tokens = min(TOKENS, target.window - len(target.tokenizer.encode(text)))
        drawn = {} if greedy or number % 2 else {"temperature": 1.0, "seed": number, "top_k": 20}
        asked = {"prompts": [text], "max_tokens": tokens, "temperature": 0, "logprobs": LIKELIEST}
        bodies.append({**asked, **drawn})
    return bodies


def ask(target: Target, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to one prompt: text, ids, log-probabilities and why it ended.

    Raises:
        Failed: there is none.
    """
    response = target.client.post(INFER, json=body)
    expect(response.status_code == 200, f"status {response.status_code}: {response.text[:200]}")
    (result,) = response.json()["results"]
    expect(len(result["tokens"]) == len(result["logprobs"]), "not every token has a log-probability")
    del result["cached"]
    return dict(result)


def error_of(content: bytes, sent: str) -> dict[str, Any]:
    """The error in an answer, of OpenAI's form.

    Raises:
        Failed: there is none.
    """
    try:
        error = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        error = None
    if not isinstance(error, dict) or set(error) != FORM:
        raise Failed(f"{sent}: the answer is no error of OpenAI's form")
    return error


def first_answer(address: str, ended: threading.Event) -> tuple[int, int | None]:
    """Ask a server that starts until it answers.

    Returns:
        How often it took no connection, and the status of ``/ready`` when it first did.
    """
    refused = 0
    while not ended.is_set():
        try:
            return refused, httpx.get(f"{address}/ready", trust_env=False, timeout=PATIENCE).status_code
        except httpx.ConnectError:
            refused += 1
            time.sleep(LOOK)
    return refused, None


def ready_after_test(target: Target, refused: int, status: int | None) -> str:
    """See that a server took no connection until it was ready, and that its bits are invariant.

    Args:
        target: the server.
        refused, status: of ``first_answer``.

    Raises:
        Failed: it is not so.
    """
    expect(refused > 0, "it took a connection at once")
    expect(status == 200, f"its first answer was {status}")
    expect(target.client.get("/health").status_code == 200, "it is not well")
    response = target.client.post(INFER, json=questions(target, 1)[0])
    bits = response.headers.get("X-Muse-Bits")
    expect(bits == "invariant", "its test of itself found that bits depend on the company")
    return f"{refused} connections refused, then ready"


def same_model(target: Target, fingerprint: str) -> str:
    """See that a server has the weights, tokenizer, versions, device and precision that are here.

    Raises:
        Failed: it has others.
    """
    (model,) = target.client.get("/v1/models").json()["data"]
    window, told = model["max_model_len"], model["fingerprint"]
    expect(window == target.window, f"its window is {window}, not {target.window}")
    expect(told == fingerprint, f"its fingerprint is {told}, and here {fingerprint}")
    return str(told)


def greedy_as_offline(target: Target, trained: Trained, count: int = 8) -> str:
    """See that greedy answers are those of ``muse.generate``.

    Where the offline model's logits of two tokens are equal but for rounding, either may be taken.

    Raises:
        Failed: a token is another one, or a text.
    """
    tie = TIE[next(trained.model.parameters()).device.type]
    tokens = ties = 0
    for body in questions(target, count, greedy=True):
        told, text = ask(target, body), body["prompts"][0]
        decoder, new, tied = Decoder(trained.model, target.window), target.tokenizer.encode(text), 0
        for place, token in enumerate(told["tokens"]):
            logits = decoder.read(new)
            likeliest, new = int(logits.argmax()), [token]
            gap = (logits[likeliest] - logits[token]).item()
            expect(
                gap <= tie,
                f"token {place} of an answer is {token} and the model's {likeliest}, whose logit is larger "
                f"by {gap:.2g}",
            )
            tied += token != likeliest
        offline = "".join(generate_text(trained, text, body["max_tokens"], Sampling(temperature=0)))
        expect(tied or told["text"] == offline, "equal tokens are another text")
        expect(len(told["tokens"]) == body["max_tokens"], "an answer is shorter than was asked for")
        tokens, ties = tokens + len(told["tokens"]), ties + tied
    return f"{tokens} tokens" + (f", {ties} of them as likely" if ties else "")


def same_in_company(target: Target, bodies: Sequence[dict[str, Any]]) -> str:
    """See that answers beside others are those alone, to the last bit of every log-probability.

    Raises:
        Failed: one is not, or they were never decoded together.
    """
    alone = [ask(target, body) for body in bodies]
    before = target.metric("muse_rows_total"), target.metric("muse_steps_total")
    numbers = list(range(len(bodies)))
    # Another order of arrival is another slot.
    for order in (numbers, numbers[::-1]):
        together = asked_together(target, [bodies[number] for number in order])
        for number, answer in zip(order, together, strict=True):
            expect(
                answer == alone[number],
                f"the answer to prompt {number} differs {difference(answer, alone[number])}",
            )
    rows, steps = target.metric("muse_rows_total"), target.metric("muse_steps_total")
    company = (rows - before[0]) / max(1.0, steps - before[1])
    expect(company > 1, "the requests were never decoded together")
    return f"{2 * len(bodies)} equal, {company:.1f} rows in a step"


def asked_together(target: Target, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers to requests that are sent at one time."""
    barrier = threading.Barrier(len(bodies))

    def wait_and_ask(body: dict[str, Any]) -> dict[str, Any]:
        barrier.wait(target.patience)
        return ask(target, body)

    with ThreadPoolExecutor(len(bodies)) as threads:
        return list(threads.map(wait_and_ask, bodies))


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """In what two answers differ."""
    return "in " + ", ".join(key for key in one if one[key] != other.get(key))


def same_as_before(target: Target, bodies: Sequence[dict[str, Any]], before: Sequence[Any]) -> str:
    """See that a server gives the answers that another one gave, to the last bit.

    Raises:
        Failed: it gives others.
    """
    for number, (body, answer) in enumerate(zip(bodies, before, strict=True)):
        told = ask(target, body)
        expect(told == answer, f"the answer to prompt {number} differs {difference(told, answer)}")
    return f"{len(before)} equal"
