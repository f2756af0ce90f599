"""What a training step of several models takes, side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from muse.benchmarks.model import benchmark_model, random_training_step
from muse.benchmarks.results import Results
from muse.benchmarks.trainings import CLAIM, TRAININGS, run_of
from muse.benchmarks.workload import batch_shape
from muse.config import BenchConfig
from muse.data import load_tokens
from muse.files import claimed, read_json, write_json
from muse.measure.timing import quantile, times_in_turns
from muse.options import changed
from muse.runs.provenance import identity, source_hash
from muse.scaling.counts import parameters, step_flops

COSTS_FILE = "costs.json"


def measure_costs(*arguments: Any) -> dict[str, Any]:
    """Time a training step of each model, in turns.

    Args:
        arguments: configurations, the first one of the model that the others are held against; the device.

    Returns:
        ``vocab_size`` of the text, and by model, in lists, ``step_ms``, the median time of a step, and
        ``ratio``, the median over rounds of its time / that of the first one.

    Raises:
        NotFinite: the loss of a step is not.
    """
    *configs, device = arguments
    first = configs[0]
    vocab_size = load_tokens(first.data, first.tokenizer, first.model.vocab_size).vocab_size
    steps = []
    for config in configs:
        config = changed(config, model={"vocab_size": vocab_size})
        _, step = random_training_step(config, benchmark_model(config, device), device)
        steps.append(step)
    options = first.benchmark
    times = times_in_turns(steps, options.warmup, options.repeats, device)
    return {
        "vocab_size": vocab_size,
        "step_ms": [1e3 * quantile(own, 0.5) for own in times],
        "ratio": [quantile([t / u for t, u in zip(own, times[0], strict=True)], 0.5) for own in times],
    }


def step_costs(configs: Mapping[str, BenchConfig], results: Results) -> dict[str, dict[str, Any]]:
    """What a step of each model takes, by name, measured once, so that a command given again trains as long.

    Of each ``step_ms``, ``ratio`` to the first one, ``parameters``, ``flops_per_token`` and ``peak_gb``;
    empty where they could not be measured.
    """
    first, *others = configs.values()
    # Not by what decides how much is trained.
    key = "".join(identity(run_of(config)) for config in configs.values()) + source_hash()
    name = f"costs-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    place = Path(first.output_root) / TRAININGS / name
    with claimed(place / CLAIM, wait=True):
        stored = read_json(place / COSTS_FILE)
        if stored and not first.benchmark.rerun:
            return stored
        measured = results.run("step costs", first, others=others)
        if not measured:
            return {}
        costs = {}
        for number, (model_name, config) in enumerate(configs.items()):
            config = changed(config, model={"vocab_size": measured["vocab_size"]})
            model, (_, length) = config.model, batch_shape(config)
            costs[model_name] = {
                "step_ms": measured["step_ms"][number],
                "ratio": measured["ratio"][number],
                "parameters": parameters(config.stage, model, model.vocab_size),
                "flops_per_token": step_flops(
                    config.stage, model, model.vocab_size, length, config.optim.kept_share
                ).total,
                "peak_gb": results.run("vram", config, model_name)["peak"],
            }
        if not results.failures:
            write_json(place / COSTS_FILE, costs)
        return costs
