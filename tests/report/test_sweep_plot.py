"""What the picture of a sweep shows, as matplotlib's objects tell it."""

from __future__ import annotations

import math

import pytest
from matplotlib.colors import to_hex

from muse.benchmarks.presentation import METRICS
from muse.report.sweep import swept_options
from muse.report.sweep_plot import draw_search, draw_sweep, scale_of

FLOW = ("vram_symplectic_gb", "vram_reversible_gb", "vram_checkpoint_gb", "vram_full_backprop_gb")
ENTRIES = ["best so far", "trial", "best trial", "failed trial"]


def cell(options, status="trained", **values):
    return {"options": dict(pair.split("=", 1) for pair in options.split()), "status": status, **values}


def sweep(option, values, key="valid_loss"):
    """Cells of a sweep over one option that measured 2.0, 3.0, ..."""
    return [cell(f"{option}={value}", **{key: 2.0 + n}) for n, value in enumerate(values)]


def draw(cells):
    return draw_sweep(cells, swept_options(cells), METRICS)


def texts(labels):
    return [label.get_text() for label in labels]


def legend_of(figure):
    (legend,) = figure.legends
    return texts(legend.get_texts())


def lines_of(axes):
    """Points of every line with a name."""
    return {
        line.get_label(): list(zip(*map(list, line.get_data()), strict=True))
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("stage", ["0", "1", "2"]),
        ("stage", ["0", "3a"]),
        ("optim", ["adamw", "muon"]),
        ("stage.gradient", ["exact", "backprop"]),
        ("hardware.compile", ["true", "false"]),
        ("train.eval_stride", ["null", "4"]),
        ("seed", ["0", "10", "20"]),
    ],
)
@pytest.mark.parametrize("key", ["valid_loss", "tokens_per_second"])
def test_names_stand_as_they_are_one_after_the_other(option, values, key, overlapping):
    figure = draw(sweep(option, values, key))
    (axes,) = figure.axes
    assert axes.get_ylabel() == option
    assert texts(axes.get_yticklabels()) == values
    assert list(axes.get_yticks()) == list(range(len(values)))
    assert overlapping(figure, axes.texts) == []
    assert texts(axes.texts) == [str(2 + number) for number in range(len(values))]
    if key == "valid_loss":
        (line,) = axes.lines
        assert list(line.get_xdata()) == [2.0 + number for number in range(len(values))]
    else:
        assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [
            (0, 2.0 + number) for number in range(len(values))
        ]
        assert axes.get_xlim()[0] == 0


@pytest.mark.parametrize(
    ("option", "values", "log"),
    [
        ("optim.lr", ["0.01", "0.001", "0.003"], True),
        ("benchmark.ode_steps", ["5", "10", "20", "40"], True),
        ("benchmark.seq_len", ["512", "1024", "4096"], True),
        ("optim.warmup", ["10", "20"], False),
        ("optim.warmup", ["10", "20", "30", "40"], False),
        ("optim.weight_decay", ["0", "0.01", "1"], False),
    ],
)
def test_numbers_stand_where_they_are_with_a_tick_each(option, values, log):
    (axes,) = draw(sweep(option, values)).axes
    assert axes.get_xscale() == ("log" if log else "linear")
    ordered = sorted(values, key=float)
    assert list(axes.get_xticks()) == [float(value) for value in ordered]
    assert texts(axes.get_xticklabels()) == ordered
    ((name, points),) = lines_of(axes).items()
    assert points == sorted((float(value), 2.0 + number) for number, value in enumerate(values))
    assert texts(axes.texts) == [name]


def test_what_was_searched_on_a_logarithmic_scale_is_shown_on_one():
    cells = sweep("optim.lr", ["0.009", "0.01", "0.011"])
    assert scale_of("optim.lr", cells, log=True).log
    assert not scale_of("optim.lr", cells, log=False).log
    assert not scale_of("optim.lr", sweep("optim.lr", ["0", "0.01"]), log=True).log


def test_numbers_are_the_axis_and_the_names_beside_them_the_lines():
    cells = [
        cell(f"stage={stage} optim.lr={lr}", valid_loss=float(f"{stage}{lr}"))
        for stage in (0, 1, 2)
        for lr in ("1", "2")
    ]
    (axes,) = draw(cells).axes
    assert axes.get_xlabel() == "optim.lr"
    assert lines_of(axes) == {
        f"stage={stage}": [(1.0, 10.0 * stage + 1), (2.0, 10.0 * stage + 2)] for stage in (0, 1, 2)
    }
    assert sorted(texts(axes.texts)) == [f"stage={stage}" for stage in (0, 1, 2)]


def test_names_beside_names_are_groups_of_bars(overlapping):
    cells = [
        cell(f"stage.activation={activation} stage.norm={norm}", tokens_per_second=number + 1.0)
        for number, norm in enumerate(("rms", "layer"))
        for activation in ("cardioid", "z_relu", "mod_relu")
    ]
    figure = draw(cells)
    (axes,) = figure.axes
    assert texts(axes.get_yticklabels()) == ["cardioid", "z_relu", "mod_relu"]
    assert legend_of(figure) == ["norm=rms", "norm=layer"]
    assert [bar.get_width() for bar in axes.patches] == [1.0] * 3 + [2.0] * 3
    assert overlapping(figure, [axes.patch, *figure.legends]) == []
    assert overlapping(figure, list(axes.patches)) == []


def test_seeds_are_dots_around_their_mean():
    cells = [
        cell(f"optim.lr={lr} seed={seed}", valid_loss=10.0 * lr + seed) for lr in (1, 2) for seed in (0, 1, 5)
    ]
    figure = draw(cells)
    (axes,) = figure.axes
    assert "seed" in axes.get_title()
    assert list(lines_of(axes).values()) == [[(1.0, 12.0), (2.0, 22.0)]]
    (dots,) = [line for line in axes.lines if line.get_label().startswith("_")]
    assert list(dots.get_ydata()) == [10.0, 11.0, 15.0, 20.0, 21.0, 25.0]
    assert dots.get_color() == axes.lines[0].get_color()

    named = [
        cell(f"stage={stage} seed={seed}", valid_loss=stage + seed) for stage in (0, 2) for seed in (0, 1)
    ]
    figure = draw(named)
    (axes,) = figure.axes
    assert axes.get_ylabel() == "stage"
    assert legend_of(figure) == ["mean", "each seed"]
    assert list(axes.lines[0].get_xdata()) == [0.5, 2.5]
    assert list(axes.lines[1].get_xdata()) == [0, 1, 2, 3]


def test_more_combinations_than_can_be_told_apart_have_a_panel_for_each_option():
    cells = [
        cell(f"optim={optim} stage={stage} stage.norm={norm} optim.lr={lr}", valid_loss=lr + stage)
        for optim in ("adamw", "muon")
        for stage in (0, 1, 2)
        for norm in ("rms", "layer")
        for lr in (1, 2)
    ]
    figure = draw(cells)
    assert {axes.get_xlabel() for axes in figure.axes} == {"optim", "stage", "stage.norm", "optim.lr"}
    assert legend_of(figure) == ["cell", "mean"]
    for axes in figure.axes:
        dots, means = axes.lines
        assert len(dots.get_xdata()) == len(cells)
        if axes.get_xlabel() == "stage":
            assert texts(axes.get_xticklabels()) == ["0", "1", "2"]
            assert list(means.get_ydata()) == [1.5, 2.5, 3.5]


def test_the_ways_to_the_gradient_stand_beside_each_other_and_over_full_backpropagation():
    cells = [
        cell(f"benchmark.seq_len={length}", **dict(zip(FLOW, (1.0, 1.0, 2.0, 4.0 * n), strict=True)))
        for n, length in enumerate((512, 1024, 2048), 1)
    ]
    above, below = draw(cells).axes
    names = ["exact", "reversible", "checkpoint", "backprop"]
    assert list(lines_of(above)) == names
    assert sorted(texts(above.texts)) == sorted(names)
    assert above.get_ylim()[0] == below.get_ylim()[0] == 0
    assert below.get_ylabel() == "ratio to backprop"
    assert list(lines_of(below)) == names[:3]
    assert [y for _, y in lines_of(below)["exact"]] == pytest.approx([1 / 4, 1 / 8, 1 / 12])
    colours = [{line.get_label(): line.get_color() for line in axes.lines} for axes in (above, below)]
    assert colours[1].items() <= colours[0].items()


def test_a_baseline_that_is_the_same_beside_every_line_is_drawn_once():
    def lines(baseline):
        cells = [
            cell(f"stage.norm={n} benchmark.seq_len={s}", vram_gb=s, vram_baseline_gb=baseline(n, s))
            for n in ("rms", "layer")
            for s in (10, 20)
        ]
        return set(lines_of(draw(cells).axes[0]))

    assert lines(lambda _, length: 2 * length) == {"norm=rms", "norm=layer", "stage 0"}
    assert lines(lambda norm, length: length + len(norm)) == {
        "norm=rms", "norm=layer", "stage 0 norm=rms", "stage 0 norm=layer"
    }  # fmt: skip


def test_what_stands_beside_is_left_out_where_the_lines_are_too_many():
    cells = [
        cell(
            f"stage.flows={flows} benchmark.seq_len={length}", **dict(zip(FLOW, range(n, n + 4), strict=True))
        )
        for n, flows in enumerate("abcd", 1)
        for length in (10, 20)
    ]
    assert list(lines_of(draw(cells).axes[0])) == [f"flows={flows}" for flows in "abcd"]
    assert len(lines_of(draw(cells[:4]).axes[0])) == 8


def test_a_baseline_that_measured_nothing_in_common_is_no_reference():
    cells = [
        cell("stage=0 benchmark.seq_len=10", vram_gb=2.0),
        cell("stage=0 benchmark.seq_len=20", "failed"),
        cell("stage=1 benchmark.seq_len=10", "failed"),
        cell("stage=1 benchmark.seq_len=20", vram_gb=2.0),
    ]
    assert set(lines_of(draw(cells).axes[0])) == {"stage=0", "stage=1"}


def test_stages_beside_each_other_are_measured_alike_and_have_no_baseline():
    cells = [
        cell("stage=0", vram_gb=2.0),
        cell("stage=1", vram_gb=1.0, vram_baseline_gb=2.0),
        cell("stage=2", **dict(zip(FLOW, (1.5, 1.5, 2.0, 6.0), strict=True))),
    ]
    (axes,) = draw(cells).axes
    assert [bar.get_width() for bar in axes.patches] == [2.0, 1.0, 1.5]


def test_of_a_stage_that_has_another_value_of_the_same_name_that_of_the_flow_is_drawn():
    three = [
        cell(f"stage=3 stage.flows={n}", vram_gb=7.0, **dict(zip(FLOW, (n, n, n, 9.0), strict=True)))
        for n in (1, 2)
    ]
    (axes,) = draw([cell("stage=1", vram_gb=3.0), three[0]]).axes
    assert [bar.get_width() for bar in axes.patches] == [3.0, 1.0]
    lines = lines_of(draw(three).axes[0])
    assert lines["exact"] == [(1.0, 1.0), (2.0, 2.0)]
    assert lines["backprop"] == [(1.0, 9.0), (2.0, 9.0)]
    assert 7.0 not in {y for points in lines.values() for _, y in points}


def test_a_difference_of_rounding_does_not_look_large():
    (axes,) = draw(
        [cell("stage.gradient=exact", valid_loss=5.0), cell("stage.gradient=backprop", valid_loss=5.000001)]
    ).axes
    low, high = axes.get_xlim()
    assert high - low > 0.01


def test_numbers_that_are_far_apart_are_on_a_logarithmic_axis():
    (axes,) = draw([cell(f"benchmark.dt={n}", grad_norm_max=10.0**n) for n in (1, 2, 3)]).axes
    assert axes.get_yscale() == "log"


def test_a_cell_that_measured_nothing_keeps_its_name():
    cells = [
        cell("stage.norm=rms", valid_loss=2.0),
        cell("stage.norm=layer", status="failed", valid_loss=None),
    ]
    (axes,) = draw(cells).axes
    assert texts(axes.get_yticklabels()) == ["rms", "layer"]
    assert draw_sweep(cells[1:], ["stage.norm"]) is None
    assert draw_sweep([cell("seed=0", valid_loss=math.inf)], ["seed"]) is None


SEARCHED = {"optim.lr": True, "optim.warmup": False, "optim": False}


def trials():
    """Ten trials; the second one and the last one fail, and trial 4 is the best."""
    losses = [5.0, None, 6.0, 4.5, 3.0, 5.5, 4.0, 3.5, 7.0, None]
    return [
        cell(
            f"optim.lr={0.001 * 2**number} optim.warmup={number % 4} optim={('adamw', 'muon')[number % 2]}",
            **({"status": "failed", "error": "it diverged"} if loss is None else {"valid_loss": loss}),
        )
        for number, loss in enumerate(losses)
    ]


def test_a_search_shows_the_objective_over_its_trials_and_the_best_so_far():
    figure = draw_search(trials(), SEARCHED)
    over_trials = figure.axes[0]
    drawn = lines_of(over_trials)
    assert drawn["trial"] == [(0, 5.0), (2, 6.0), (3, 4.5), (4, 3.0), (5, 5.5), (6, 4.0), (7, 3.5), (8, 7.0)]
    best = dict(drawn["best so far"])
    assert [best[number] for number in (0, 2, 3, 4, 5, 9)] == [5.0, 5.0, 4.5, 3.0, 3.0, 3.0]
    assert over_trials.lines[0].get_drawstyle() == "steps-post"
    assert drawn["best trial"] == [(4, 3.0)]
    assert [x for x, _ in drawn["failed trial"]] == [1, 9]
    assert "number 4" in figure.get_suptitle()


def test_a_search_has_a_panel_for_each_option_and_a_legend_of_what_is_drawn(overlapping):
    figure = draw_search(trials(), SEARCHED)
    over_trials, *panels = figure.axes
    assert [axes.get_xlabel() for axes in panels] == list(SEARCHED)
    assert [axes.get_xscale() for axes in panels] == ["log", "linear", "linear"]
    assert texts(panels[2].get_xticklabels()) == ["adamw", "muon"]
    assert sorted(legend_of(figure)) == sorted(ENTRIES)
    for axes in panels:
        assert axes.get_ylim() == over_trials.get_ylim()
        assert len(lines_of(axes)["trial"]) == 8
        assert len(lines_of(axes)["failed trial"]) == 2
    assert lines_of(panels[0])["best trial"] == [(0.016, 3.0)]
    assert overlapping(figure, [*(axes.patch for axes in figure.axes), *figure.legends]) == []
    colours = {to_hex(line.get_color()) for line in over_trials.lines}
    assert len(colours) == 3


def test_the_ticks_of_a_search_do_not_lie_on_each_other(overlapping):
    searched = {"optim.lr": False, "optim.warmup": False, "stage.activation": False}
    cells = [
        cell(
            f"optim.lr={1 / (3 + n)} optim.warmup={n} stage.activation=the_long_name_of_number_{n}",
            valid_loss=5.0,
        )
        for n in range(5)
    ]
    figure = draw_search(cells, searched)
    for axes in figure.axes:
        assert overlapping(figure, axes.get_xticklabels()) == []
    assert texts(figure.axes[2].get_xticklabels()) == list("01234")


@pytest.mark.parametrize("count", [1, 4, 7])
def test_a_search_over_any_number_of_options(count):
    searched = {f"optim.option{number}": False for number in range(count)}
    cells = [
        cell(" ".join(f"{name}={number}" for name in searched), valid_loss=5.0 - number)
        for number in range(3)
    ]
    assert len(draw_search(cells, searched).axes) == 1 + count


def test_a_search_without_a_trial_that_ended_has_no_picture():
    assert draw_search([cell("optim.lr=1", status="unfinished")], SEARCHED) is None
    figure = draw_search(trials()[:1], SEARCHED)
    assert "failed trial" not in legend_of(figure)
