import dataclasses
import json
from pathlib import Path

import hydra
import pytest
from hydra import initialize_config_dir
from support.commands import default_stage

from muse.benchmarks import suite
from muse.benchmarks.suite import measure_isolated
from muse.config import BENCHMARKS, CONF, GRADIENTS, TrainConfig, build_config, register_schemas
from muse.errors import RunError
from muse.launch.bench import composed_stage

GOOD = {
    "vram": lambda config: {"peak": 0.5 if config.stage.number != "0" else 1.0},
    "throughput": lambda config: {
        "tokens_per_second": 10.0,
        "products_ratio": 1.1,
        "products_and_sdpa_ratio": 1.0,
    },
    "stability": lambda config: {"inputs": 3, "nan_count": 0, "inf_count": 0},
    "gradients": lambda config: {"grad_norm_min": 1e-3, "grad_norm_max": 1.0},
    "perplexity": lambda config: {"ppl": 20.0, "trained": "untrained", "parameters": 1000},
}
ENERGY = {
    "mean_energy": 30.0,
    "max_drift": 1e-6,
    "mean_drift": 1e-7,
    "energy_trajectory": [30.0, 30.0],
    "leapfrog_max_drift": 1e-3,
    "curvature_dt2": 0.02,
    "monotone_share": 0.0,
}
GOOD_FLOW = {
    **GOOD,
    "vram": lambda config: {
        "peak": 9.0 if config.stage.gradient == "backprop" else 1.0,
        "activations": 0.5,
        "flow/reconstruction_error": 0.0,
        "flow/fallbacks": 0.0,
    },
    "modes": lambda config: {
        "tokens_per_second": 10.0,
        "ratio_exact_to_backprop": 1.3,
        "ratio_checkpoint_to_backprop": 1.3,
        **{f"gradient_error_{mode}": 1e-7 for mode in GRADIENTS},
        "gradient_error_allowed": 1e-5,
        "gradients_correct": True,
        "fallbacks_exact": 0,
    },
    "energy": lambda config: ENERGY,
    "trained energy": lambda config: ENERGY,
    "koopman": lambda config: {
        "linearity_error": 1e-6,
        "speedup": 3.9,
        "state_bytes": 900,
        "state_growth": 0,
    },
    "mera": lambda config: {"causal": True, "time_ms": 30.0, "time_ratio": 2.0},
    "dialectic": lambda config: {"gain": 0.4, "last": 0.01, "grad_norm": 0.1},
    "selection": lambda config: SELECTION,
}
SELECTION = {
    "documents": 8, "left_out": 3, "windows": 1024,
    "shares": {"0.2": {"filtered": 0.83, "samples": 100}, "0.6": {"filtered": 0.4, "samples": 90}},
}  # fmt: skip
STAGE_2_KEYS = [
    "stage2_ppl",
    "stage1_ppl",
    "ppl_ratio",
    "ppl_diff_pct",
    "ppl_target",
    "ppl_pass",
    "mean_energy",
    "max_drift",
    "mean_drift",
    "energy_trajectory",
    "monotonic_violation",
    "energy_pass",
    "vram_symplectic_gb",
    "vram_full_backprop_gb",
    "vram_reduction_ratio",
    "vram_reduction_pct",
    "vram_pass",
    "reconstruction_error",
    "fallback_count",
    "all_pass",
]
STAGE_1_KEYS = [
    "ppl",
    "ppl_ratio",
    "ppl_pass",
    "vram_gb",
    "vram_ratio",
    "vram_pass",
    "tokens_per_second",
    "nan_count",
    "inf_count",
    "grad_norm_min",
    "grad_norm_max",
    "stability_pass",
    "gradient_pass",
    "all_pass",
]


def test_every_value_of_the_option_is_a_benchmark_with_a_file_of_options():
    files = {path.stem for path in (CONF / "benchmark").glob("*.yaml")}
    assert files == set(BENCHMARKS) == {*suite.BENCHMARKS, "all"}
    assert set(suite.ALL) < set(suite.BENCHMARKS)


def test_measurements_have_names_of_their_own():
    declared = {pair for benchmark in suite.BENCHMARKS.values() for pair in benchmark.measure.items()}
    assert len(declared) == len(suite.MEASUREMENTS)


@pytest.mark.parametrize("number", ["0", "1", "2", "3"])
def test_a_stage_is_composed_as_a_command_that_says_nothing_else_has_it(compose, number):
    composed = compose("bench", overrides=[f"stage='{number}'"])
    assert composed_stage(number) == build_config(composed).stage


@pytest.fixture
def compose():
    register_schemas()
    with initialize_config_dir(config_dir=str(CONF.resolve()), version_base="1.3"):
        yield hydra.compose


def run(monkeypatch, config, **changed):
    return reported(monkeypatch, config, **changed).values


def reported(monkeypatch, config, **changed):
    measured = {**(GOOD_FLOW if config.stage.flowing else GOOD), **changed}
    monkeypatch.setattr(suite, "measure_isolated", lambda name, config: measured[name](config))
    return suite.run_suite(config, Path("unused"), default_stage)


def test_all_passes_when_everything_does_and_has_the_keys_of_the_seeds(bench_config, monkeypatch):
    values = run(monkeypatch, bench_config(1))
    assert values["all_pass"] is True
    assert [key for key in STAGE_1_KEYS if key not in values] == []


def test_stage_2_passes_when_everything_does_and_has_the_keys_of_the_seeds(bench_config, monkeypatch):
    values = run(monkeypatch, bench_config(2))
    assert values["all_pass"] is True
    assert [key for key in STAGE_2_KEYS if key not in values] == []
    assert values["vram_reduction_ratio"] == pytest.approx(8 / 9)
    assert values["ppl_diff_pct"] == 0


STAGE_3_KEYS = [
    *(f"{before}{name}_ppl" for before in ("", "phase2_") for name in ("wikitext2", "ptb", "c4")),
    *(f"{name}_ppl_pass" for name in ("wikitext2", "ptb", "c4")),
    *("ppl_ratio", "ppl_pass", "vram_gb", "vram_gb_pass", "vram_pass", "reconstruction_pass"),
    *("vram_reversible_trunk_reduction", "vram_reversible_trunk_pass"),
    *("throughput", "phase2_throughput", "throughput_ratio", "throughput_pass"),
    *("koopman_linearity_error", "koopman_linearity_pass", "koopman_speedup", "koopman_speedup_pass"),
    *("koopman_state_growth", "koopman_state_pass"),
    *("mera_time_ms", "mera_time_pass", "mera_time_ratio", "mera_time_ratio_pass", "mera_causal"),
    *("dialectic_gain", "dialectic_pass", "dialectic_grad_norm", "dialectic_grad_norm_pass"),
    *("filter_rate", "filter_rate_pass", "selection_samples", "selection_samples_pass"),
    *("energy_pass", "gradient_pass", "stability_pass", "all_pass"),
]


@pytest.fixture
def integrated(bench_config, tmp_path):
    """Stage 3 with every part and every text, at two windows of 16 tokens."""
    (tmp_path / "text.txt").write_text("a")
    config = bench_config(3, **dict.fromkeys(("wikitext2", "ptb", "c4"), str(tmp_path / "text.txt")))
    return dataclasses.replace(
        config,
        stage=dataclasses.replace(config.stage, koopman="replace", mera="add", dialectic="mlp"),
        optim=dataclasses.replace(config.optim, selection="high"),
    )


def perplexity(own, other=20.0):
    """Answers the perplexity of stage 3, and that of the others, of every text."""

    def answer(config):
        ppl = own if config.stage.number == "3" else other
        corpora = dict.fromkeys(("wikitext2", "ptb", "c4"), ppl)
        return {"ppl": ppl, "trained": "", "parameters": 1000, "corpora": corpora}

    return answer


def test_stage_3_passes_when_everything_does_and_is_measured_beside_stage_2(integrated, monkeypatch):
    config = integrated
    fine = {"perplexity": perplexity(20.0)}
    values = run(monkeypatch, config, **fine)
    assert values["all_pass"] is True
    assert [key for key in STAGE_3_KEYS if values.get(key) is None] == []
    assert values["filter_rate"] == 0.83
    assert values["vram_reversible_trunk_reduction"] == pytest.approx(8 / 9)
    assert values["stage3_ppl"] == values["stage2_ppl"] == values["stage1_ppl"] == values["stage0_ppl"] == 20
    assert values["koopman_linearity_error"] == 1e-6
    assert values["mera_time_ms"] == 30
    assert values["dialectic_gain"] == 0.4
    assert values["throughput_ratio"] == 1
    for measurement, answer, flag in (
        ("koopman", changed_answer("koopman", linearity_error=6e-4), "koopman_linearity_pass"),
        ("koopman", changed_answer("koopman", speedup=2.9), "koopman_speedup_pass"),
        ("koopman", changed_answer("koopman", state_growth=8), "koopman_state_pass"),
        ("selection", changed_answer("selection", shares=shares(filtered=0.8)), "filter_rate_pass"),
        ("selection", changed_answer("selection", shares=shares(samples=99)), "selection_samples_pass"),
        ("vram", changed_vram("exact", **{"flow/reconstruction_error": 1e-9}), "reconstruction_pass"),
        ("vram", lambda c: vram_of(c, 7.9 if c.benchmark.batch_size == 1 else 1.0), "vram_gb_pass"),
        (
            "vram",
            lambda c: vram_of(c, 1.4 if c.stage.trunk == "reversible" else 1.0),
            "vram_reversible_trunk_pass",
        ),
        ("mera", lambda c: {"causal": True, "time_ms": 51.0, "time_ratio": 2.0}, "mera_time_pass"),
        ("mera", lambda c: {"causal": True, "time_ms": 30.0, "time_ratio": 2.2}, "mera_time_ratio_pass"),
        ("mera", lambda c: {"causal": False, "time_ms": None, "time_ratio": None}, "mera_causal"),
        ("dialectic", lambda c: {"gain": 0.2, "last": 0.01, "grad_norm": 0.1}, "dialectic_pass"),
        ("dialectic", lambda c: {"gain": 0.4, "last": 0.01, "grad_norm": 1e-7}, "dialectic_grad_norm_pass"),
        (
            "throughput",
            lambda c: {"tokens_per_second": 8.0 if c.stage.number == "3" else 10.0},
            "throughput_pass",
        ),
        ("perplexity", perplexity(20.1), "ppl_pass"),
        ("perplexity", perplexity(21.1), "c4_ppl_pass"),
    ):
        values = run(monkeypatch, config, **{**fine, measurement: answer})
        assert values[flag] is False, flag
        assert values["all_pass"] is False


def test_parts_that_stage_3_does_without_leave_their_keys_open_and_say_why(bench_config, monkeypatch):
    report = reported(monkeypatch, bench_config(3))
    values = report.values
    assert [key for key in STAGE_3_KEYS if key not in values] == []
    assert values["all_pass"] is None
    assert report.failures == {}
    open_ = {
        "koopman_linearity_error": "stage.koopman=replace or stage.koopman=add",
        "koopman_speedup": "stage.koopman=replace or stage.koopman=add",
        "mera_time_ms": "stage.mera=none has none; it needs stage.mera=replace or stage.mera=add",
        "mera_time_ratio": "stage.mera=add",
        "dialectic_gain": "stage.dialectic=mlp or stage.dialectic=hamiltonian",
        "filter_rate": "it needs optim.selection=high or optim.selection=reducible or",
        "selection_samples": "optim.selection=none leaves no token out",
        "ptb_ppl_pass": "benchmark.ptb=FILE",
    }
    for key, told in open_.items():
        assert values[key] is None, key
        assert told in report.unjudged[key], key
    assert values["throughput_ratio"] == 1
    flags = {key for key in STAGE_3_KEYS if key.endswith("_pass")} - {"all_pass"} | {"mera_causal"}
    # So that what is open keeps all_pass open.
    assert [passed for *_, passed in report.criteria].count(None) == sum(values[key] is None for key in flags)


def test_loops_have_no_reversible_trunk(integrated, monkeypatch):
    config = dataclasses.replace(integrated, stage=dataclasses.replace(integrated.stage, loops=2))
    report = reported(monkeypatch, config, perplexity=perplexity(20.0))
    assert report.values["vram_reversible_trunk_pass"] is report.values["all_pass"] is None
    assert "stage.loops=2" in report.unjudged["vram_reversible_trunk_reduction"]
    assert report.values["vram_gb_pass"] is True


def test_a_reversible_trunk_is_measured_once(integrated, monkeypatch):
    config = dataclasses.replace(
        integrated, stage=dataclasses.replace(integrated.stage, trunk="reversible"),
        benchmark=dataclasses.replace(integrated.benchmark, name="vram"),
    )  # fmt: skip
    seen = []

    def answer(config):
        seen.append((config.stage.trunk, config.stage.gradient, config.benchmark.batch_size))
        return vram_of(config, 0.7)

    report = reported(monkeypatch, config, vram=answer)
    assert seen.count(("reversible", "exact", 2)) == 2  # The second one compares what it rebuilds.
    assert ("residual", "backprop", 2) in seen
    assert report.values["vram_reversible_trunk_gb"] == report.values["vram_symplectic_gb"] == 0.7


def vram_of(config, peak):
    measured = GOOD_FLOW["vram"](config)
    return measured if config.stage.gradient == "backprop" else {**measured, "peak": peak}


def changed_answer(measurement, **changed):
    return lambda config: {**GOOD_FLOW[measurement](config), **changed}


def shares(**changed):
    return {**SELECTION["shares"], "0.2": {**SELECTION["shares"]["0.2"], **changed}}


def changed_vram(gradient, **changed):
    def answer(config):
        return {**GOOD_FLOW["vram"](config), **(changed if config.stage.gradient == gradient else {})}

    return answer


@pytest.mark.parametrize(
    ("measurement", "answer", "flag"),
    [
        ("vram", changed_vram("backprop", peak=3.2), "vram_pass"),
        ("vram", changed_vram("exact", peak=7.6), "vram_pass"),
        ("energy", lambda c: {**ENERGY, "max_drift": 6e-5}, "energy_pass"),
        ("trained energy", lambda c: {**ENERGY, "max_drift": 6e-5}, "energy_pass"),
        ("trained energy", lambda c: {**ENERGY, "monotone_share": 0.02}, "energy_pass"),
        (
            "perplexity",
            lambda c: {"ppl": 20.5 if c.stage.number == "2" else 20.0, "trained": "", "parameters": 1000},
            "ppl_pass",
        ),
    ],
)
def test_one_miss_fails_all_of_stage_2(bench_config, monkeypatch, measurement, answer, flag):
    values = run(monkeypatch, bench_config(2), **{measurement: answer})
    assert values[flag] is False
    assert values["all_pass"] is False


@pytest.mark.parametrize(
    ("measurement", "answer"),
    [
        ("vram", changed_vram("exact", **{"flow/fallbacks": 1.0})),
        ("vram", changed_vram("exact", **{"flow/reconstruction_error": 1e-5})),
        ("modes", lambda c: {**GOOD_FLOW["modes"](c), "ratio_exact_to_backprop": 1.7}),
        (
            "perplexity",
            lambda c: {"ppl": 20.0, "trained": "", "parameters": 1040 if c.stage.number == "2" else 1000},
        ),
    ],
)
def test_a_miss_without_a_key_of_its_own_fails_all(bench_config, monkeypatch, measurement, answer):
    assert run(monkeypatch, bench_config(2), **{measurement: answer})["all_pass"] is False


def test_flows_that_rebuild_nothing_have_no_reconstruction_error(bench_config, monkeypatch):
    def answer(config):
        measured = GOOD_FLOW["vram"](config)
        if config.stage.verify:
            del measured["flow/reconstruction_error"]
            measured["flow/fallbacks"] = 4.0
        return measured

    report = reported(monkeypatch, bench_config(2), vram=answer)
    assert report.values["reconstruction_error"] is report.values["all_pass"] is None
    assert report.values["fallback_count"] == 4
    assert "fell back" in report.unjudged["reconstruction_error"]
    assert report.failures == {}


def test_the_time_of_a_mode_that_fell_back_is_not_judged(bench_config, monkeypatch):
    fell_back = {"fallbacks_exact": 2, "ratio_exact_to_backprop": None, "tokens_per_second": None}
    report = reported(monkeypatch, bench_config(2), modes=lambda c: {**GOOD_FLOW["modes"](c), **fell_back})
    assert report.values["step_ratio_backprop"] is report.values["all_pass"] is None
    assert "2 flows of exact" in report.unjudged["step_ratio_backprop"]


@pytest.mark.parametrize("error", [1e-4, None])
def test_a_wrong_gradient_is_a_failure(bench_config, monkeypatch, error):
    wrong = {
        "gradients_correct": False, "gradient_error_reversible": error, "ratio_exact_to_backprop": None,
        "ratio_checkpoint_to_backprop": None,
    }  # fmt: skip
    report = reported(monkeypatch, bench_config(2), modes=lambda c: {**GOOD_FLOW["modes"](c), **wrong})
    (row,) = [row for row in report.criteria if row[0].startswith("gradient error")]
    assert row[1:] == (error, "<= 1e-05", False)
    assert report.values["gradients_correct"] is False


def test_full_backpropagation_that_does_not_fit_leaves_its_criterion_open(bench_config, monkeypatch):
    def answer(config):
        if config.stage.gradient == "backprop":
            raise RunError("out of GPU memory")
        return GOOD_FLOW["vram"](config)

    values = run(monkeypatch, bench_config(2), vram=answer)
    assert values["vram_symplectic_gb"] == 1.0
    assert values["vram_reduction_ratio"] is None
    assert values["vram_pass"] is None
    assert values["all_pass"] is None


@pytest.fixture
def run_of(tmp_path):
    """The folder of a run of so many steps."""

    def build(config, steps):
        folder = tmp_path / f"{config.stage.number}-{steps}"
        folder.mkdir()
        config = dataclasses.replace(config, train=TrainConfig(steps=steps))
        (folder / "run.json").write_text(json.dumps({"config": dataclasses.asdict(config)}))
        return str(folder)

    return build


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("given", ["checkpoint", "baseline_checkpoint"])
def test_a_checkpoint_is_not_judged_beside_a_few_steps_of_training(
    bench_config, monkeypatch, run_of, stage, given
):
    of = stage if given == "checkpoint" else stage - 1
    seen = []

    def answer(config):
        seen.append(config.stage.number)
        return GOOD["perplexity"](config)

    config = bench_config(stage, name="perplexity", **{given: run_of(bench_config(of), 800)})
    report = reported(monkeypatch, config, perplexity=answer)
    assert seen == [str(stage)]
    values = report.values
    assert values["ppl_ratio"] is values["ppl_pass"] is values["all_pass"] is None
    missing = {"checkpoint": "baseline_checkpoint", "baseline_checkpoint": "checkpoint"}[given]
    assert f"give benchmark.{missing}, too" in report.unjudged["ppl_pass"]
    assert report.failures == {}


@pytest.mark.parametrize("stage", [1, 2])
def test_checkpoints_are_judged_if_they_have_seen_as_much(bench_config, monkeypatch, run_of, stage):
    own, short, fair = (
        run_of(bench_config(n), s) for n, s in ((stage, 800), (stage - 1, 100), (stage - 1, 800))
    )
    passes = {}
    for other in (short, fair):
        config = bench_config(stage, name="perplexity", checkpoint=own, baseline_checkpoint=other)
        report = reported(monkeypatch, config)
        passes[other] = report.values["ppl_pass"]
    assert passes == {short: None, fair: True}
    config = bench_config(stage, name="perplexity", checkpoint=own, baseline_checkpoint=short)
    told = reported(monkeypatch, config).unjudged["ppl_pass"]
    assert told == f"{own} was trained on 409,600 tokens and {short} on 51,200"


@pytest.mark.parametrize("stage", [1, 2])
def test_untrained_models_are_not_judged(bench_config, monkeypatch, stage):
    report = reported(monkeypatch, bench_config(stage, name="perplexity", train_steps=0))
    assert report.values["ppl_pass"] is report.values["all_pass"] is None
    assert "untrained" in report.unjudged["ppl_pass"]


def failing(config):
    raise RunError("it broke")


# What only one measurement finds.
KEY_OF = {
    1: {"vram": "vram_gb", "throughput": "tokens_per_second", "stability": "nan_count",
        "gradients": "grad_norm_min", "perplexity": "ppl"},
    2: {"vram": "vram_symplectic_gb", "modes": "step_ratio_backprop", "stability": "nan_count",
        "gradients": "grad_norm_min", "energy": "max_drift_untrained", "trained energy": "max_drift",
        "perplexity": "stage2_ppl"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "measurement"), [(stage, measurement) for stage, keys in KEY_OF.items() for measurement in keys]
)
def test_a_measurement_that_fails_leaves_its_keys_null_and_the_others_measured(
    bench_config, monkeypatch, stage, measurement
):
    report = reported(monkeypatch, bench_config(stage), **{measurement: failing})
    values = report.values
    assert [key for key in (STAGE_1_KEYS, STAGE_2_KEYS)[stage - 1] if key not in values] == []
    for other, key in KEY_OF[stage].items():
        assert (values[key] is None) is (other == measurement), key
    assert values["all_pass"] is None
    assert set(report.failures.values()) == {"it broke"}
    assert all(name.startswith(measurement) for name in report.failures)


@pytest.mark.parametrize("stage", [1, 2])
def test_where_everything_fails_everything_is_null(bench_config, monkeypatch, stage):
    report = reported(monkeypatch, bench_config(stage), **dict.fromkeys(KEY_OF[stage], failing))
    assert {k: v for k, v in report.values.items() if v is not None} == (
        {} if stage == 1 else {"ppl_target": 1.02}
    )
    assert {passed for *_, passed in report.criteria} == {None}
    assert report.details == {}


def test_an_untrained_model_is_measured_when_nothing_is_trained(bench_config, monkeypatch):
    def refuse(config):
        raise AssertionError

    config = bench_config(2, name="energy", train_steps=0)
    report = reported(monkeypatch, config, **{"trained energy": refuse})
    values = report.values
    assert values["max_drift"] == values["max_drift_untrained"] == 1e-6
    assert values["energy_pass"] is values["monotonic_violation"] is values["all_pass"] is None
    assert "benchmark.checkpoint" in report.unjudged["energy_pass"]


def test_an_untrained_model_may_fail_for_both(bench_config, monkeypatch):
    config = bench_config(2, name="energy", train_steps=0)
    values = run(monkeypatch, config, energy=lambda c: {**ENERGY, "max_drift": 6e-5})
    assert values["energy_pass"] is False


@pytest.mark.parametrize(
    ("measurement", "shape", "steps", "integrator"),
    [
        ("vram", (2, 2048), 10, "leapfrog"),
        ("perplexity", (4, 1024), 10, "leapfrog"),
        ("energy", (4, 512), 1, "leapfrog"),
    ],
)
def test_what_is_left_open_is_the_setting_of_the_seeds(
    bench_config, monkeypatch, measurement, shape, steps, integrator
):
    seen = []

    def answer(config):
        seen.append(config)
        return GOOD_FLOW[measurement](config)

    config = bench_config(2, name=measurement, batch_size=None, seq_len=None)
    run(monkeypatch, config, **{measurement: answer})
    first = seen[0]
    assert (first.benchmark.batch_size, first.benchmark.seq_len) == shape
    assert (first.stage.ode_steps, first.stage.integrator) == (steps, integrator)
    assert first.benchmark.dt == 0.1
    chosen = bench_config(2, name=measurement, batch_size=3, ode_steps=7, integrator="yoshida4")
    run(monkeypatch, chosen, **{measurement: answer})
    last = seen[-1]
    assert (last.benchmark.batch_size, last.benchmark.ode_steps) == (3, 7)
    assert last.benchmark.integrator == "yoshida4"


@pytest.mark.parametrize(
    ("measurement", "answer", "flag"),
    [
        ("vram", lambda c: {"peak": 0.53 if c.stage.number != "0" else 1.0}, "vram_pass"),
        ("stability", lambda c: {"inputs": 3, "nan_count": 0, "inf_count": 1}, "stability_pass"),
        ("gradients", lambda c: {"grad_norm_min": 0.0, "grad_norm_max": 1.0}, "gradient_pass"),
        ("gradients", lambda c: {"grad_norm_min": 1.0, "grad_norm_max": None}, "gradient_pass"),
        ("perplexity", lambda c: {"ppl": 20.7 if c.stage.number != "0" else 20.0, "trained": ""}, "ppl_pass"),
    ],
)
def test_one_miss_fails_all(bench_config, monkeypatch, measurement, answer, flag):
    values = run(monkeypatch, bench_config(1), **{measurement: answer})
    assert values[flag] is False
    assert values["all_pass"] is False


def test_what_could_not_be_measured_is_null_and_never_a_pass(bench_config, monkeypatch):
    # An infinite perplexity arrives from the measuring process as null.
    values = run(monkeypatch, bench_config(1), perplexity=lambda config: {"ppl": None, "trained": ""})
    assert values["ppl_ratio"] is None
    assert values["ppl_pass"] is None
    assert values["all_pass"] is None


def test_a_measurement_that_fails_is_one_sentence(bench_config, monkeypatch):
    monkeypatch.setattr(suite, "run_isolated", lambda job, *arguments: job(*arguments))
    config = bench_config(1, checkpoint="no/such/run")
    with pytest.raises(RunError, match="no/such/run"):
        measure_isolated("stability", config)
