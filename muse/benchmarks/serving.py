"""``benchmark=serving``: what ``muse.serve`` carries, beside one request at a time and no server at all.

The real command runs as a process on the loopback; the load comes from the process of this measurement, which
does nothing else meanwhile. Greedy answers are held against the offline model before anything is timed, and
under every load against those of the same questions alone.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from muse.benchmarks.benchmark import Benchmark
from muse.benchmarks.criteria import all_of
from muse.benchmarks.offline import decode_offline, texts_of
from muse.benchmarks.results import Results, name_of
from muse.benchmarks.server import model_to_serve, running_server
from muse.benchmarks.server_loads import MANY, OVERLOAD, QUEUE, RATE, TOGETHER, WHOLE, Loads, Shape
from muse.benchmarks.serving_report import plot, tables, text
from muse.benchmarks.workload import refuse_flow
from muse.config import BenchConfig
from muse.errors import ConfigError
from muse.report.sweep_plot import Metric
from muse.serve import PACKAGES, require
from muse.trained import load

# Tokens of a prompt and of its answer, and prompts that differ.
PROMPT, TOKENS, PROMPTS = 32, 16, 32
# What the server is to reach on two cores with the tiny model of stage 1 in float32: milliseconds,
LATENCY, HIT, REFUSED = 50.0, 5.0, 10.0
# tokens per second, times those of one client, and shares.
THROUGHPUT, SPEEDUP, KEPT, GROWTH, DRIFT = 1200.0, 5.0, 0.95, 0.01, 0.1


def measure_serving(config: BenchConfig, device: torch.device) -> dict[str, Any]:
    """Load the server in all ways; see ``docs/serving.md`` for what is found.

    Returns:
        ``answers_right``: whether greedy answers are the offline model's, but for logits that hardly
        differ, with ``answers``, ``answers_equal`` and ``answers_gap``; where they are, the loads:
        ``infer``, ``clients``, ``rates`` with ``capacity`` and ``knee``, ``sustained``, ``overload`` and
        ``cache``, each with the keys of ``load_figures`` and more; and ``offline``.
    """
    options = config.benchmark
    with TemporaryDirectory() as folder:
        place = model_to_serve(config, Path(folder))
        trained = load(place, device=device)
        assert trained.tokenizer is not None
        shape = Shape(PROMPT, TOKENS).within(trained.config.model.seq_len)
        texts = texts_of(trained.tokenizer, PROMPTS, shape.prompt, config.seed)
        prompts = [trained.tokenizer.encode(text) for text in texts]
        print("  decoding without a server ...", flush=True)
        offline = decode_offline(trained, prompts, shape.tokens)
        # Objects of the model are not looked through again, which would be pauses of the load.
        gc.collect()
        gc.freeze()
        loads = Loads(config, shape, texts, prompts, offline)
        found: dict[str, Any] = {
            "prompt_tokens": shape.prompt,
            "new_tokens": shape.tokens,
            "offline_threads": torch.get_num_threads(),
            "offline": offline.figures,
        }
        where = ("--device", device.type)
        try:
            print("  starting the server ...", flush=True)
            with running_server(place, Path(folder), *where, "--cache-mb", 0) as server:
                found |= asyncio.run(loads.of_answers(server, trained))
                if found["answers_right"]:
                    found |= asyncio.run(loads.of_server(server))
                server.end()
            if found["answers_right"]:
                print("  starting one that stores answers and lets few requests wait ...", flush=True)
                with running_server(place, Path(folder), *where, "--queue", QUEUE) as server:
                    found |= asyncio.run(loads.beyond(server))
                    server.end()
        finally:
            gc.unfreeze()
    found["seconds"], found["minutes"] = options.seconds, options.minutes
    return found


def judge(config: BenchConfig, results: Results) -> None:
    """Measure, and hold it against what the server is to reach."""
    found = results.measure("serving", name_of(config), config)
    loads = {key: found.get(key) or {} for key in ("infer", "cache", "overload", "sustained")}
    one, many = (_row(found, "clients", form=WHOLE, clients=count) for count in (1, MANY))
    poisson = _row(found, "rates", rate=RATE, share=None)
    shape = f"{found.get('prompt_tokens', PROMPT)} + {found.get('new_tokens', TOKENS)} tokens"
    lasting = f"{60 * config.benchmark.minutes:g} s sustained"
    throughput, right = many.get("tokens_per_second"), found.get("answers_right")
    wrong, errors = (total(found, key) for key in ("wrong", "errors"))
    for key, title, value, goal in (
        ("wrong", "answers under load that are not those alone", wrong, 0),
        ("infer_p95_ms", f"{TOGETHER} prompts, 1 new token, p95 [ms]", loads["infer"].get("p95_ms"), LATENCY),
        ("one_client_p95_ms", f"one client, {shape}, p95 [ms]", one.get("p95_ms"), LATENCY),
        ("poisson_p95_ms", f"{RATE:g} questions a second, p95 [ms]", poisson.get("p95_ms"), LATENCY),
        ("poisson_errors", "the same, errors", poisson.get("errors"), 0),
        ("errors", "questions of all loads within the capacity that had no answer", errors, 0),
        ("hit_p95_ms", "a stored answer, p95 [ms]", stored_p95(loads["cache"]), HIT),
        ("refused_p95_ms", "until a refusal, p95 [ms]", loads["overload"].get("refused_p95_ms"), REFUSED),
        ("memory_growth", f"{lasting}, growth of memory", loads["sustained"].get("memory_growth"), GROWTH),
        ("drift", f"{lasting}, drift of p95", loads["sustained"].get("drift"), DRIFT),
    ):
        results.values |= {
            f"serving_{key}": value,
            f"serving_{key}_pass": results.at_most(title, value, goal),
        }
    for key, title, value, goal in (
        ("tokens_per_second", f"{MANY} clients, {shape}, tokens/s", throughput, THROUGHPUT),
        ("speedup", "the same / one client", many.get("ratio"), SPEEDUP),
        ("kept", f"tokens/s at {OVERLOAD:g} times the capacity / peak", loads["overload"].get("kept"), KEPT),
    ):
        results.values |= {
            f"serving_{key}": value,
            f"serving_{key}_pass": results.at_least(title, value, goal),
        }
    results.values |= {"serving_answers": right, "serving_answers_pass": right}
    results.criteria.append(("greedy answers are the offline model's", right, "true", right))
    for key, passed in results.values.items():
        if found and passed is None and key.endswith("_pass"):
            results.unjudged[key] = unmeasured(key, right)
    passes = [passed for key, passed in results.values.items() if key.endswith("_pass")]
    results.values["serving_pass"] = all_of(passes)


def _row(found: Mapping[str, Any], name: str, **wanted: object) -> Mapping[str, Any]:
    rows = found.get(name) or []
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), {})


def total(found: Mapping[str, Any], key: str) -> int | None:
    """Over all loads, of which those beyond the capacity may have refusals; None where there was no load.

    Args:
        found: by ``measure_serving``.
        key: ``wrong``, answers that are not those of the same questions alone, or ``errors``, no answers.
    """
    if "overload" not in found:
        return None
    loads = [*found["clients"], *(found[name] for name in ("infer", "sustained", "overload", "cache"))]
    loads += [row for row in found["rates"] if key == "wrong" or (row["share"] or 0) < 1]
    beside = found["beside_wrong"] if key == "wrong" else 0
    return int(beside + sum(load[key] for load in loads))


def unmeasured(key: str, right: bool | None) -> str:
    """Why a criterion is open though nothing failed."""
    if right is False:
        return "the time of answers that are not the model's means nothing"
    refusals = "nothing was refused in the time of the load; give a longer benchmark.seconds"
    reasons = {
        "hit_p95_ms": "no answer was stored, as the server does only where its bits are invariant",
        "kept": refusals,
        "refused_p95_ms": refusals,
        "memory_growth": "the system does not tell the memory of a process, or the load was too short",
        "drift": "the load was too short for thirds; give more benchmark.minutes",
    }
    name = key.removeprefix("serving_").removesuffix("_pass")
    return reasons.get(name, f"benchmark.clients has no {MANY}, or no question had an answer")


def stored_p95(cache: Mapping[str, Any]) -> float | None:
    """Of answers that were all stored."""
    return cache["p95_ms"] if cache and cache["hits"] == cache["questions"] else None


def check(config: BenchConfig) -> None:
    """See that there is a server, and that a model without a checkpoint has a tokenizer.

    Raises:
        ConfigError: it is not so.
    """
    require("benchmark=serving", (*PACKAGES, "httpx"))
    if config.data.name == "synthetic" and config.benchmark.checkpoint is None:
        raise ConfigError(
            "benchmark=serving needs text for a tokenizer; choose data=stdlib, wikitext2 or text"
        )
    refuse_flow(config, "benchmark=serving, which serves the flow of the stage", "give stage.{}")


BENCHMARK = Benchmark(
    measure={"serving": measure_serving},
    judge=judge,
    plot=plot,
    shown=(Metric("serving_tokens_per_second", "tokens per second, 32 clients"),),
    stages=("0", "1", "2", "3", "3a"),
    check=check,
    tables=tables,
    text=text,
)
