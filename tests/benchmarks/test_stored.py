import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from muse.benchmarks.step import baseline_of
from muse.benchmarks.stored import check_checkpoint
from muse.errors import ConfigError


@pytest.fixture
def run_of(tmp_path):
    """The folder of a run with these options."""

    def build(config, name="run"):
        run = tmp_path / name
        (run / "checkpoints" / "step_1").mkdir(parents=True, exist_ok=True)
        (run / "run.json").write_text(json.dumps({"config": dataclasses.asdict(config)}))
        return str(run)

    return build


def changed(config, **stage):
    return dataclasses.replace(config, stage=dataclasses.replace(config.stage, **stage))


def with_checkpoint(config, checkpoint):
    return dataclasses.replace(config, benchmark=dataclasses.replace(config.benchmark, checkpoint=checkpoint))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dt", 0.5), ("ode_steps", 3), ("integrator", "yoshida4"), ("phi", "silu"), ("confinement", 0.0),
        ("score", "magnitude"), ("potential_width", 5),
    ],
)  # fmt: skip
def test_another_map_than_the_one_that_was_trained_is_refused(bench_config, run_of, option, value):
    """None of these is in the weights, so all would load without a word."""
    config = bench_config(2)
    checkpoint = run_of(changed(config, **{option: value}))
    with pytest.raises(ConfigError, match=rf"run was trained with stage\.{option}={value}, not "):
        check_checkpoint(with_checkpoint(config, checkpoint))
    check_checkpoint(with_checkpoint(changed(config, **{option: value}), checkpoint))


def test_another_way_to_compute_the_same_map_is_allowed(bench_config, run_of):
    config = bench_config(2)
    checkpoint = run_of(changed(config, gradient="backprop", precision="bf16", dropout=0.1))
    check_checkpoint(with_checkpoint(config, checkpoint))
    check_checkpoint(with_checkpoint(config, f"{checkpoint}/checkpoints/step_1"))


def test_the_flow_is_no_matter_of_a_model_without_one(bench_config, run_of):
    config = bench_config(1)
    check_checkpoint(with_checkpoint(config, run_of(changed(config, dt=0.5))))


def test_heads_and_the_stage_are_compared_too(bench_config, run_of):
    config = bench_config(1)
    width = dataclasses.replace(config.model.complex, heads=4, kv_heads=4)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, complex=width))
    with pytest.raises(ConfigError, match=r"model\.complex\.heads=4, not 2"):
        check_checkpoint(with_checkpoint(config, run_of(other)))
    with pytest.raises(ConfigError, match=r"trained with stage=2, not 1"):
        check_checkpoint(with_checkpoint(config, run_of(bench_config(2))))


def test_exported_weights_say_what_they_are_of(bench_config, tmp_path):
    config, file = bench_config(2), tmp_path / "weights.safetensors"
    stored = dataclasses.asdict(changed(config, dt=0.5))
    save_file({"w": torch.zeros(1)}, file, {"config": json.dumps(stored)})
    with pytest.raises(ConfigError, match=r"stage\.dt=0\.5, not 1\.0"):
        check_checkpoint(with_checkpoint(config, str(file)))


@pytest.mark.parametrize("name", ["nothing", "bare.safetensors", "damaged.safetensors"])
def test_weights_that_do_not_say_so_are_refused(bench_config, tmp_path, name):
    save_file({"w": torch.zeros(1)}, tmp_path / "bare.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match=f"{name} does not say"):
        check_checkpoint(with_checkpoint(bench_config(2), str(tmp_path / name)))


def test_a_baseline_is_measured_as_it_was_trained(bench_config, run_of):
    best = run_of(changed(bench_config(1), score="magnitude", precision="bf16-mixed"))
    baseline = baseline_of(bench_config(2, baseline_checkpoint=best), stage_number="1")
    assert baseline.benchmark.checkpoint == best
    assert baseline.stage.score == "magnitude"
    assert baseline.stage.precision == "bf16"
    check_checkpoint(baseline)
    with pytest.raises(ConfigError, match="is of stage=2; give one of stage=1"):
        baseline_of(bench_config(2, baseline_checkpoint=run_of(bench_config(2))), stage_number="1")
