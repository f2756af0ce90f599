import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from muse.benchmarks.baseline import baseline_of, check_baseline
from muse.benchmarks.checkpoint import with_checkpoint_options
from muse.benchmarks.model import benchmark_model
from muse.config import BenchConfig, DataConfig, TokenizerConfig, TrainConfig
from muse.errors import ConfigError
from muse.launch.bench import composed_stage
from muse.models import build_model
from muse.runs.checkpoints import TrainingState
from muse.training.checkpoint import CheckpointWriter


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


def test_stage_model_text_and_tokenizer_come_from_the_checkpoint(bench_config, run_of):
    trained = dataclasses.replace(
        changed(bench_config(2), dt=0.5, ode_steps=3, phi="silu", precision="bf16"),
        data=DataConfig(name="text", path="text.txt", cache="there"),
        tokenizer=TokenizerConfig(name="word"),
        train=TrainConfig(batch_size=3),
        seed=4,
    )
    run = run_of(trained)
    for checkpoint in (run, f"{run}/checkpoints/step_1"):
        config = with_checkpoint(BenchConfig(), checkpoint)
        taken = with_checkpoint_options(config, {"benchmark.checkpoint"})
        for name in ("stage", "model", "tokenizer"):
            assert getattr(taken, name) == getattr(trained, name), name
        assert taken.data == dataclasses.replace(trained.data, cache=config.data.cache)
        # What is measured, and how, is the command's.
        for name in ("benchmark", "hardware", "logger", "train", "optim", "seed"):
            assert getattr(taken, name) == getattr(config, name), name


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dt", 0.5), ("ode_steps", 3), ("integrator", "yoshida4"), ("phi", "silu"), ("confinement", 0.0),
        ("score", "magnitude"), ("potential_width", 5),
    ],
)  # fmt: skip
def test_another_map_than_the_one_that_was_trained_is_refused(bench_config, run_of, option, value):
    """None of these is in the weights, so all would load without a word."""
    config, trained = bench_config(2), changed(bench_config(2), **{option: value})
    checkpoint = run_of(trained)
    with pytest.raises(ConfigError, match=rf"stage\.{option}: {value} → "):
        with_checkpoint_options(with_checkpoint(config, checkpoint), {f"stage.{option}"})
    assert (
        with_checkpoint_options(with_checkpoint(trained, checkpoint), {f"stage.{option}"}).stage
        == trained.stage
    )


def test_another_way_to_compute_the_same_map_is_the_commands_if_it_is_given(bench_config, run_of):
    config = with_checkpoint(
        bench_config(2), run_of(changed(bench_config(2), gradient="backprop", dropout=0.1))
    )
    own = with_checkpoint_options(config, {"stage.gradient", "stage"}).stage
    assert (own.gradient, own.dropout) == ("exact", 0.1)


def test_all_that_is_said_against_a_checkpoint_is_named(bench_config, run_of):
    config = bench_config(1)
    width = dataclasses.replace(config.model.complex, heads=4, kv_heads=4)
    other = dataclasses.replace(bench_config(2), model=dataclasses.replace(config.model, complex=width))
    config.model.seq_len, config.data.name = 64, "wikitext2"
    given = {"model.complex.heads", "stage", "data", "model.seq_len", "model"}
    with pytest.raises(ConfigError) as error:
        with_checkpoint_options(with_checkpoint(config, run_of(other)), given)
    told = "(data: stdlib → wikitext2, model.complex.heads: 4 → 2, model.seq_len: 32 → 64, stage: 2 → 1)"
    assert told in str(error.value)


def test_a_text_that_was_moved_is_found_where_the_command_says(bench_config, run_of, tmp_path):
    there, moved = (DataConfig(name="text", path=str(tmp_path / name)) for name in ("there", "moved"))
    config = with_checkpoint(
        dataclasses.replace(bench_config(), data=moved),
        run_of(dataclasses.replace(bench_config(), data=there)),
    )
    assert with_checkpoint_options(config, {"data.path"}).data == moved
    (tmp_path / "there").write_text("text")
    with pytest.raises(ConfigError, match=r"data\.path: "):
        with_checkpoint_options(config, {"data.path"})


@pytest.mark.parametrize("exported", [False, True])
def test_the_vocabulary_is_that_of_the_weights(bench_config, run_of, tmp_path, exported):
    """A tokenizer may have other entries than model.vocab_size says."""
    trained = bench_config(1)
    run = Path(run_of(trained))
    model = build_model(trained.stage, trained.model, 61)
    if exported:
        checkpoint = tmp_path / "weights.safetensors"
        save_file(model.state_dict(), checkpoint, {"config": json.dumps(dataclasses.asdict(trained))})
    else:
        checkpoint, state = run, TrainingState(1, {}, [], 1.0, None)
        (run / "checkpoints" / "step_1").rmdir()
        CheckpointWriter(run / "checkpoints").save({"model": model.state_dict()}, state, best=True)
    config = with_checkpoint_options(with_checkpoint(BenchConfig(), str(checkpoint)), set())
    assert config.model.vocab_size == 61
    assert benchmark_model(config, torch.device("cpu")).embedding.weight.shape[0] == 61


def test_exported_weights_say_what_they_are_of(bench_config, tmp_path):
    config, file = bench_config(2), tmp_path / "weights.safetensors"
    stored = dataclasses.asdict(changed(config, dt=0.5))
    save_file({"w": torch.zeros(1)}, file, {"config": json.dumps(stored)})
    with pytest.raises(ConfigError, match=r"stage\.dt: 0\.5 → 1\.0"):
        with_checkpoint_options(with_checkpoint(config, str(file)), {"stage.dt"})
    assert with_checkpoint_options(with_checkpoint(config, str(file)), set()).stage.dt == 0.5


@pytest.mark.parametrize("name", ["nothing", "bare.safetensors", "damaged.safetensors"])
def test_weights_that_do_not_say_so_are_refused(bench_config, tmp_path, name):
    save_file({"w": torch.zeros(1)}, tmp_path / "bare.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match=f"{name} does not say"):
        with_checkpoint_options(with_checkpoint(bench_config(2), str(tmp_path / name)), set())


def test_a_baseline_is_measured_as_it_was_trained(bench_config, run_of):
    best = run_of(changed(bench_config(1), score="magnitude", precision="bf16-mixed"))
    baseline = baseline_of(bench_config(2, baseline_checkpoint=best), composed_stage("1"))
    assert baseline.benchmark.checkpoint == best
    assert baseline.stage.score == "magnitude"
    assert baseline.stage.precision == "bf16"
    with pytest.raises(ConfigError, match="is of stage=2; give one of stage=1"):
        baseline_of(bench_config(2, baseline_checkpoint=run_of(bench_config(2))), composed_stage("1"))


def test_a_baseline_of_another_stage_text_or_tokenizer_is_refused_before_anything_is_measured(
    bench_config, run_of, tmp_path
):
    config = bench_config(2, checkpoint="trained", baseline_checkpoint=run_of(bench_config(0)))
    with pytest.raises(ConfigError, match="is of stage=0; give one of stage=1"):
        check_baseline(config)
    config.benchmark.baseline_checkpoint = run_of(bench_config(1), "good")
    check_baseline(config)
    other = dataclasses.replace(bench_config(1), tokenizer=TokenizerConfig(name="gpt2", vocab_size=50257))
    config.benchmark.baseline_checkpoint = run_of(other, "other")
    with pytest.raises(ConfigError, match=r"\(tokenizer: gpt2 → bpe, tokenizer\.vocab_size: 50257 → 4096\)"):
        check_baseline(config)
    # The same text by two names.
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "link.txt").symlink_to(tmp_path / "text.txt")
    one, two = (DataConfig(name="text", path=str(tmp_path / name)) for name in ("text.txt", "link.txt"))
    config.data = one
    config.benchmark.baseline_checkpoint = run_of(dataclasses.replace(bench_config(1), data=two), "link")
    check_baseline(config)
