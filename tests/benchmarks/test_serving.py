"""The benchmark of the server: what is judged, and all of it in small."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys

import pytest
import torch
from support.commands import default_stage
from support.configs import write_text
from support.trained import make_trained

import muse
from muse.benchmarks import serving, serving_report, suite
from muse.benchmarks.offline import decode_offline, gap_of, texts_of
from muse.benchmarks.results import Results
from muse.benchmarks.server import model_to_serve
from muse.benchmarks.server_loads import MANY, RATE, SHARES, STREAMED, WHOLE, Shape, gauges_of
from muse.benchmarks.suite import check_benchmark
from muse.config import DataConfig, TokenizerConfig
from muse.errors import ConfigError, RunError

CPU = torch.device("cpu")
GOOD_LOAD = {"questions": 100, "errors": 0, "wrong": 0, "tokens_per_second": 1300.0, "p95_ms": 40.0}
# Found by a server that reaches all it is to reach.
GOOD = {
    "prompt_tokens": 32,
    "new_tokens": 16,
    "answers_right": True,
    "beside_wrong": 0,
    "infer": GOOD_LOAD,
    "clients": [
        {"form": form, "clients": clients, "ratio": 5.5, **GOOD_LOAD}
        for form in (WHOLE, STREAMED)
        for clients in (1, MANY)
    ],
    "rates": [{"rate": RATE, "share": None, **GOOD_LOAD}, {"rate": 99.0, "share": 1.25, **GOOD_LOAD}],
    "sustained": {"memory_growth": 0.005, "drift": -0.2, **GOOD_LOAD},
    "overload": {"kept": 0.97, "refused_p95_ms": 6.0, "errors": 0, "wrong": 0},
    "cache": {**GOOD_LOAD, "hits": 100, "p95_ms": 4.0},
}


def changed(path, value):
    """What was found, but for one value."""
    found = copy.deepcopy(GOOD)
    *way, last = path
    place = found
    for key in way:
        place = place[key]
    place[last] = value
    return found


def judged(config, found):
    results = Results(None, lambda *_: found, default_stage)
    serving.judge(config, results)
    results.judge()
    return results


@pytest.fixture
def config(bench_config):
    return bench_config(1, name="serving")


def test_what_reaches_all_passes(config):
    results = judged(config, GOOD)
    assert results.values["serving_pass"] is results.values["all_pass"] is True
    assert all(passed is True for *_, passed in results.criteria)
    assert results.unjudged == {}


@pytest.mark.parametrize(
    ("path", "value", "flags"),
    [
        (("answers_right",), False, ["answers"]),
        (("beside_wrong",), 1, ["wrong"]),
        (("rates", 1, "wrong"), 1, ["wrong"]),
        (("clients", 2, "wrong"), 1, ["wrong"]),
        (("overload", "wrong"), 1, ["wrong"]),
        (("infer", "p95_ms"), 50.1, ["infer_p95_ms"]),
        (("clients", 0, "p95_ms"), 50.1, ["one_client_p95_ms"]),
        (("clients", 1, "tokens_per_second"), 1199.0, ["tokens_per_second"]),
        (("clients", 1, "ratio"), 4.9, ["speedup"]),
        (("clients", 3, "errors"), 1, ["errors"]),
        (("rates", 0, "p95_ms"), 50.1, ["poisson_p95_ms"]),
        (("rates", 0, "errors"), 1, ["errors", "poisson_errors"]),
        (("cache", "p95_ms"), 5.1, ["hit_p95_ms"]),
        (("overload", "kept"), 0.94, ["kept"]),
        (("overload", "refused_p95_ms"), 10.1, ["refused_p95_ms"]),
        (("sustained", "memory_growth"), 0.011, ["memory_growth"]),
        (("sustained", "drift"), 0.11, ["drift"]),
    ],
)
def test_a_miss_fails_its_criterion_alone(config, path, value, flags):
    values = judged(config, changed(path, value)).values
    failed = {key for key, passed in values.items() if key.endswith("_pass") and passed is False}
    assert failed == {*(f"serving_{flag}_pass" for flag in flags), "serving_pass", "all_pass"}


def test_beyond_the_capacity_refusals_are_no_miss(config):
    assert judged(config, changed(("rates", 1, "errors"), 7)).values["serving_pass"] is True


@pytest.mark.parametrize(
    ("path", "value", "flag", "reason"),
    [
        (("cache", "hits"), 99, "hit_p95_ms", "no answer was stored"),
        (("overload", "kept"), None, "kept", "nothing was refused"),
        (("overload", "refused_p95_ms"), None, "refused_p95_ms", "nothing was refused"),
        (("sustained", "memory_growth"), None, "memory_growth", "does not tell the memory"),
        (("sustained", "drift"), None, "drift", "benchmark.minutes"),
        (("clients", 1, "clients"), 16, "speedup", "benchmark.clients has no 32"),
        (("infer", "p95_ms"), None, "infer_p95_ms", "no question had an answer"),
    ],
)
def test_what_is_missing_never_passes_and_says_why(config, path, value, flag, reason):
    results = judged(config, changed(path, value))
    assert results.values[f"serving_{flag}_pass"] is results.values["serving_pass"] is None
    assert results.values["all_pass"] is None
    assert reason in results.unjudged[f"serving_{flag}_pass"]


def test_answers_that_are_wrong_have_no_times(config):
    results = judged(config, {"answers_right": False, "offline": GOOD_LOAD, "beside_wrong": 3})
    assert results.values["serving_answers_pass"] is results.values["serving_pass"] is False
    assert [passed for *_, passed in results.criteria].count(None) == len(results.criteria) - 1
    assert "not the model's" in results.unjudged["serving_drift_pass"]
    found = results.details["serving"]
    assert serving_report.plot(found) is None
    assert serving_report.tables(found) == []
    assert serving_report.text(found)


def test_a_server_that_does_not_start_leaves_all_open(config):
    def fails(*_):
        raise RunError("the server ended with status 1 before it was ready")

    results = Results(None, fails, default_stage)
    serving.judge(config, results)
    results.judge()
    assert {passed for *_, passed in results.criteria} == {None}
    assert list(results.failures) == ["serving, stage 1 fp32"]
    assert results.unjudged == {}


def test_what_does_not_go_with_it_is_refused(bench_config, monkeypatch):
    options = {"name": "serving"}
    with pytest.raises(ConfigError, match=r"benchmark\.ode_steps changes nothing in benchmark=serving"):
        check_benchmark(bench_config(2, **options, ode_steps=4), ())
    synthetic = dataclasses.replace(bench_config(1, **options), data=DataConfig(name="synthetic"))
    with pytest.raises(ConfigError, match="benchmark=serving needs text for a tokenizer"):
        check_benchmark(synthetic, ())
    for number in (0, 1, 2, 3):
        check_benchmark(bench_config(number, **options), ())
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ConfigError, match="benchmark=serving needs the package httpx; pip install"):
        check_benchmark(bench_config(1, **options), ())


def test_a_short_window_has_shorter_questions():
    assert Shape(32, 16).within(128) == Shape(32, 16).within(48) == Shape(32, 16)
    for window in range(2, 48):
        shape = Shape(32, 16).within(window)
        assert shape.prompt + shape.tokens <= window
        assert min(shape.prompt, shape.tokens) >= 1


def test_metrics_without_labels_are_read():
    text = '# HELP muse_running requests\nmuse_running 3.0\nmuse_answers_total{reason="stop"} 5.0\n'
    assert gauges_of(text) == {"muse_running": 3.0}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_trained(tmp_path_factory.mktemp("served"), seq_len=64)[0]


def test_texts_have_so_many_tokens_and_depend_on_the_seed(run_folder):
    tokenizer = muse.load(run_folder).tokenizer
    texts = texts_of(tokenizer, 12, 20, seed=0)
    assert [len(tokenizer.encode(text)) for text in texts] == [20] * 12
    assert len(set(texts)) == 12
    assert texts == texts_of(tokenizer, 12, 20, seed=0) != texts_of(tokenizer, 12, 20, seed=1)


def test_offline_answers_are_the_likeliest_tokens(run_folder):
    trained = muse.load(run_folder)
    prompts = [[5, 9, 4], [7, 7, 30]]
    offline = decode_offline(trained, prompts, 6)
    with torch.no_grad():
        for prompt, answer in zip(prompts, offline.answers, strict=True):
            assert len(answer) == 6
            for place, token in enumerate(answer):
                logits = trained.model.next_logits(torch.tensor([[*prompt, *answer[:place]]]))[0]
                assert logits[token] == pytest.approx(logits.max().item(), rel=1e-5)
    assert offline.figures["questions"] == 2
    assert offline.figures["tokens_per_second"] > 0
    assert offline.figures["between_p50_ms"] > 0
    answer = offline.answers[0]
    assert gap_of(trained, prompts[0], answer, answer) == 0
    assert gap_of(trained, prompts[0], answer, [*answer[:2], (answer[2] + 1) % 300, *answer[3:]]) > 1e-3
    assert gap_of(trained, prompts[0], answer, answer[:-1]) == float("inf")


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_an_untrained_model_is_a_file_that_is_loaded(bench_config, tmp_path, number):
    data = DataConfig(name="text", path=str(write_text(tmp_path)), cache=str(tmp_path / "cache"))
    config = dataclasses.replace(
        bench_config(number), data=data, tokenizer=TokenizerConfig(name="bpe", vocab_size=300)
    )
    trained = muse.load(model_to_serve(config, tmp_path))
    assert trained.config.stage.number == str(number)
    assert trained.tokenizer.encode("Line")


@pytest.mark.slow
def test_all_of_it_in_small(bench_config, run_folder, tmp_path, monkeypatch):
    config = bench_config(
        1, name="serving", checkpoint=str(run_folder), seconds=0.2, minutes=0.02, clients=[2]
    )
    monkeypatch.setattr(suite, "measure_isolated", lambda name, own: suite.MEASUREMENTS[name](own, CPU))
    results = suite.run_suite(config, tmp_path, default_stage)
    assert results.failures == {}
    (found,) = results.details["serving"].values()
    json.dumps(found)
    assert found["answers_right"] is True
    assert found["answers"] == 32
    assert results.values["serving_wrong"] == results.values["serving_errors"] == 0
    kinds = [(row["form"], row["clients"]) for row in found["clients"]]
    assert kinds == [(form, clients) for form in (WHOLE, STREAMED) for clients in (1, 2)]
    for row in found["clients"]:
        assert row["questions"] >= 3 * row["clients"]
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
        if row["form"] == STREAMED:
            assert 0 < row["first_p50_ms"] <= row["p99_ms"]
            assert row["between_p50_ms"] <= row["p99_ms"]
    assert {row["ratio"] for row in found["clients"] if row["clients"] == 1} == {1.0}
    assert sorted(row["share"] for row in found["rates"] if row["share"]) == list(SHARES)
    assert found["cache"]["hits"] == found["cache"]["questions"] > 0
    assert found["overload"]["questions"] > 0
    assert found["samples"]
    assert all(sample["memory_mb"] > 10 and sample["running"] >= 0 for sample in found["samples"])
    assert serving_report.plot(results.details["serving"]) is not None
    assert all(table.rows for table in serving_report.tables(results.details["serving"]))
    assert serving_report.text(results.details["serving"])
