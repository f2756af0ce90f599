"""What is answered, in both forms, whole and as a stream; and to the clients that people have."""

from __future__ import annotations

import asyncio
import json
import math

import pytest
from support.serving import Client, FakeEngine, events_of, until

from muse.generation import Sampling
from muse.serving import transport
from muse.serving.answers import Answer
from muse.serving.formats import as_json
from muse.serving.requests import Finished, Request, Token
from muse.serving.service import Exchange

INFER, COMPLETIONS = "/infer", "/v1/completions"
EVEN = Sampling(1.0, 0)
# In UTF-8 of two and of three bytes.
LETTERS = "Grüße, 你好"


def asked_of(there, wait, path, **body):
    response = wait(there.post(path, body))
    assert response.status_code == 200, response.text
    return json.loads(response.content, parse_constant=pytest.fail)


def test_infer_answers_each_prompt_in_order(server, wait, model):
    there = server()
    told = asked_of(there, wait, INFER, prompts=["Line 7", "says"], max_tokens=5, seed=3)
    assert set(told) == {"model", "results", "usage", "timing_ms"}
    assert set(told["timing_ms"]) == {"queue", "prefill", "decode"}
    assert told["model"] == "small"
    prompts = [tuple(model.tokenizer.encode(text)) for text in ("Line 7", "says")]
    assert [request.ids for request in there.engine.asked] == prompts
    for request, result in zip(there.engine.asked, told["results"], strict=True):
        assert set(result) == {"text", "tokens", "finish_reason", "cached"}
        assert result["tokens"] == list(FakeEngine(model.tokenizer).by_arithmetic(request))
        assert result["text"] == model.tokenizer.decode(result["tokens"])
        assert (result["finish_reason"], result["cached"]) == ("length", False)
    read = sum(map(len, prompts))
    assert told["usage"] == {"prompt_tokens": read, "completion_tokens": 10, "total_tokens": read + 10}


@pytest.mark.parametrize(
    ("path", "body", "wanted"),
    [
        (INFER, {}, Request((5,), 16, Sampling())),
        (COMPLETIONS, {}, Request((5,), 16, EVEN)),
        (
            COMPLETIONS,
            {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 2, "seed": 8},
            Request((5,), 16, Sampling(0.5, 3, 0.9, 0.1, 2.0), 8),
        ),
        # What draws nothing has nothing to draw by.
        (
            COMPLETIONS,
            {"temperature": 0, "top_k": 3, "top_p": 0.9, "seed": 8, "repetition_penalty": 2},
            Request((5,), 16, Sampling(0.0, 0, 1.0, 0.0, 2.0)),
        ),
        (
            COMPLETIONS,
            {"max_tokens": 3, "stop": "x", "logprobs": 0, "echo": True},
            Request((5,), 3, EVEN, None, ("x",), 0, True),
        ),
        (COMPLETIONS, {"stop": ["x", "yz"], "max_tokens": 63}, Request((5,), 63, EVEN, None, ("x", "yz"))),
        (
            COMPLETIONS,
            {"stop": [], "best_of": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {},
             "suffix": None, "user": "a", "model": "small", "stream": False, "stream_options": None},
            Request((5,), 16, EVEN),
        ),
    ],
)  # fmt: skip
def test_every_parameter_reaches_the_engine(server, wait, model, path, body, wanted):
    there = server()
    prompt = {"prompts": [model.tokenizer.decode([5])]} if path == INFER else {"prompt": [5]}
    asked_of(there, wait, path, **prompt, **body)
    assert there.engine.asked == [wanted]


def test_a_prompt_may_be_text_ids_or_lists_of_them(server, wait, model):
    ids = model.tokenizer.encode("Line 7")
    for prompt, count in (("Line 7", 1), (["Line 7", "Line 7"], 2), (ids, 1), ([ids, ids], 2)):
        there = server()
        told = asked_of(there, wait, COMPLETIONS, prompt=prompt, max_tokens=2)
        assert [request.ids for request in there.engine.asked] == [tuple(ids)] * count
        assert [choice["index"] for choice in told["choices"]] == list(range(count))


def test_choices_have_seeds_one_after_the_other_whatever_stands_beside_them(server, wait):
    there = server(slots=8)
    alone = asked_of(there, wait, COMPLETIONS, prompt="Line", n=2, seed=5)["choices"]
    among = asked_of(there, wait, COMPLETIONS, prompt=["says", "Line"], n=2, seed=5)["choices"]
    assert [request.seed for request in there.engine.asked] == [5, 6, 5, 6]
    assert [choice["text"] for choice in among[2:]] == [choice["text"] for choice in alone]
    assert alone[0]["text"] != alone[1]["text"]


def test_a_seed_holds_beside_an_unseeded_neighbour(server, wait):
    async def ask(there, *bodies):
        there.engine.hold()
        asked = [asyncio.create_task(there.post(COMPLETIONS, {"prompt": "Line", **body})) for body in bodies]
        await until(lambda: len(there.engine.work) == len(bodies))
        there.engine.go()
        return [response.json()["choices"][0]["text"] for response in await asyncio.gather(*asked)]

    there = server()
    (alone,) = wait(ask(there, {"seed": 5}))
    other, beside, another = wait(ask(server(), {}, {"seed": 5}, {}))
    assert beside == alone
    assert other != another


def test_log_probabilities_are_as_openai_tells_them(server, wait, model):
    there = server()
    told = asked_of(there, wait, COMPLETIONS, prompt=[40, 41], max_tokens=2, logprobs=2, echo=True)
    (choice,) = told["choices"]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert logprobs["top_logprobs"][0] is None
    # Minus infinity is no number in JSON.
    assert list(logprobs["top_logprobs"][1].values()) == [-0.5, None]
    assert logprobs["text_offset"] == [0, 1, 2, 3]


def test_what_the_harness_asks_is_answered(server, wait):
    """lm-evaluation-harness, local-completions: the log-probabilities of prompts as ids, in batches."""
    there = server()
    prompts = [[40, 41, 42], [43, 44]]
    body = {
        "model": "small",
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
    }
    told = asked_of(there, wait, COMPLETIONS, **body, echo=True)
    for choice, prompt in zip(told["choices"], prompts, strict=True):
        scored = choice["logprobs"]["token_logprobs"][1:-1]
        likeliest = choice["logprobs"]["top_logprobs"][1:-1]
        assert len(scored) == len(prompt) - 1
        assert all(own == max(top.values()) for own, top in zip(scored, likeliest, strict=True))
    told = asked_of(there, wait, COMPLETIONS, **{**body, "max_tokens": 0}, echo=True)
    assert [len(choice["logprobs"]["tokens"]) for choice in told["choices"]] == [3, 2]
    assert told["usage"]["completion_tokens"] == 0
    # A prompt that fills the window is scored, too.
    asked_of(there, wait, COMPLETIONS, prompt=[40] * 64, max_tokens=0, echo=True)


@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_stream_has_what_a_whole_answer_has(server, wait, model, logprobs):
    body = {
        "prompt": ["Line", "says"], "n": 2, "max_tokens": 9, "seed": 2, "echo": True, "logprobs": logprobs,
        "stop": "q", "stream_options": {"include_usage": True},
    }  # fmt: skip
    there = server(slots=8)
    *chunks, last = events_of(wait(there.post(COMPLETIONS, {**body, "stream": True})).text)
    del body["stream_options"]
    # From another server, whose answers are not stored.
    whole = asked_of(server(slots=8), wait, COMPLETIONS, **body)
    assert last["usage"] == whole["usage"]
    assert last["choices"] == []
    for choice in whole["choices"]:
        pieces = [one["choices"][0] for one in chunks if one["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [piece["finish_reason"] for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1]["finish_reason"] == choice["finish_reason"]
        if logprobs is not None:
            for name, value in choice["logprobs"].items():
                assert [part for piece in pieces for part in piece["logprobs"][name]] == value


def test_a_character_split_between_tokens_is_sent_whole(server, wait, model):
    ids = model.tokenizer.encode(LETTERS)
    assert len(ids) > len(LETTERS)
    there = server(script=lambda request: ids)
    text = wait(there.post(COMPLETIONS, {"prompt": "Line", "max_tokens": 30, "stream": True})).text
    pieces = [event["choices"][0]["text"] for event in events_of(text)]
    assert "".join(pieces) == LETTERS
    assert "\ufffd" not in text
    told = asked_of(there, wait, COMPLETIONS, prompt="Line", max_tokens=30, logprobs=1)
    names = told["choices"][0]["logprobs"]["tokens"]
    assert "bytes:\\xc3" in names
    # What has no text yet has a log-probability.
    body = {"prompt": "Line", "max_tokens": 30, "logprobs": 1, "stream": True}
    pieces = [event["choices"][0] for event in events_of(wait(there.post(COMPLETIONS, body)).text)]
    assert [name for piece in pieces for name in piece["logprobs"]["tokens"]] == names


def test_a_stop_across_tokens_ends_the_text_and_is_not_in_it(server, wait, model):
    ids = model.tokenizer.encode("one two three")
    there = server(script=lambda request: ids)
    body = {"prompt": "Line", "max_tokens": 30, "stop": ["wo th", "zzz"]}
    for stream in (False, True):
        response = wait(there.post(COMPLETIONS, {**body, "stream": stream}))
        choices = (
            [e["choices"][0] for e in events_of(response.text)] if stream else response.json()["choices"]
        )
        assert "".join(choice["text"] for choice in choices) == "one t"
        assert choices[-1]["finish_reason"] == "stop"


def test_what_is_held_back_for_a_stop_is_sent_at_the_end(server, wait, model):
    ids = model.tokenizer.encode("one tw")
    there = server(script=lambda request: ids)
    body = {"prompt": "Line", "max_tokens": len(ids), "stop": "two"}
    assert asked_of(there, wait, COMPLETIONS, **body)["choices"][0]["text"] == "one tw"
    pieces = events_of(wait(there.post(COMPLETIONS, {**body, "stream": True})).text)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == "one tw"


def test_a_stream_is_sent_as_it_comes(server, wait):
    """And one that reads slowly stalls no other, nor keeps more than its own answer."""

    async def ask():
        there = server()
        body = {"prompt": "Line", "max_tokens": 40, "stream": True}
        slow = Client(there.app, COMPLETIONS, body)
        slow.reads.clear()
        await until(lambda: there.engine.asked)
        others = [await there.post(COMPLETIONS, {**body, "max_tokens": 5}) for _ in range(3)]
        await until(lambda: not there.engine.work)
        sent = list(slow.sent)
        slow.reads.set()
        await slow.task
        return sent, slow, others

    sent, slow, others = wait(ask())
    assert sent == []
    assert [response.status_code for response in others] == [200, 200, 200]
    assert sum(len(event["choices"][0]["text"]) for event in events_of(slow.text)) == 40
    # All that had come meanwhile is one message.
    assert len(slow.sent) < 10


@pytest.mark.parametrize("stream", [False, True])
def test_one_who_never_reads_is_gone_at_the_time_limit(server, wait, monkeypatch, stream):
    monkeypatch.setattr(transport, "LAST_SECONDS", 0.05)
    # Never none, so that the answer itself is not late.
    monkeypatch.setattr(Exchange, "left", 0.05)

    async def ask():
        there = server()
        never = Client(there.app, COMPLETIONS, {"prompt": "Line", "stream": stream})
        never.reads.clear()
        await never.task
        return there, never

    there, never = wait(ask())
    assert never.sent == []
    assert "muse_aborted_total 1.0" in there.service.metrics.text().decode()


def test_models_are_told_as_openai_does(server, wait):
    told = wait(server().get("/v1/models")).json()
    assert told["object"] == "list"
    assert [(one["id"], one["object"]) for one in told["data"]] == [("small", "model")]


def test_text_offsets_are_those_of_the_text(server, wait, model):
    ids = model.tokenizer.encode(LETTERS)
    told = asked_of(
        server(script=lambda request: ids), wait, COMPLETIONS, prompt="Line", max_tokens=30, logprobs=0
    )
    offsets = told["choices"][0]["logprobs"]["text_offset"]
    assert offsets == sorted(offsets)
    assert offsets[-1] == len(LETTERS) - 1
    assert not any(math.isnan(offset) for offset in offsets)


def test_an_end_that_comes_while_the_loop_wakes_is_one_end(monkeypatch):
    """It is seen by the waking that it comes in the middle of, and asks for another."""
    ended, wakings = [], []

    async def deliver():
        answer = Answer(Request((5,), 1), ended.append)
        answer.read(asyncio.Event(), each=True)
        monkeypatch.setattr(answer._loop, "call_soon_threadsafe", wakings.append)
        answer.deliver(Token(6, "a"))
        answer._waking = False
        answer.deliver(Finished("length"))
        for wake in wakings:
            wake()

    asyncio.run(deliver())
    assert (len(wakings), len(ended)) == (2, 1)


def test_json_is_one_line_for_whoever_splits_lines():
    """Python, and so httpx, ends lines at more characters than events do."""
    ends = [chr(code) for code in range(0x3000) if len(f"a{chr(code)}b".splitlines()) == 2]
    assert "\u2028" in ends
    for end in ends:
        told = as_json({"text": f"a{end}b ü"})
        assert len(told.decode().splitlines()) == 1
        assert "ü".encode() in told
        assert json.loads(told) == {"text": f"a{end}b ü"}
