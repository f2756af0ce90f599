import pytest

from muse.benchmarks import suite
from muse.benchmarks.cell import measure_apart
from muse.errors import RunError

GOOD = {
    "vram": lambda config: {"peak": 0.5 if config.stage.number else 1.0},
    "throughput": lambda config: {
        "tokens_per_second": 10.0,
        "products_ratio": 1.1,
        "products_and_sdpa_ratio": 1.0,
    },
    "stability": lambda config: {"inputs": 3, "nan_count": 0, "inf_count": 0},
    "gradients": lambda config: {"grad_norm_min": 1e-3, "grad_norm_max": 1.0},
    "perplexity": lambda config: {"ppl": 20.0, "trained": "untrained"},
}
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


def run(monkeypatch, config, **changed):
    measured = {**GOOD, **changed}
    monkeypatch.setattr(suite, "measure_apart", lambda name, config: measured[name](config))
    return suite.run_suite(config).values


def test_all_passes_when_everything_does_and_has_the_keys_of_the_seeds(bench_config, monkeypatch):
    values = run(monkeypatch, bench_config(1))
    assert values["all_pass"] is True
    assert [key for key in STAGE_1_KEYS if key not in values] == []


@pytest.mark.parametrize(
    ("measurement", "answer", "flag"),
    [
        ("vram", lambda c: {"peak": 0.53 if c.stage.number else 1.0}, "vram_pass"),
        ("stability", lambda c: {"inputs": 3, "nan_count": 0, "inf_count": 1}, "stability_pass"),
        ("gradients", lambda c: {"grad_norm_min": 0.0, "grad_norm_max": 1.0}, "gradient_pass"),
        ("gradients", lambda c: {"grad_norm_min": 1.0, "grad_norm_max": None}, "gradient_pass"),
        ("perplexity", lambda c: {"ppl": 20.7 if c.stage.number else 20.0, "trained": ""}, "ppl_pass"),
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


def test_a_measurement_that_fails_is_one_sentence(bench_config):
    config = bench_config(1, checkpoint="no/such/run")
    with pytest.raises(RunError, match="no/such/run"):
        measure_apart("stability", config)
