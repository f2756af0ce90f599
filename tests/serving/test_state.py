"""Health, readiness, metrics, and how a server ends."""

from __future__ import annotations

import asyncio
import re
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.processes import ROOT
from support.serving import Client, events_of, until

from muse.serving.server import counts, line_of
from muse.serving.service import Limits

COMPLETIONS = "/v1/completions"
LONG_AGO = 60.0


def test_health_is_that_of_the_engine(server, wait):
    async def ask():
        there = server(held=True)
        statuses = [(await there.get("/health")).status_code]
        there.engine.heartbeat = time.monotonic() - LONG_AGO
        # Nothing waits, so nothing need be done.
        statuses.append((await there.get("/health")).status_code)
        asked = asyncio.create_task(there.post(COMPLETIONS, {"prompt": "Line"}))
        await until(lambda: there.engine.work)
        statuses.append((await there.get("/health")).status_code)
        there.engine.heartbeat = None
        statuses.append((await there.get("/health")).status_code)
        there.engine.go()
        await asked
        there.engine.dead = True
        statuses.append((await there.get("/health")).status_code)
        statuses.append((await there.get("/ready")).status_code)
        return statuses

    assert wait(ask()) == [200, 200, 503, 200, 503, 503]


@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_for_an_engine_that_dies_is_told(server, wait, stream):
    async def ask():
        there = server(held=True)
        asked = asyncio.create_task(there.post(COMPLETIONS, {"prompt": "Line", "stream": stream}))
        await until(lambda: there.engine.work)
        there.engine.dead = True
        return await asked, await there.post(COMPLETIONS, {"prompt": "Line"})

    for response in wait(ask()):
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_dead"
        assert int(response.headers["retry-after"]) > 0


def test_what_runs_when_a_server_ends_is_told_in_its_stream(server, wait):
    async def ask():
        there = server(held_at=2)
        stream = Client(there.app, COMPLETIONS, {"prompt": "Line", "stream": True})
        await until(lambda: there.engine.held and len(stream.sent) > 1)
        whole = asyncio.create_task(there.post(COMPLETIONS, {"prompt": "Line"}))
        await until(lambda: len(there.engine.work) == 2)
        await asyncio.to_thread(there.engine.drain, 0)
        await stream.task
        return stream, await whole

    stream, whole = wait(ask())
    *tokens, last = events_of(stream.text)
    assert tokens
    assert last["error"]["code"] == "draining"
    assert whole.status_code == 503


def families(there):
    text = there.service.metrics.text().decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value_of(there, name, **labels):
    samples = [sample for family in families(there).values() for sample in family.samples]
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def test_metrics_say_what_happened(server, wait):
    there = server()
    wait(there.post(COMPLETIONS, {"prompt": [40, 41], "max_tokens": 5, "temperature": 0}))
    wait(there.post(COMPLETIONS, {"prompt": [40, 41], "max_tokens": 5, "temperature": 0}))
    wait(there.post("/infer", {"prompts": ["Line"], "n": 5}))
    wait(there.post(COMPLETIONS, {"prompt": [7]}))
    wanted = {
        "muse_slots": 4, "muse_running": 0, "muse_waiting": 0, "muse_prompt_tokens_total": 2,
        "muse_generated_tokens_total": 5, "muse_cache_hits_total": 1, "muse_cache_misses_total": 1,
        "muse_nonfinite_total": 1, "muse_first_token_seconds_count": 1,
        "muse_between_tokens_seconds_count": 4, "muse_queue_seconds_count": 2, "muse_aborted_total": 0,
        "muse_step_seconds_count": 5, "muse_step_rows_count": 5, "muse_step_rows_sum": 5,
    }  # fmt: skip
    assert {name: value_of(there, name) for name in wanted} == wanted
    assert value_of(there, "muse_answers_total", reason="length") == 1
    assert value_of(there, "muse_answers_total", reason="nonfinite") == 1
    assert value_of(there, "muse_rejected_total", reason="unknown_field") == 1
    assert value_of(there, "muse_responses_total", route=COMPLETIONS, status="200") == 2
    assert value_of(there, "muse_request_seconds_count", route="/infer") == 1
    response = wait(there.get("/metrics"))
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_labels_are_few_whatever_is_asked(server, wait):
    there = server()
    for number in range(20):
        wait(there.get(f"/secret/{number}?token=secret"))
        wait(there.post(f"/v1/completions/{number}", {}))
        wait(there.post(COMPLETIONS, {f"secret{number}": 1}))
    labels = {
        tuple(sorted(sample.labels.items()))
        for family in families(there).values()
        for sample in family.samples
        if "le" not in sample.labels
    }
    assert len(labels) < 15
    assert "secret" not in there.service.metrics.text().decode()
    assert value_of(there, "muse_responses_total", route="unmatched", status="404") == 40


def test_the_page_has_every_metric(server):
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(muse_\w+)", page))
    for family in families(server()).values():
        assert {family.name, f"{family.name}_total"} & named, f"{family.name} is not in docs/serving.md"


def test_a_person_sees_what_is_done(server, wait):
    there = server()
    before = counts(there.service)
    wait(there.post(COMPLETIONS, {"prompt": "Line", "max_tokens": 10}))
    wait(there.post(COMPLETIONS, {"prompt": ""}))
    line = line_of(there.service, before, counts(there.service), 2.0)
    assert line == "1 answers, 5 tokens/s, 1 rejected; 0 running, 0 waiting"


def test_a_log_has_no_prompt_but_its_length(server, wait, caplog):
    caplog.set_level("INFO", "muse.serving")
    there = server(limits=Limits(4, 4))
    wait(there.post(COMPLETIONS, {"prompt": "Line 7 is a secret", "max_tokens": 3}))
    (record,) = (record for record in caplog.records if record.name.startswith("muse.serving"))
    assert "secret" not in record.getMessage()
    assert re.search(r"prompts of \d+ tokens, [0-9a-f]{12}$", record.getMessage())
