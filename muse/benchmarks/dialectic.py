"""``benchmark=dialectic``: whether thesis and synthesis of stage 3 come to agree in a training."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from muse.benchmarks.benchmark import Benchmark, Models, measure_part, require_part
from muse.benchmarks.criteria import saved
from muse.benchmarks.model import train_briefly
from muse.benchmarks.results import Results
from muse.config import BenchConfig
from muse.data import load_tokens
from muse.errors import ConfigError
from muse.options import changed
from muse.report.metrics import read_metrics
from muse.report.plots import draw_lines
from muse.report.sweep_plot import Metric
from muse.runs.folder import run_of

GAIN_TARGET = 0.3
NORM_TARGET = 1e-6
# Evaluations of a training.
POINTS = 10


def measure_dialectic(config: BenchConfig, device: torch.device) -> dict[str, Any]:
    """Follow the contradiction over the training of a run, or over one of ``benchmark.train_steps`` steps.

    Of ``benchmark.checkpoint`` it reads what the run has logged, wherever its checkpoint is.

    Returns:
        ``contradictions``: (step, nats) of each evaluation, as in ``watched_contradiction``;
        ``peak`` and ``last`` of them; ``gain``, 1 - last / peak, which is 0 as long as it still rises:
        energies begin at 0, so the contradiction does, too, and must rise before it can fall;
        ``grad_norm``: the least norm of the antithesis' gradients at these steps.

    Raises:
        ConfigError: there are no evaluations, or no text to train with.
    """
    place = config.benchmark.checkpoint
    if place is not None:
        lines = [
            (int(line["step"]), line) for line in read_metrics(run_of(Path(place))) if is_contradiction(line)
        ]
        if not lines:
            raise ConfigError(
                f"benchmark.checkpoint={place} has logged no contradictions; give a run that has "
                "train.eval_every and stage.dialectic=mlp or stage.dialectic=hamiltonian"
            )
    else:
        lines = _trained(config, device)
    points = [(step, line["dialectic/contradiction"]) for step, line in lines]
    norms = [line["dialectic/grad_norm"] for _, line in lines if "dialectic/grad_norm" in line]
    peak, last = max(value for _, value in points), points[-1][1]
    return {
        "contradictions": points,
        "peak": peak,
        "last": last,
        "gain": saved(last, peak),
        "grad_norm": min(norms, default=None),
    }


def is_contradiction(line: dict[str, Any]) -> bool:
    """Whether a line of metrics has a contradiction."""
    return line.get("dialectic/contradiction") is not None


def _trained(config: BenchConfig, device: torch.device) -> list[tuple[int, dict[str, Any]]]:
    if config.data.name == "synthetic":
        raise ConfigError("benchmark=dialectic needs text; choose data=stdlib, wikitext2, text or files")
    data = load_tokens(config.data, config.tokenizer, config.model.vocab_size)
    config = changed(config, model={"vocab_size": data.vocab_size})
    lines: list[tuple[int, dict[str, Any]]] = []

    def note(step: int, metrics: dict[str, float]) -> None:
        if is_contradiction(metrics):
            lines.append((step, metrics))

    every = max(1, config.benchmark.train_steps // POINTS)
    with tempfile.TemporaryDirectory() as folder:
        train_briefly(config, data, device, Path(folder), [], every, note)
    return lines


def judge(config: BenchConfig, results: Results) -> None:
    """The fall of the contradiction, and the antithesis' gradient."""
    measured = measure_part(config, results, "dialectic", "dialectic_gain", "dialectic_grad_norm")
    gain, norm = measured["gain"], measured["grad_norm"]
    results.values |= {
        "dialectic_contradiction": measured["last"],
        "dialectic_gain": gain,
        "dialectic_pass": results.at_least("fall of the contradiction from its peak", gain, GAIN_TARGET),
        "dialectic_grad_norm": norm,
        "dialectic_grad_norm_pass": results.at_least("gradient norm of the antithesis", norm, NORM_TARGET),
    }


def check(config: BenchConfig) -> None:
    """See that there is a dialectic loop, and that it is trained.

    Raises:
        ConfigError: it is not so.
    """
    require_part(config)
    options = config.benchmark
    if config.stage.dialectic != "none" and options.checkpoint is None and not options.train_steps:
        raise ConfigError("benchmark.train_steps=0 trains no dialectic loop; give steps or a checkpoint")


def plot(models: Models) -> Any:
    """The contradiction over the training."""
    lines = {name: values["contradictions"] for name, values in models.items()}
    return draw_lines("from thesis to synthesis", "step", "contradiction [nats]", lines)


BENCHMARK = Benchmark(
    measure={"dialectic": measure_dialectic},
    judge=judge,
    plot=plot,
    shown=(Metric("dialectic_gain", "fall of the contradiction"),),
    stages=("3",),
    check=check,
)
