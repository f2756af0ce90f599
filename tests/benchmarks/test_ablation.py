import dataclasses
import math

import pytest
from support.commands import default_stage, measured_here
from support.configs import write_text

from muse.benchmarks import ablation, suite
from muse.benchmarks.results import Results
from muse.benchmarks.suite import settled
from muse.config import DataConfig, TokenizerConfig
from muse.errors import ConfigError


@pytest.fixture
def config(bench_config, tmp_path):
    """Of a benchmark that trains on a small text; keyword arguments replace its options."""
    data = DataConfig(name="text", path=str(write_text(tmp_path, 400)), cache=str(tmp_path / "cache"))

    def build(stage=None, **benchmark):
        options = {"name": "ablation", "train_steps": 3, "batch_size": None, "seq_len": None, "seeds": 3}
        config = bench_config(3, **{**options, **benchmark})
        tokenizer = TokenizerConfig(name="bpe", vocab_size=257)
        stage = dataclasses.replace(config.stage, **{"koopman": "replace", **(stage or {})})
        return dataclasses.replace(
            config, stage=stage, data=data, tokenizer=tokenizer, output_root=str(tmp_path / "out")
        )

    return build


def worth(stage):
    """Nats that a stage loses to stage 2."""
    return -0.05 * (stage.koopman == "replace") + 0.02 * (stage.koopman == "add")


def measured(noise=0.0, lost=()):
    """Answers measurements; the loss of a variant differs from stage 2's by what it is ``worth``."""

    def answer(measurement, config, *others):
        if measurement == "step costs":
            count = 1 + len(others)
            return {"vocab_size": 300, "step_ms": count * [10.0], "ratio": count * [1.0]}
        if measurement == "vram":
            return {"peak": 0.1}
        if (config.stage.number, config.seed) in lost:
            return {}
        noisy = noise * (-1) ** config.seed * (config.stage.koopman != "none")
        return {"valid_loss": 0.0, "test_loss": 4 + 0.1 * config.seed + worth(config.stage) + noisy}

    return answer


def judged(config, answer, monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "measure_isolated", answer)
    results = Results(tmp_path / "run", answer, default_stage)
    ablation.judge(settled(config, "ablation"), results)
    results.judge()
    return results


def test_each_variant_is_held_against_stage_2_from_the_same_seeds(config, monkeypatch, tmp_path):
    results = judged(config(), measured(), monkeypatch, tmp_path)
    models = results.details["ablation"]
    assert next(iter(models)) == "stage 2"
    assert models["stage 2"]["ratio"] == 1
    for name, model in models.items():
        assert len(model["losses"]) == 3
        if name != "stage 2":
            nats = worth(ablation.variants_of(config())[name].stage)
            assert model["ratio"] == pytest.approx(math.exp(nats))
            assert model["interval"] == pytest.approx(2 * [model["ratio"]])
    assert results.values == {
        "ablation_ratio": pytest.approx(math.exp(-0.05)), "ablation_pass": True, "all_pass": True
    }  # fmt: skip


def test_variants_differ_from_each_other_and_from_stage_2(config):
    for given in ({}, {"koopman": "add"}, {"koopman_every": 1}, {"koopman": "none"}):
        variants = ablation.variants_of(config(given))
        different = {repr(variant) for variant in variants.values()}
        assert len(different) == len(variants)
        bare = [
            name
            for name, variant in variants.items()
            if {variant.stage.koopman, variant.stage.mera, variant.stage.dialectic, variant.optim.selection}
            == {"none"}
        ]
        assert bare == (["stage 3"] if given.get("koopman") == "none" else [])
    # A part is as the command has it, where it stands alone and beside the others.
    variants = ablation.variants_of(config({"mera": "replace", "koopman": "add"}))
    assert [variants[name].stage.mera for name in ("mera", "all parts", "all but mera")] == [
        "replace", "replace", "none"
    ]  # fmt: skip
    assert variants["koopman"].stage.koopman == variants["all but mera"].stage.koopman == "add"
    assert variants["selection"].optim.selection == "entropy"
    assert ablation.variants_of(config({"koopman_every": 3}))["stage 3"].stage.koopman_every == 3


def test_what_seeds_cannot_tell_is_not_judged(config, monkeypatch, tmp_path):
    results = judged(config(), measured(noise=0.3), monkeypatch, tmp_path)
    assert results.values["ablation_pass"] is None
    assert "more seeds" in results.unjudged["ablation_pass"]
    results = judged(config(seeds=1), measured(), monkeypatch, tmp_path)
    assert results.values["ablation_pass"] is None
    assert results.values["ablation_ratio"] == pytest.approx(math.exp(-0.05))


def test_worse_than_stage_2_does_not_pass(config, monkeypatch, tmp_path):
    results = judged(config({"koopman": "add"}), measured(), monkeypatch, tmp_path)
    assert results.values["ablation_pass"] is False


def test_a_seed_that_failed_leaves_no_ratio(config, monkeypatch, tmp_path):
    results = judged(config(), measured(lost={("2", 1)}), monkeypatch, tmp_path)
    assert results.values["ablation_ratio"] is None
    assert results.values["all_pass"] is None


def test_variants_are_chosen_by_name(config, monkeypatch, tmp_path):
    chosen = config(variants=["stage 3", "koopman beside attention"])
    models = judged(chosen, measured(), monkeypatch, tmp_path).details["ablation"]
    assert list(models) == ["stage 2", "stage 3", "koopman beside attention"]
    with pytest.raises(ConfigError, match=r"benchmark.variants=x is not known; choose some of 'stage 3', "):
        ablation.check(config(variants=["x"]))


@pytest.mark.slow
def test_all_of_it_in_small(config, monkeypatch, tmp_path):
    small = config(seeds=1, repeats=1, variants=["stage 3", "koopman, not selective"])
    results = judged(small, measured_here, monkeypatch, tmp_path)
    assert results.failures == {}
    models = results.details["ablation"]
    assert all(model["perplexity"] > 1 for model in models.values())
    assert models["koopman, not selective"]["parameters"] < models["stage 3"]["parameters"]
    figure = ablation.plot(models)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(models)[1:]
    assert "koopman, not selective" in ablation.text(models)[0]
