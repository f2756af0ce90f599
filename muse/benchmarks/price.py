"""``benchmark=price``: the loss of each stage for equal tokens, equal FLOPs and equal seconds.

Every model is trained as train.py would, with the learning rate of a small grid that is best for it, and from
several seeds. Beside the stages stand looped decoders of stage 0, which share weights as a flow does, and, to
tell what a loop or a step of a flow is worth, deeper models and flows of more steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from muse.benchmarks.baseline import baseline_of
from muse.benchmarks.benchmark import Benchmark, Models
from muse.benchmarks.results import Results
from muse.benchmarks.step_costs import measure_costs, step_costs
from muse.benchmarks.trainings import Trainings, measure_training, training_of
from muse.benchmarks.workload import Workload, batch_shape, refuse_flow
from muse.config import BenchConfig, BenchmarkConfig
from muse.errors import ConfigError
from muse.measure.bootstrap import TAILS, mean_interval, resampled
from muse.options import changed
from muse.report.plots import COLOURS, MARKERS, add_legend, new_axes, new_figure
from muse.report.sweep_plot import Metric
from muse.report.table import table
from muse.report.wandb_tables import ResultTable, model_tables
from muse.scaling.counts import numbers, potential_shapes, shapes
from muse.scaling.recurrence import Recurrence, recurrence_exponents

BUDGETS: tuple[str, ...] = ("tokens", "FLOPs", "seconds")
# Of which stage each option trains other models, too.
REPEATED = {"loops": "0", "flow_steps": "2"}
# What a stage is held against.
BASELINES = {"3": ("0", "2")}


@dataclass(frozen=True)
class Variant:
    """A model that is trained.

    Attributes:
        name: among the others.
        config: of the benchmark, with its stage and sizes.
        budgets: to which it is trained.
        times: how often its repeated weights are applied: loops, or steps of a flow in multiples of those of
            the stage.
    """

    name: str
    config: BenchConfig
    budgets: tuple[str, ...] = BUDGETS
    times: int = 1


def variants_of(config: BenchConfig, results: Results) -> list[Variant]:
    """The stage itself, which sets the budgets, first, the others, and what is compared with them."""
    own, chosen = config.stage.number, config.benchmark
    stages = {
        number: config if number == own else baseline_of(config, results.stage_of(number))
        for number in dict.fromkeys((own, *chosen.stages))
    }
    variants = [Variant(f"stage {number}", stage) for number, stage in stages.items()]
    for name, number in REPEATED.items():
        multiples = getattr(chosen, name)
        if number not in stages or not multiples:
            continue
        base = stages[number]
        for times in multiples:
            option, unit = ("loops", "loops") if number == "0" else ("ode_steps", "steps")
            count = times * getattr(base.stage, option)
            # A looped decoder is a baseline of its own.
            budgets = BUDGETS if number == "0" else BUDGETS[:1]
            repeated = changed(base, stage={option: count})
            variants.append(Variant(f"stage {number}, {count} {unit}", repeated, budgets, times))
        for factor in chosen.depths:
            deep = _deeper(base, factor)
            blocks = deep.model.real.layers if number == "0" else deep.model.complex.layers
            variants.append(Variant(f"stage {number}, {blocks} blocks", deep, BUDGETS[:1]))
    return variants


def _deeper(config: BenchConfig, factor: float) -> BenchConfig:
    widths = {
        name: dataclasses.replace(width, layers=max(1, round(factor * width.layers)))
        for name, width in (("real", config.model.real), ("complex", config.model.complex))
    }
    return changed(config, model=widths)


def judge(config: BenchConfig, results: Results) -> None:
    """Train every variant to its budgets, and hold the stage against stage 0, and stage 3 against stage 2."""
    variants, chosen = variants_of(config, results), config.benchmark
    results.values |= {f"price_{budget.lower()}_loss": None for budget in BUDGETS}
    costs = step_costs({variant.name: variant.config for variant in variants}, results)
    if not costs:
        return
    steps = _steps(variants, costs, chosen.train_steps)
    # Some are the same for two budgets, and one of the grid is the first seed's.
    different = {
        (variant.name, steps[variant.name][budget], seed)
        for variant in variants
        for budget in variant.budgets
        for seed in range(chosen.seeds)
    }
    planned = [count * costs[name]["step_ms"] for name, count, _ in different]
    planned += [
        costs[variant.name]["step_ms"] * steps[variant.name]["tokens"]
        for variant in variants
        for _ in chosen.learning_rates[1:]
    ]
    print(f"{len(planned)} trainings, {tqdm.format_interval(sum(planned) / 1e3)} of one command", flush=True)
    trainings = Trainings(results, chosen.rerun, planned)

    def named(variant: Variant, budget: str, rate: float, seed: int) -> tuple[str, BenchConfig, float]:
        count = steps[variant.name][budget]
        training = training_of(variant.config, count, rate, seed)
        name = f"{variant.name}, learning rate {training.optim.lr:.3g}, seed {training.seed}"
        return name, training, count * costs[variant.name]["step_ms"]

    # Together, so that commands that share the work need not wait for each other between two variants.
    grid = [(variant, rate) for variant in variants for rate in chosen.learning_rates]
    first = trainings.make([named(variant, "tokens", rate, 0) for variant, rate in grid])
    rates = {}
    for variant in variants:
        losses = {
            rate: found["valid_loss"]
            for (other, rate), found in zip(grid, first, strict=True)
            if other is variant and found.get("valid_loss") is not None
        }
        if losses:
            rates[variant.name] = min(losses, key=losses.__getitem__)
    wanted = [
        (variant, budget, seed)
        for variant in variants
        if variant.name in rates
        for budget in variant.budgets
        for seed in range(chosen.seeds)
    ]
    made = trainings.make(
        [named(variant, budget, rates[variant.name], seed) for variant, budget, seed in wanted]
    )
    losses_of: dict[tuple[str, str], list[float]] = {}
    for (variant, budget, _), found in zip(wanted, made, strict=True):
        if found.get("test_loss") is not None:
            losses_of.setdefault((variant.name, budget), []).append(found["test_loss"])
    _report(config, variants, costs, steps, rates, losses_of, results)


def _steps(
    variants: Sequence[Variant], costs: Mapping[str, Mapping[str, float]], steps: int
) -> dict[str, dict[str, int]]:
    """Steps of each variant to each budget, which is what ``steps`` of the first variant take."""
    flops = costs[variants[0].name]["flops_per_token"]
    return {
        variant.name: {
            "tokens": steps,
            "FLOPs": max(1, round(steps * flops / costs[variant.name]["flops_per_token"])),
            "seconds": max(1, round(steps / costs[variant.name]["ratio"])),
        }
        for variant in variants
    }


def _report(
    config: BenchConfig,
    variants: Sequence[Variant],
    costs: Mapping[str, Mapping[str, Any]],
    steps: Mapping[str, Mapping[str, int]],
    rates: Mapping[str, float],
    losses: Mapping[tuple[str, str], list[float]],
    results: Results,
) -> None:
    chosen = resampled(config.benchmark.seeds)
    batch, length = batch_shape(config)
    grid = config.benchmark.learning_rates
    per_step = batch * config.optim.accumulation * length
    models: dict[str, Any] = {}
    for variant in variants:
        name, rate = variant.name, rates.get(variant.name)
        models[name] = {
            **costs[name],
            "learning_rate": None if rate is None else rate * variant.config.optim.lr,
            # Beyond it might be a better one.
            "rate_at_edge": len(grid) > 1 and rate in (min(grid), max(grid)),
            "budgets": {},
        }
        for budget in variant.budgets:
            own = np.array(losses.get((name, budget), []))
            count = steps[name][budget]
            models[name]["budgets"][budget] = {
                "steps": count,
                "tokens": count * per_step,
                "flops": count * per_step * costs[name]["flops_per_token"],
                "seconds": count * costs[variants[0].name]["step_ms"] * costs[name]["ratio"] / 1e3,
                "losses": own.tolist(),
                "loss": float(own.mean()) if len(own) else None,
                "interval": mean_interval(own, chosen) if len(own) == config.benchmark.seeds else None,
            }
    results.details["price"] = models
    stage = config.stage.number
    for budget in BUDGETS:
        results.values[f"price_{budget.lower()}_loss"] = models[f"stage {stage}"]["budgets"][budget]["loss"]
        for number in BASELINES.get(stage, ("0",)):
            if number != stage and f"stage {number}" in models:
                _judge_stage(config, number, budget, models, chosen, results)
    for name, number in REPEATED.items():
        results.values |= _exponent(name, number, config, variants, models, chosen)


def _judge_stage(
    config: BenchConfig,
    number: str,
    budget: str,
    models: Mapping[str, Any],
    chosen: np.ndarray,
    results: Results,
) -> None:
    """The loss of the stage less that of another one, from the same seeds, for a budget."""
    own, other = (models[f"stage {one}"]["budgets"][budget] for one in (config.stage.number, number))
    key = f"price_{budget.lower()}" + ("" if number == "0" else f"_stage{number}")
    losses, others = (np.array(one["losses"]) for one in (own, other))
    whole = len(losses) == len(others) == config.benchmark.seeds
    interval = mean_interval(losses - others, chosen) if whole else None
    difference = None if None in (own["loss"], other["loss"]) else own["loss"] - other["loss"]
    passed = None
    if config.benchmark.seeds == 1:
        results.unjudged[f"{key}_pass"] = "an interval needs two seeds or more; give benchmark.seeds"
    elif interval is None:
        # A training failed, which is told elsewhere.
        pass
    elif interval[0] <= 0 <= interval[1]:
        results.unjudged[f"{key}_pass"] = (
            f"the difference lies between {interval[0]:.3g} and {interval[1]:.3g}: more seeds would tell"
        )
    else:
        passed = interval[1] < 0
    results.values |= {
        f"price_{budget.lower()}_loss_stage{number}": other["loss"],
        f"{key}_difference": difference,
        f"{key}_interval": interval,
        f"{key}_pass": passed,
    }
    results.criteria.append((f"loss less that of stage {number}, equal {budget}", difference, "< 0", passed))


def _exponent(
    name: str,
    number: str,
    config: BenchConfig,
    variants: Sequence[Variant],
    models: Mapping[str, Any],
    chosen: np.ndarray,
) -> dict[str, Any]:
    """Of the models of a stage, what their loops or steps are worth: see ``recurrence_exponents``."""
    points, losses = [], []
    for variant in variants:
        own = models[variant.name]["budgets"]["tokens"]["losses"]
        if variant.config.stage.number == number and len(own) == config.benchmark.seeds:
            stage, model = variant.config.stage, variant.config.model
            found = shapes(stage, model, model.vocab_size)
            block = numbers(found.blocks[0])
            repeated = block if number == "0" else numbers(potential_shapes(stage, model))
            once = len(found.blocks) * (block - repeated)
            points.append(Recurrence(once, len(found.blocks) * repeated, variant.times))
            losses.append(own)
    key = f"price_exponent_{name}"
    if not any(point.times > 1 for point in points):
        return {}
    by_seed = np.array(losses)
    mean = recurrence_exponents(points, by_seed.mean(1)[None])[0]
    interval = None
    if config.benchmark.seeds > 1:
        draws = recurrence_exponents(points, by_seed[:, chosen].mean(2).T)
        if np.isfinite(draws).all():
            low, high = np.percentile(draws, TAILS)
            interval = (float(low), float(high))
    return {key: float(mean) if np.isfinite(mean) else None, f"{key}_interval": interval}


def check(config: BenchConfig) -> None:
    """See that there is something to learn, and that no option is given that changes nothing.

    Raises:
        ConfigError: it is not so.
    """
    options = config.benchmark
    if config.data.name == "synthetic":
        raise ConfigError("benchmark=price needs text; choose data=stdlib, wikitext2, text or files")
    if not options.train_steps:
        raise ConfigError("benchmark.train_steps=0 trains nothing; benchmark=price needs at least 1")
    if not options.learning_rates:
        raise ConfigError("benchmark.learning_rates=[] leaves none to train with; it must hold at least 1.0")
    trained, default = {config.stage.number, *options.stages}, BenchmarkConfig()
    for name, number in REPEATED.items():
        if number not in trained and (given := getattr(options, name)) not in ([], getattr(default, name)):
            raise ConfigError(
                f"benchmark.{name}={given} changes nothing without stage {number}, of which they are; "
                f"add {number} to benchmark.stages, or give benchmark.{name}=[]"
            )
    repeats = any(number in trained and getattr(options, name) for name, number in REPEATED.items())
    if not repeats and options.depths not in ([], default.depths):
        raise ConfigError(
            f"benchmark.depths={options.depths} changes nothing without loops or steps, whose worth "
            "they tell; give benchmark.loops or benchmark.flow_steps, or benchmark.depths=[]"
        )
    refuse_flow(config, "benchmark=price, which trains the flow of the stage", "give stage.{}")


def _points(models: Models, key: str) -> dict[str, list[tuple[float, float, tuple[float, float] | None]]]:
    """(x, loss, interval) of each model that is trained to all budgets, by name; x is ``key`` of a training.

    The peak memory is that of a step, the same for all budgets.
    """
    points = {}
    for name, model in models.items():
        if len(model["budgets"]) < len(BUDGETS):
            continue
        trained = [one for one in model["budgets"].values() if one["loss"] is not None]
        if key == "peak_gb":
            trained = trained[:1]
            found = [(model[key], one["loss"], one["interval"]) for one in trained if model[key]]
        else:
            found = [(one[key], one["loss"], one["interval"]) for one in trained]
        points[name] = sorted(set(found))
    return points


def plot(models: Models) -> Any:
    """The loss over tokens, FLOPs, seconds and peak memory, with intervals of 95 %."""
    figure = new_figure((9, 7))
    grid = figure.add_gridspec(2, 2)
    first = None
    for number, (key, unit, label) in enumerate(
        (
            ("tokens", 1e6, "million tokens of training"),
            ("flops", 1e12, "TFLOP of training"),
            ("seconds", 1, "seconds of training steps"),
            ("peak_gb", 1e-3, "peak memory of a step [MB], equal tokens"),
        )
    ):
        y_label = "" if number % 2 else "test loss [nats per token]"
        axes = new_axes(figure, label, y_label, grid[number // 2, number % 2], sharey=first)
        first = first or axes
        for line, (name, points) in enumerate(_points(models, key).items()):
            x, y = [point[0] / unit for point in points], [point[1] for point in points]
            bars = [interval or (loss, loss) for _, loss, interval in points]
            below = [loss - low for loss, (low, _) in zip(y, bars, strict=True)]
            above = [high - loss for loss, (_, high) in zip(y, bars, strict=True)]
            axes.errorbar(
                x,
                y,
                (below, above),
                label=name if number == 0 else None,
                color=COLOURS[line % len(COLOURS)],
                marker=MARKERS[line % len(MARKERS)],
                markerfacecolor="none",
                capsize=3,
                linewidth=1.2,
            )
    figure.suptitle("what a loss costs")
    add_legend(figure, figure.axes[0])
    return figure


def text(models: Models) -> list[str]:
    """What each model costs, and its losses."""
    costs = table(
        ("model", "parameters", "learning rate", "ms a step", "MFLOP a token", "peak MB"),
        [
            (
                name,
                model["parameters"],
                f"{model['learning_rate']:.3g}{' (edge)' if model['rate_at_edge'] else ''}"
                if model["learning_rate"] is not None
                else None,
                model["step_ms"],
                model["flops_per_token"] / 1e6,
                None if model["peak_gb"] is None else 1e3 * model["peak_gb"],
            )
            for name, model in models.items()
        ],
    )
    header = ("loss [nats per token]", *(part for budget in BUDGETS for part in ("steps", f"equal {budget}")))
    rows = []
    for name, model in models.items():
        row: list[object] = [name]
        for budget in BUDGETS:
            one = model["budgets"].get(budget, {})
            row += [one.get("steps"), _with_interval(one)]
        rows.append(row)
    return [costs, table(header, rows)]


def _with_interval(one: Mapping[str, Any]) -> str | None:
    if one.get("loss") is None:
        return None
    low_high = one["interval"]
    return f"{one['loss']:.4f}" + ("" if low_high is None else f" ({low_high[0]:.4f} to {low_high[1]:.4f})")


def tables(models: Models) -> list[ResultTable]:
    """The costs, and the losses over each of the budgets."""
    rows = [
        [name, budget, *(one[key] for key in ("steps", "tokens", "flops", "seconds", "loss"))]
        for name, model in models.items()
        for budget, one in model["budgets"].items()
    ]
    columns = ("model", "budget", "steps", "tokens", "flops", "seconds", "loss")
    lines = [ResultTable(f"price {x}", columns, rows, lines=(x, "loss", "model")) for x in columns[3:6]]
    return [*model_tables("price", models, drawn="step_ms"), *lines]


BENCHMARK = Benchmark(
    measure={"step costs": measure_costs, "training": measure_training},
    judge=judge,
    plot=plot,
    shown=(
        Metric(
            "price_tokens_loss",
            "test loss [nats per token]",
            "equal tokens",
            {"price_flops_loss": "equal FLOPs", "price_seconds_loss": "equal seconds"},
            counted=False,
        ),
    ),
    trained=False,
    # The batch of a training, not that of other benchmarks.
    workload=lambda config: Workload(config.train.batch_size),
    check=check,
    tables=tables,
    text=text,
)
