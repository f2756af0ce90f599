"""Answers in the forms that clients read: that of ``/infer``, and OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from muse.data import Tokenizer
from muse.files import finite
from muse.serving.answers import Answer
from muse.serving.requests import Finished, Token

# Line ends of Unicode, which many clients take for ends of an event's line; JSON escapes the others.
LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def as_json(value: Any) -> bytes:
    """UTF-8 in one line; a log-probability of minus infinity is null, since JSON has none."""
    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(LINE_ENDS).encode()


def as_event(value: Any) -> bytes:
    """An event of a stream."""
    return b"data: " + as_json(value) + b"\n\n"


END_OF_STREAM = b"data: [DONE]\n\n"


def text_of(tokens: Sequence[Token], finished: Finished | None) -> str:
    """The text of tokens, and what was held back if they are the last."""
    return "".join(token.text for token in tokens) + (finished.text if finished is not None else "")


def usage(answers: Sequence[Answer], prompt_tokens: int) -> dict[str, int]:
    """How many tokens were read and made."""
    made = sum(not token.echoed for answer in answers for token in answer.tokens)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": made,
        "total_tokens": prompt_tokens + made,
    }


def inferred(
    answers: Sequence[Answer], cached: Sequence[bool], name: str, prompt_tokens: int
) -> dict[str, Any]:
    """What ``/infer`` answers; times are those of the slowest prompt, and 0 for a stored answer.

    Args:
        answers: that are over.
        cached: whether each was stored.
        name: of the model.
        prompt_tokens: read.
    """
    results = []
    for answer, stored in zip(answers, cached, strict=True):
        assert answer.finished is not None
        result: dict[str, Any] = {
            "text": text_of(answer.tokens, answer.finished),
            "tokens": [token.id for token in answer.tokens],
            "finish_reason": answer.finished.reason,
            "cached": stored,
        }
        if answer.request.logprobs is not None:
            result["logprobs"] = [token.logprob for token in answer.tokens]
            result["top_logprobs"] = [
                [{"token": index, "logprob": logprob} for index, logprob in token.likeliest]
                for token in answer.tokens
            ]
        results.append(result)
    worked = [a.finished for a, stored in zip(answers, cached, strict=True) if a.finished and not stored]
    timing = {
        phase: round(1000 * max((getattr(finished, phase) for finished in worked), default=0.0), 3)
        for phase in ("queue", "prefill", "decode")
    }
    return {"model": name, "results": results, "usage": usage(answers, prompt_tokens), "timing_ms": timing}


def token_name(tokenizer: Tokenizer, index: int) -> str:
    """A token as OpenAI shows it: its text, or its bytes where they are no characters."""
    raw = tokenizer.bytes_of(index)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def logprobs_of(tokens: Sequence[Token], tokenizer: Tokenizer, offset: int) -> dict[str, Any]:
    """OpenAI's ``logprobs`` of a choice.

    Args:
        tokens: of the choice, or some that follow others.
        tokenizer: of the model.
        offset: characters before the first of them.
    """
    offsets: list[int] = []
    likeliest: list[dict[str, float] | None] = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
        if token.logprob is None:
            likeliest.append(None)
            continue
        # The token itself is always among them; of two with one name the likelier one.
        shown: dict[str, float] = {}
        for index, logprob in (*token.likeliest, (token.id, token.logprob)):
            shown.setdefault(token_name(tokenizer, index), logprob)
        likeliest.append(shown)
    return {
        "tokens": [token_name(tokenizer, token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": likeliest,
        "text_offset": offsets,
    }


def choice(
    index: int,
    answer: Answer,
    tokens: Sequence[Token],
    finished: Finished | None,
    tokenizer: Tokenizer,
    offset: int = 0,
) -> dict[str, Any]:
    """A choice of OpenAI's completions, or what is new of it.

    Args:
        index: of the choice.
        answer: that it is of.
        tokens: all of them, or the new ones.
        finished: where they are the last.
        tokenizer: of the model.
        offset: characters before them.
    """
    logprobs = logprobs_of(tokens, tokenizer, offset) if answer.request.logprobs is not None else None
    reason = finished.reason if finished is not None else None
    return {"index": index, "text": text_of(tokens, finished), "logprobs": logprobs, "finish_reason": reason}
