"""A run on several ranks that is interrupted ends where an undisturbed one does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.configs import VOCAB, stage_config
from support.distributed import Training, go_on, run_config, run_ranks, run_train
from support.runs import crash_at, same, stored

import muse
from muse.config import RunConfig
from muse.export import export_run
from muse.files import write_json
from muse.models import build_model
from muse.runs.checkpoints import find_damage, find_sound_checkpoint, load_state, load_weights
from muse.runs.folder import RUN_FILE
from muse.runs.provenance import provenance

STEPS = 6


def checkpointed(together: str, number: str = "2", **stage: Any) -> RunConfig:
    flow = {"integrator": "leapfrog"} if number == "2" else {}
    stage = stage_config(number, **flow, **stage)
    return run_config(stage, together, steps=STEPS, eval_every=3, checkpoint_every=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "together", "asynchronous", "precision"),
    [
        ("2", "ddp", False, "fp32"),
        ("1", "ddp", True, "bf16"),
        ("1", "fsdp", False, "fp32"),
        ("2", "fsdp", True, "bf16"),
    ],
)
def test_two_parts_of_a_run_end_with_the_bits_of_a_whole_one(
    tmp_path, number, together, asynchronous, precision
):
    config = checkpointed(together, number, dropout=0.2, precision=precision)
    whole = run_ranks(2, run_train, config, tmp_path / "whole")
    config.train.async_checkpoint = asynchronous
    run_ranks(2, run_train, config, tmp_path / "part", None, crash_at(5))
    checkpoint = find_sound_checkpoint(tmp_path / "part")
    # An asynchronous checkpoint counts when the next one begins, here that of the best step so far.
    assert load_state(checkpoint).step == (3 if asynchronous else 4)
    rest = run_ranks(2, run_train, config, tmp_path / "rest", checkpoint)
    for first, second in zip(whole, rest, strict=True):
        assert same(first.weights, second.weights)
        assert second.series("train/loss") == first.series("train/loss")[checkpoint_step(checkpoint) :]
        assert second.result.valid == first.result.valid
    assert_same_checkpoints(tmp_path / "whole", tmp_path / "rest", 2 if asynchronous else 1)


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def assert_same_checkpoints(first: Path, second: Path, count: int) -> None:
    """At least the last ``count`` checkpoints of a run are those of the other one, state and all."""
    kept = sorted((second / "checkpoints").glob("step_*"))
    assert len(kept) >= count
    for path in kept[-count:]:
        other = first / "checkpoints" / path.name
        assert find_damage(path) is None
        assert same(stored(path), stored(other))
        own, others = load_state(path), load_state(other)
        assert (own.step, own.best_loss) == (others.step, others.best_loss)
        for a, b in zip(own.random, others.random, strict=True):
            assert torch.equal(a["cpu"], b["cpu"])


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> Callable[[str], Training]:
    """The undisturbed run on one rank, by its gradient mode."""

    @functools.cache
    def train(gradient: str) -> Training:
        config = checkpointed("none", gradient=gradient)
        return run_ranks(1, run_train, config, tmp_path_factory.mktemp("whole"), None, go_on, True)[0]

    return train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "gradient"),
    [
        ((2, "ddp"), (1, "none"), "exact"),
        ((2, "fsdp"), (1, "none"), "exact"),
        ((1, "none"), (2, "ddp"), "exact"),
        ((1, "none"), (2, "fsdp"), "exact"),
        # The exact flow takes gradients by float32 states, whose rounding does not commute with a division by
        # three.
        ((3, "fsdp"), (2, "ddp"), "reversible"),
        ((2, "ddp"), (3, "fsdp"), "reversible"),
    ],
)
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, one_rank, before, after, gradient):
    whole = one_rank(gradient)
    config = checkpointed(before[1], gradient=gradient)
    run_ranks(before[0], run_train, config, tmp_path / "part", None, crash_at(5), True)
    checkpoint = find_sound_checkpoint(tmp_path / "part")
    assert (load_state(checkpoint).step, len(load_state(checkpoint).random)) == (4, before[0])
    config.hardware.parallel = after[1]
    for rest in run_ranks(after[0], run_train, config, tmp_path / "rest", checkpoint, go_on, True):
        assert rest.series("train/loss") == pytest.approx(whole.series("train/loss")[4:], rel=1e-12)
        torch.testing.assert_close(rest.flat(), whole.flat(), rtol=1e-12, atol=1e-12)
    assert len(load_state(find_sound_checkpoint(tmp_path / "rest")).random) == after[0]


@pytest.mark.slow
def test_what_two_ranks_have_sharded_is_exported_whole(tmp_path):
    config = checkpointed("fsdp", precision="bf16")
    first, second = run_ranks(2, run_train, config, tmp_path)
    write_json(tmp_path / RUN_FILE, provenance(config))
    assert export_run(tmp_path, tmp_path / "weights.safetensors", "last") == STEPS
    exported = muse.load(tmp_path / "weights.safetensors").model
    loaded = build_model(config.stage, config.model, VOCAB, seed=1)
    load_weights(find_sound_checkpoint(tmp_path), loaded)
    for model in (exported, loaded):
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        assert same(weights, first.weights)
        assert same(weights, second.weights)
