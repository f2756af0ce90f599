"""What a page tells of runs, benchmarks and sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from muse.report.curves import MOST_RUNS, draw_curves, draw_losses, fallbacks
from muse.report.page import folded, page, paragraph, pictures, png, quoted, section, svg, table
from muse.report.recorded import Recorded, names_of, option_table
from muse.report.run_plot import draw_flow, draw_loss_curve, series
from muse.report.sweep import cell_table, draw_cells
from muse.report.table import show
from muse.runs.options import flattened, format_value

FIGURES = {
    "loss": "loss [nats/token]",
    "ppl": "perplexity",
    "word_ppl": "perplexity per word",
    "bits_per_byte": "bits per byte",
    "tokens": "tokens",
}
PASSES = {True: "pass", False: "fail", None: "open"}
# More runs are a row each.
MOST_COLUMNS = 4
# Inches, in which letters can still be read on a phone.
CURVE_WIDTH = 6.0

Named = Mapping[str, Recorded]


def report(runs: Sequence[Recorded], sweeps: Mapping[Path, list[dict[str, Any]]]) -> str:
    """The page about runs and benchmarks, and about the sweeps that some of them may be cells of.

    Args:
        runs: in the order in which they are shown.
        sweeps: their cells, by folder.
    """
    named = dict(zip(names_of(runs), runs, strict=True))
    trainings = {name: run for name, run in named.items() if not run.is_benchmark}
    benchmarks = {name: run for name, run in named.items() if run.is_benchmark}
    parts = [
        *(_sweep(folder, cells) for folder, cells in sweeps.items()),
        section("Results", _results(trainings)),
        *_benchmarks(benchmarks),
        section("Figures of the benchmarks", _values(benchmarks)) if len(benchmarks) > 1 else "",
        _curves(trainings),
        section("Memory at the peak of a step [MB]", _memory(trainings)),
        section("Samples", *_samples(trainings)),
        section("Options", *_options(named)),
        section("Made with", _made_with(named)),
    ]
    return page(_title(named, sweeps), "\n".join(part for part in parts if part))


def _title(named: Named, sweeps: Mapping[Path, Any]) -> str:
    if len(sweeps) == 1:
        (folder,) = sweeps
        return f"sweep {folder.resolve().name}"
    return next(iter(named)) if len(named) == 1 else f"{len(named)} runs"


def _beside(rows: Mapping[str, Sequence[object]], names: Sequence[str]) -> str:
    """A table of figures, of few runs with a column for each, of more with a row; without empty figures."""
    known = {figure: values for figure, values in rows.items() if any(value is not None for value in values)}
    if len(names) <= MOST_COLUMNS:
        return table(["", *names], [[figure, *values] for figure, values in known.items()])
    return table(
        ["", *known],
        [[name, *row] for name, row in zip(names, zip(*known.values(), strict=True), strict=True)],
    )


def _results(trainings: Named) -> str:
    rows: dict[str, list[object]] = {}
    for place, run in enumerate(trainings.values()):
        for figure, value in _result_of(run).items():
            rows.setdefault(figure, [None] * len(trainings))[place] = value
    return _beside(rows, list(trainings)) if trainings else ""


def _result_of(run: Recorded) -> dict[str, object]:
    result, last = run.result, run.metrics[-1] if run.metrics else {}
    wanted = (run.config.get("train") or {}).get("steps")
    finished = "finished" if result else f"not finished: step {show(last.get('step'))} of {show(wanted)}"
    speeds = [speed for _, speed in series(run.metrics, "train/tokens_per_second")]
    rows: dict[str, object] = {"state": finished}
    if not result:
        for key, label in (("train/loss", "training loss"), ("valid/loss", "validation loss, of a part")):
            points = series(run.metrics, key)
            rows[f"last {label}"] = points[-1][1] if points else None
    for split, name in (("valid", "validation"), ("test", "test")):
        found = result.get(split) or {}
        rows |= {f"{name} {label}": found.get(key) for key, label in FIGURES.items()}
    return rows | {
        "steps": result.get("steps", last.get("step")),
        "training tokens": result.get(
            "tokens", next((v for _, v in reversed(series(run.metrics, "train/tokens"))), None)
        ),
        "parameters": result.get("parameters"),
        "tokens/s": result.get("tokens_per_second", sorted(speeds)[len(speeds) // 2] if speeds else None),
        "seconds": result.get("seconds"),
        "fallbacks to checkpointing": fallbacks(run.metrics),
    }


def _benchmarks(benchmarks: Named) -> list[str]:
    titles = {f"Benchmark {name}": _benchmark(name, run) for name, run in benchmarks.items()}
    shown = section if len(benchmarks) <= MOST_COLUMNS else folded
    return [shown(title, body) for title, body in titles.items()]


def _benchmark(name: str, run: Recorded) -> str:
    result = run.result
    rows = [
        [row.get("criterion"), row.get("measured"), row.get("target"), PASSES.get(row.get("pass"), "open")]
        for row in result.get("criteria") or []
    ]
    notes = [paragraph(f"{key} is open: {reason}") for key, reason in (result.get("unjudged") or {}).items()]
    notes += [paragraph(f"{key} failed: {reason}") for key, reason in (result.get("failures") or {}).items()]
    parts = [
        table(("criterion", "measured", "target", "result"), rows),
        *notes,
        pictures({path.stem: png(path) for path in run.pictures}),
        folded("figures", _values({name: run})),
        *(
            folded(f"all that was measured: {measurement}", _details(models))
            for measurement, models in (result.get("details") or {}).items()
        ),
    ]
    return "\n".join(part for part in parts if part)


def _values(benchmarks: Named) -> str:
    """The single values of result.json."""
    values = [run.result.get("values") or {} for run in benchmarks.values()]
    keys = dict.fromkeys(key for of_run in values for key, value in of_run.items() if _is_single(value))
    return _beside({key: [of_run.get(key) for of_run in values] for key in keys}, list(benchmarks))


def _details(models: Mapping[str, Any]) -> str:
    columns = {name: values for name, values in models.items() if isinstance(values, dict)}
    keys = dict.fromkeys(key for own in columns.values() for key, value in own.items() if _is_single(value))
    return table(["", *columns], [[key, *(own.get(key) for own in columns.values())] for key in keys])


def _is_single(value: object) -> bool:
    return not isinstance(value, list | dict)


def _sweep(folder: Path, cells: list[dict[str, Any]]) -> str:
    if not cells:
        return ""
    lines, errors = cell_table(cells)
    figure = draw_cells(folder, cells)
    return section(
        f"Sweep {folder.resolve().name}",
        pictures({"what its cells measured": svg(figure)} if figure is not None else {}),
        table(list(map(str, lines[0])), lines[1:]),
        *map(paragraph, errors),
    )


def _curves(trainings: Named) -> str:
    logged = {name: run.metrics for name, run in trainings.items() if run.metrics}
    if not logged:
        return ""
    # Two dollars would be a formula in a picture.
    metrics = {name.replace("$", r"\$"): logged[name] for name in list(logged)[:MOST_RUNS]}
    more = len(logged) - len(metrics)
    if len(metrics) == 1:
        figures = {"loss": draw_loss_curve(next(iter(metrics.values())), "")}
    else:
        figures = {
            "loss: training thin, validation with markers, the whole split as a star": draw_losses(metrics)
        }
    flows = {f"each flow of {name}": draw_flow(logged[name], "") for name in list(logged)[:MOST_RUNS]}
    drawn = {name: svg(figure) for name, figure in flows.items() if figure is not None}
    shown = {
        name: svg(figure, CURVE_WIDTH) for name, figure in (figures | draw_curves(metrics)).items() if figure
    }
    return section(
        "Curves",
        paragraph(f"The first {len(metrics)} runs; {more} more have curves, too.", "quiet") if more else "",
        pictures(shown),
        pictures(drawn) if len(metrics) == 1 else folded("each flow of each run", pictures(drawn)),
    )


def _memory(trainings: Named) -> str:
    measured = {name: run.memory for name, run in trainings.items() if run.memory}
    holders = dict.fromkeys(holder for of_run in measured.values() for holder in of_run)
    rows = {
        holder: [
            size / 1e6 if (size := of_run.get(holder)) is not None else None for of_run in measured.values()
        ]
        for holder in holders
    }
    return _beside(rows, list(measured)) if measured else ""


def _samples(trainings: Named) -> list[str]:
    return [paragraph(name, "quiet") + quoted(run.sample) for name, run in trainings.items() if run.sample]


def _options(named: Named) -> list[str]:
    runs = list(named.values())
    if not runs:
        return []
    if len(runs) == 1:
        parts = [paragraph(f"Given: {' '.join(runs[0].given)}")] if runs[0].given else []
    else:
        rows = option_table(runs)
        parts = [_beside(rows, list(named)) if rows else paragraph("All runs have the same options.")]
    return parts + [folded(f"all options of {name}", _all_options(run.config)) for name, run in named.items()]


def _all_options(config: Mapping[str, Any]) -> str:
    return table(
        ("option", "value"), [[name, format_value(value)] for name, value in flattened(config).items()]
    )


def _made_with(named: Named) -> str:
    rows: dict[str, list[object]] = {}
    for place, run in enumerate(named.values()):
        made = run.made_with
        machine = run.result.get("machine")
        told = {
            "folder": str(run.folder),
            "time": made.get("time"),
            "commit": made.get("commit"),
            "seed": format_value(made.get("seed")),
            "device": made.get("device") or (machine.get("device") if isinstance(machine, dict) else None),
            "ranks": made.get("ranks"),
            "resumed from": made.get("resumed_from"),
            **(made.get("versions") or {}),
        }
        for name, value in told.items():
            rows.setdefault(name, [None] * len(named))[place] = value
    return _beside(rows, list(named))
