"""``benchmark=ablation``: what each part of stage 3 is worth, alone and left out, beside stage 2.

Every variant is trained on as many tokens as the others, from several seeds, with the learning rate of the
command; what its step takes in FLOPs and time stands beside its loss, for these differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from muse.benchmarks.baseline import baseline_of
from muse.benchmarks.benchmark import Benchmark, Models
from muse.benchmarks.results import Results
from muse.benchmarks.step_costs import measure_costs, step_costs
from muse.benchmarks.trainings import Trainings, measure_training, training_of
from muse.benchmarks.workload import Workload, refuse_flow
from muse.config import STAGE_3_PARTS, BenchConfig
from muse.errors import ConfigError
from muse.measure.bootstrap import mean_interval, resampled
from muse.options import changed
from muse.report.plots import draw_intervals
from muse.report.sweep_plot import Metric
from muse.report.table import table
from muse.report.wandb_tables import ResultTable, model_tables

# Options that an ablation changes, by group.
Options = Mapping[str, Mapping[str, Any]]
# Of each part what leaves it out and what has it, where the command does not say how.
PARTS: dict[str, tuple[Options, Options]] = {
    **{
        part: ({"stage": {part: STAGE_3_PARTS[part]}}, {"stage": {part: value}})
        for part, value in (("koopman", "replace"), ("mera", "add"), ("dialectic", "mlp"))
    },
    "selection": (
        {"optim": {"selection": "none"}, "train": {"reference": None}},
        {"optim": {"selection": "entropy"}, "train": {"reference": None}},
    ),
}
# Other forms of a part, of which each stands alone.
FORMS: dict[str, Options] = {
    "koopman in every block": {"stage": {"koopman": "replace", "koopman_every": 1}},
    "koopman beside attention": {"stage": {"koopman": "add"}},
    "koopman, real eigenvalues": {"stage": {"koopman": "replace", "koopman_angles": False}},
    "koopman, not selective": {"stage": {"koopman": "replace", "koopman_selective": False}},
    "mera in place of attention": {"stage": {"mera": "replace"}},
    "dialectic, hamiltonian": {"stage": {"dialectic": "hamiltonian"}},
}
BASELINE, OWN = "stage 2", "stage 3"
# Perplexity of stage 3 / that of stage 2.
TARGET = 1.0


def variants_of(config: BenchConfig) -> dict[str, BenchConfig]:
    """Stage 3 as the command has it, all parts, each alone, each left out, and their other forms, by name.

    Of the others what is the same as one before it is left out, and so is what has no part, as stage 2.
    """
    none = config
    for left_out, _ in PARTS.values():
        none = _with(none, left_out)
    has = {part: config if _with(config, left_out) != config else _with(config, with_it)
           for part, (left_out, with_it) in PARTS.items()}  # fmt: skip
    everything = none
    for part in PARTS:
        everything = _with(everything, _of_part(part, has[part]))
    found = {"all parts": everything}
    found |= {part: _with(none, _of_part(part, has[part])) for part in PARTS}
    found |= {f"all but {part}": _with(everything, left_out) for part, (left_out, _) in PARTS.items()}
    found |= {form: _with(none, options) for form, options in FORMS.items()}
    different = {OWN: config}
    for name, variant in found.items():
        if variant != none and variant not in different.values():
            different[name] = variant
    return different


def _with(config: BenchConfig, options: Options) -> BenchConfig:
    return changed(config, **options)


def _of_part(part: str, config: BenchConfig) -> Options:
    """The options of a part, as a configuration has them."""
    return {
        group: {name: getattr(getattr(config, group), name) for name in names}
        for group, names in PARTS[part][1].items()
    }


def judge(config: BenchConfig, results: Results) -> None:
    """Train stage 2 and the variants, and hold stage 3 as the command has it against stage 2."""
    options = config.benchmark
    without, _ = PARTS["selection"]
    baseline = baseline_of(_with(config, without), results.stage_of("2"))
    variants = {BASELINE: baseline, **variants_of(config)}
    wanted = {BASELINE, *(options.variants or variants)}
    variants = {name: variant for name, variant in variants.items() if name in wanted}
    results.values |= {"ablation_ratio": None, "ablation_pass": None}
    costs = step_costs(variants, results)
    if not costs:
        return
    jobs = [(name, seed) for seed in range(options.seeds) for name in variants]
    milliseconds = [options.train_steps * costs[name]["step_ms"] for name, _ in jobs]
    told = tqdm.format_interval(sum(milliseconds) / 1e3)
    print(f"{len(jobs)} trainings, {told} of one command", flush=True)
    made = Trainings(results, options.rerun, milliseconds).make(
        [
            (f"{name}, seed {seed}", training_of(variants[name], options.train_steps, 1.0, seed), time)
            for (name, seed), time in zip(jobs, milliseconds, strict=True)
        ]
    )
    losses: dict[str, list[float]] = {}
    for (name, _), found in zip(jobs, made, strict=True):
        if found.get("test_loss") is not None:
            losses.setdefault(name, []).append(found["test_loss"])
    _report(config, costs, losses, results)


def _report(
    config: BenchConfig,
    costs: Mapping[str, Mapping[str, Any]],
    losses: Mapping[str, list[float]],
    results: Results,
) -> None:
    seeds = config.benchmark.seeds
    first, chosen = costs[BASELINE], resampled(seeds)
    models: dict[str, Any] = {}
    for name, cost in costs.items():
        own, baseline = np.array(losses.get(name, [])), np.array(losses.get(BASELINE, []))
        whole = len(own) == len(baseline) == seeds
        interval = mean_interval(own - baseline, chosen) if whole and name != BASELINE else None
        models[name] = {
            "perplexity": math.exp(own.mean()) if len(own) else None,
            # The seeds are the same.
            "ratio": math.exp((own - baseline).mean()) if whole else None,
            "interval": [math.exp(bound) for bound in interval] if interval else None,
            "losses": own.tolist(),
            "parameters": cost["parameters"],
            "flops_ratio": cost["flops_per_token"] / first["flops_per_token"],
            "time_ratio": cost["ratio"],
            "peak_gb": cost["peak_gb"],
        }
    results.details["ablation"] = models
    stage = models.get(OWN)
    if stage is None:
        results.unjudged["ablation_pass"] = f"benchmark.variants does not name {OWN}"
        return
    passed = None
    if seeds == 1:
        results.unjudged["ablation_pass"] = "an interval needs two seeds or more; give benchmark.seeds"
    elif stage["interval"] is not None:
        low, high = stage["interval"]
        if low <= TARGET < high:
            results.unjudged["ablation_pass"] = (
                f"the ratio lies between {low:.3g} and {high:.3g}: more seeds would tell"
            )
        else:
            passed = high <= TARGET
    results.values |= {"ablation_ratio": stage["ratio"], "ablation_pass": passed}
    results.criteria.append(
        (f"perplexity / {BASELINE}, equal tokens", stage["ratio"], f"<= {TARGET:g}", passed)
    )


def check(config: BenchConfig) -> None:
    """See that there is something to learn, and that the variants are known.

    Raises:
        ConfigError: it is not so.
    """
    options = config.benchmark
    if options.name != "ablation":
        return
    if config.data.name == "synthetic":
        raise ConfigError("benchmark=ablation needs text; choose data=stdlib, wikitext2, text or files")
    if not options.train_steps:
        raise ConfigError("benchmark.train_steps=0 trains nothing; benchmark=ablation needs at least 1")
    refuse_flow(config, "benchmark=ablation, which trains the flow of the stage", "give stage.{}")
    known = variants_of(config)
    for name in options.variants:
        if name not in known:
            raise ConfigError(
                f"benchmark.variants={name} is not known; choose some of {', '.join(map(repr, known))}"
            )


def plot(models: Models) -> Any:
    """The perplexity of each variant / that of stage 2, with intervals of 95 %."""
    rows = {
        name: (model["ratio"], model["interval"])
        for name, model in models.items()
        if name != BASELINE and model["ratio"] is not None
    }
    return draw_intervals("what the parts of stage 3 are worth", f"perplexity / {BASELINE}", rows)


def text(models: Models) -> list[str]:
    """What each variant gives, and what it takes."""
    header = (
        *("variant", "perplexity", f"/ {BASELINE}", "95 %", "parameters"),
        *("FLOPs / stage 2", "step / stage 2", "peak MB"),
    )
    rows = [
        (
            name,
            model["perplexity"],
            model["ratio"],
            "to".join(f" {bound:.4f} " for bound in model["interval"]) if model["interval"] else None,
            model["parameters"],
            model["flops_ratio"],
            model["time_ratio"],
            None if model["peak_gb"] is None else 1e3 * model["peak_gb"],
        )
        for name, model in models.items()
    ]
    return [table(header, rows)]


def tables(models: Models) -> list[ResultTable]:
    """The same."""
    return model_tables("ablation", models, drawn="ratio")


BENCHMARK = Benchmark(
    measure={"step costs": measure_costs, "training": measure_training},
    judge=judge,
    plot=plot,
    shown=(Metric("ablation_ratio", f"perplexity / {BASELINE}", counted=False),),
    stages=("3",),
    trained=False,
    # The batch of a training, as that of price.
    workload=lambda config: Workload(config.train.batch_size),
    check=check,
    tables=tables,
    text=text,
)
