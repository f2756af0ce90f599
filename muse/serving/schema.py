"""What clients may send, checked in one place: JSON, then its fields, then its tokens against the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from muse.errors import ConfigError
from muse.generation import Sampling
from muse.options import nearest
from muse.serving.refusals import INVALID, Refusal, invalid
from muse.serving.requests import Request
from muse.serving.served import Served

PROMPTS, CHOICES, LOGPROBS, STOPS, STOP_CHARACTERS = 32, 8, 20, 4, 64
# Of OpenAI, where a request does not say how many tokens it wants.
TOKENS = 16
# A double holds every whole number up to here, and clients in JavaScript have no others.
SEED = 2**53
DEFAULTS = Sampling()
# Of JSON, where a text may have what is no text.
SURROGATE = "surrogate"
# Errors that explain others: a wrong name that another one is missing, half a pair that no type fits.
TELLING = ("extra_forbidden", SURROGATE)


def _characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError(SURROGATE, "half a surrogate pair") from error
    return text


Text = Annotated[str, AfterValidator(_characters)]
Stop = Annotated[Text, Field(min_length=1, max_length=STOP_CHARACTERS)]
Id = Annotated[int, Field(ge=0)]
Ids = Annotated[list[Id], Field(fail_fast=True, min_length=1)]
Texts = Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=PROMPTS)]


def zero(what: str) -> Any:
    """A field that clients send, and that nothing is made of."""
    return Field(default=0, ge=0, le=0, description=f"0, as there is no {what} here")


class Body(BaseModel):
    """What both ways to ask have; a description says which values a field may have."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    max_tokens: int | None = Field(
        None, ge=0, description="a whole number, which with the prompt fits the model's window"
    )
    temperature: float = Field(1.0, ge=0, le=100, description="a number from 0 (the likeliest token) to 100")
    top_k: int = Field(0, ge=0, le=SEED, description="a whole number, at least 0 (all tokens)")
    top_p: float = Field(1.0, gt=0, le=1, description="a number above 0 and at most 1 (all tokens)")
    min_p: float = Field(0.0, ge=0, lt=1, description="a number, at least 0 (all tokens) and below 1")
    repetition_penalty: float = Field(
        1.0, gt=0, le=100, description="a number above 0, at most 100; 1 is none"
    )
    seed: int | None = Field(None, ge=0, le=SEED, description="a whole number from 0 to 2^53, or null")
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=STOPS)] | None = Field(
        None,
        description=f"a text of 1 to {STOP_CHARACTERS} characters, a list of at most {STOPS}, or null",
    )
    logprobs: int | None = Field(
        None, ge=0, le=LOGPROBS, description=f"a whole number from 0 to {LOGPROBS}, or null"
    )


class InferBody(Body):
    """Of ``POST /infer``."""

    prompts: Texts = Field(description=f"a list of 1 to {PROMPTS} texts")
    max_tokens: int | None = Field(
        None, ge=1, description="a whole number, at least 1, which with the prompt fits the model's window"
    )
    temperature: float = Field(
        DEFAULTS.temperature, ge=0, le=100, description="a number from 0 (the likeliest token) to 100"
    )
    top_k: int = Field(DEFAULTS.top_k, ge=0, le=SEED, description="a whole number, at least 0 (all tokens)")


class CompletionBody(Body):
    """Of ``POST /v1/completions``, as OpenAI's; what is not supported may be sent with the value for none."""

    model: Text | None = Field(None, description="the name of the model, as /v1/models tells it")
    prompt: (
        Text | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=PROMPTS)]
    ) = Field(description=f"a text, token ids, or a list of 1 to {PROMPTS} of either")
    n: int = Field(1, ge=1, le=CHOICES, description=f"a whole number from 1 to {CHOICES}")
    best_of: int | None = Field(None, ge=1, le=CHOICES, description="n, or null")
    echo: bool = Field(False, description="true or false")
    stream: bool = Field(False, description="true or false")
    stream_options: dict[Literal["include_usage"], bool] | None = Field(
        None, description='{"include_usage": true or false}, or null'
    )
    frequency_penalty: float = zero("frequency penalty")
    presence_penalty: float = zero("presence penalty")
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(
        None, description="null, as there are no biases here"
    )
    suffix: None = Field(None, description="null, as nothing is inserted here")
    user: Text | None = Field(None, max_length=256, description="a text, which is not kept, or null")


AnyBody = TypeVar("AnyBody", bound=Body)


@dataclass(frozen=True)
class Asked:
    """What a body asks of the engine: for each prompt its choices, one after the other."""

    requests: tuple[Request, ...]
    prompt_tokens: int


def parsed(raw: bytes) -> Any:
    """A body as JSON.

    Raises:
        Refusal: it is none; NaN and infinities are none, either.
    """

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number in JSON")

    try:
        return json.loads(raw.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise invalid(None, "the body is not UTF-8", "invalid_json") from error
    except RecursionError as error:
        raise invalid(None, "the body is nested too deeply", "invalid_json") from error
    except ValueError as error:
        raise invalid(None, f"the body is not JSON: {error}", "invalid_json") from error


def checked(kind: type[AnyBody], value: Any) -> AnyBody:
    """The fields of a body.

    Raises:
        Refusal: one is unknown, missing or has a value that is not allowed; it names the field.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
        raise _refusal(kind, min(errors, key=lambda own: own["type"] not in TELLING)) from error


def _refusal(kind: type[Body], error: Any) -> Refusal:
    if not error["loc"]:
        return invalid(None, 'the body must be an object, as in {"max_tokens": 16}', "invalid_json")
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden" and name not in kind.model_fields:
        name = "".join(c if c.isprintable() else "?" for c in name[:40])
        known = nearest(name, kind.model_fields)[:1] or [", ".join(sorted(kind.model_fields))]
        return invalid(name, f"there is no field {name!r}; the nearest is {known[0]}", "unknown_field")
    allowed = kind.model_fields[name].description
    if error["type"] == "missing":
        return invalid(name, f"{name} is missing; it must be {allowed}", "missing_field")
    if error["type"] == SURROGATE:
        return invalid(name, f"{name} holds half a surrogate pair, which is no character")
    # A number says what was wrong, and a text would be a prompt in somebody's log.
    given = error["input"] if len(error["loc"]) == 1 else None
    shown = f"={json.dumps(given)[:24]}" if isinstance(given, int | float) else ""
    return invalid(name, f"{name}{shown} is not allowed; it must be {allowed}")


def asked_to_infer(body: InferBody, model: Served, capacity: int) -> Asked:
    """What ``POST /infer`` asks of the engine; ``capacity`` requests are the most that it can take.

    Raises:
        Refusal: a prompt is empty, or does not fit.
    """
    return _asked(body, "prompts", body.prompts, 1, False, model, capacity)


def asked_to_complete(body: CompletionBody, model: Served, capacity: int) -> Asked:
    """What ``POST /v1/completions`` asks of the engine; ``capacity`` requests are the most that it can take.

    Raises:
        Refusal: there is no such model, a prompt is empty, does not fit or has an id that is no token.
    """
    if body.model not in (None, model.name):
        message = f"there is no such model; this server has {model.name}"
        raise Refusal(404, message, INVALID, "model_not_found", "model")
    if body.best_of not in (None, body.n):
        raise invalid(
            "best_of", f"best_of={body.best_of} is not allowed; it must be equal to n={body.n}, or null"
        )
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "stream_options are of a stream; ask for one with stream=true")
    prompts: Sequence[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if isinstance(prompts[0], int):
        prompts = [prompts]
    return _asked(body, "prompt", prompts, body.n, body.echo, model, capacity)


def _asked(
    body: Body,
    field: str,
    prompts: Sequence[str | list[int]],
    n: int,
    echo: bool,
    model: Served,
    capacity: int,
) -> Asked:
    if len(prompts) * n > capacity:
        message = f"{len(prompts) * n} answers are more than this server takes at once, which is {capacity}"
        raise invalid(field, message)
    sampling, stops = _sampling(body), _stops(body)
    requests, read = [], 0
    for number, prompt in enumerate(prompts):
        name = f"{field}[{number}]" if len(prompts) > 1 or field == "prompts" else field
        ids = tuple(_ids(prompt, name, model))
        read += len(ids)
        tokens = _tokens(body.max_tokens, ids, name, model)
        for choice in range(n):
            # The likeliest tokens need no seed, and equal requests are equal without.
            seed = body.seed + choice if body.seed is not None and sampling.temperature > 0 else None
            requests.append(Request(ids, tokens, sampling, seed, stops, body.logprobs, echo))
    return Asked(tuple(requests), read)


def _sampling(body: Body) -> Sampling:
    if body.temperature == 0:
        return Sampling(0.0, 0, 1.0, 0.0, body.repetition_penalty)
    try:
        return Sampling(body.temperature, body.top_k, body.top_p, body.min_p, body.repetition_penalty)
    except ConfigError as error:
        raise invalid(None, str(error)) from error


def _stops(body: Body) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def _ids(prompt: str | list[int], name: str, model: Served) -> list[int]:
    if isinstance(prompt, list):
        if max(prompt) >= model.vocabulary:
            message = f"{name} has the id {max(prompt)}; ids are from 0 to {model.vocabulary - 1}"
            raise invalid(name, message)
        return prompt
    # Tokenising what cannot fit would take the longer the less it fits.
    if model.longest is not None and len(prompt) > model.window * model.longest:
        raise _too_long(name, f"more than {model.window}", model)
    ids = model.tokenizer.encode(prompt)
    if not ids:
        raise invalid(name, f"{name} has no token in it; it must be at least a word")
    return ids


def _tokens(given: int | None, ids: Sequence[int], name: str, model: Served) -> int:
    left = model.window - len(ids)
    if given is None:
        given = max(1, min(TOKENS, left))
    if given > left:
        raise _too_long(name, f"{len(ids)} + {given}", model)
    return given


def _too_long(name: str, tokens: str, model: Served) -> Refusal:
    message = f"{name} and max_tokens are {tokens} tokens, and the model's window is {model.window}"
    return invalid(name, message, "context_length_exceeded")
