from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.configs import SEQ_LEN, TRAIN_TOKENS, VOCAB, token_data
from support.marks import needs_vectors
from support.runs import CrashError, contents, crash_at, same, stored
from support.training import Recorder, prepare_model, run_config, run_train, snapshot
from support.waiting import PATIENCE

from muse.config import DataConfig
from muse.data import Mix
from muse.dynamics import MLPPotential
from muse.errors import ConfigError, RunError
from muse.runs.checkpoints import (
    HASHES,
    STATE,
    adopt_checkpoints,
    find_checkpoint,
    find_sound_checkpoint,
    load_state,
)
from muse.training import trainer
from muse.training.checkpoint import CheckpointWriter
from muse.training.evaluate import evaluate
from muse.training.trainer import TrainResult


def assert_same_end(first: TrainResult, second: TrainResult) -> None:
    """Both runs ended with the same weights and the same state of everything else, to the last bit."""
    assert first.checkpoint is not None
    assert second.checkpoint is not None
    assert same(contents(first.checkpoint), contents(second.checkpoint))
    assert first.valid == second.valid


@dataclasses.dataclass
class DrawingRecorder(Recorder):
    """A log that draws from the generators of Python and NumPy as well, and keeps what it drew."""

    drawn: dict[int, tuple[float, ...]] = dataclasses.field(default_factory=dict)

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        if "train/loss" in metrics:
            self.drawn[step] = (random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal())
        super().__call__(step, metrics)


def run_in_fresh_process(*arguments: Any, seed: int = 0, **options: Any) -> Any:
    """``run_train`` with the random states of a process that has just begun."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return run_train(*arguments, wandb_id="muse123", **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "precision", "optim", "accumulation", "trunk"),
    [
        (0, "fp32", "adamw", 1, "residual"),
        (0, "bf16", "muon", 3, "residual"),
        (1, "bf16", "adamw", 3, "residual"),
        (1, "fp32", "muon", 1, "residual"),
        (1, "bf16-mixed", "muon", 1, "residual"),
        (1, "fp16-mixed", "adamw", 3, "residual"),
        (1, "fp16-mixed", "adamw", 1, "reversible"),
        (2, "bf16", "adamw", 1, "residual"),
        (2, "bf16", "muon", 3, "residual"),
        (2, "bf16", "adamw", 3, "reversible"),
    ],
)
def test_a_resumed_run_equals_an_undisturbed_one(tmp_path, number, precision, optim, accumulation, trunk):
    steps = 12 if accumulation == 1 else 6
    # The second epoch begins in the second half.
    windows, epoch = 2 * accumulation * steps, (TRAIN_TOKENS - 1) // SEQ_LEN - 1
    assert windows / 2 < epoch < windows
    options = {"name": optim, "accumulation": accumulation}
    config = run_config(
        number, precision, options, steps=steps, checkpoint_every=steps // 2, eval_every=steps // 3
    )
    config.stage = dataclasses.replace(config.stage, trunk=trunk)
    whole = DrawingRecorder()
    _, undisturbed = run_in_fresh_process(config, tmp_path / "whole", whole)

    # The process dies some steps after its last checkpoint.
    first = DrawingRecorder(react=crash_at(steps // 2 + 1))
    with pytest.raises(CrashError):
        run_in_fresh_process(config, tmp_path / "first", first)
    checkpoint = find_checkpoint(tmp_path / "first")
    assert load_state(checkpoint).step == steps // 2
    rest = DrawingRecorder()
    _, resumed = run_in_fresh_process(config, tmp_path / "rest", rest, checkpoint, seed=7)

    assert_same_end(undisturbed, resumed)
    later = {step: loss for step, loss in whole.losses().items() if step > steps // 2}
    assert rest.losses() == later
    assert len(later) == steps - steps // 2
    assert rest.drawn == {step: whole.drawn[step] for step in later}
    assert load_state(resumed.checkpoint).wandb_id == "muse123"
    fallbacks = [line["trunk/fallbacks"] for _, line in rest.lines if "trunk/fallbacks" in line]
    assert fallbacks == [0.0] * len(later) * (trunk == "reversible")


@pytest.mark.parametrize(
    ("precision", "optim"), [("fp32", "adamw"), ("bf16", "muon"), ("fp16-mixed", "adamw")]
)
def test_a_run_that_writes_in_the_background_equals_one_that_does_not(tmp_path, precision, optim):
    config = run_config(1, precision, {"name": optim}, steps=8, checkpoint_every=2, eval_every=3)
    _, undisturbed = run_train(config, tmp_path / "whole")
    config.train.async_checkpoint = True
    _, background = run_train(config, tmp_path / "background")
    assert_same_end(undisturbed, background)
    for which in ("last", "best"):
        pair = [find_checkpoint(tmp_path / name, which) for name in ("whole", "background")]
        assert pair[0].name == pair[1].name
        assert same(*map(contents, pair))

    # The checkpoint of step 6 does not count before the next one begins.
    with pytest.raises(CrashError):
        run_train(config, tmp_path / "first", Recorder(react=crash_at(7)))
    checkpoint = find_sound_checkpoint(tmp_path / "first")
    assert load_state(checkpoint).step == 4
    _, resumed = run_train(config, tmp_path / "rest", resume_from=checkpoint)
    assert_same_end(undisturbed, resumed)


def test_a_run_continued_before_a_damaged_checkpoint_equals_an_undisturbed_one(tmp_path):
    config = run_config(1, "bf16", {"name": "muon"}, steps=8, checkpoint_every=2, eval_every=2)
    _, undisturbed = run_train(config, tmp_path / "whole")
    with pytest.raises(CrashError):
        run_train(config, tmp_path / "first", Recorder(react=crash_at(7)))
    # The process died while it wrote another one.
    checkpoints = tmp_path / "first" / "checkpoints"
    shutil.copytree(checkpoints / "step_00000006", checkpoints / ".step_00000007.tmp")
    for file in sorted((checkpoints / "step_00000006").iterdir()):
        previous, run = tmp_path / f"damaged {file.name}", tmp_path / f"rest {file.name}"
        shutil.copytree(tmp_path / "first", previous)
        damaged = previous / "checkpoints" / "step_00000006" / file.name
        os.truncate(damaged, file.stat().st_size // 2)
        with pytest.warns(UserWarning, match=f"step_00000006 is damaged: .*{re.escape(file.name)}"):
            checkpoint = find_sound_checkpoint(previous)
        assert load_state(checkpoint).step == 4
        adopt_checkpoints(previous, checkpoint, run, load_state(checkpoint).best)
        _, resumed = run_train(config, run, resume_from=checkpoint)
        assert_same_end(undisturbed, resumed)


@pytest.mark.parametrize("modulus", [True, False])
def test_every_step_may_be_the_last_one_of_a_process(tmp_path, modulus):
    options = {"second_moment": "modulus" if modulus else "plane"}
    config = run_config(1, "bf16", options, steps=5, checkpoint_every=1)
    _, undisturbed = run_train(config, tmp_path / "whole")
    checkpoint = None
    for step in range(1, 5):
        with pytest.raises(CrashError):
            run_train(config, tmp_path / str(step), Recorder(react=crash_at(step + 1)), checkpoint)
        checkpoint = find_checkpoint(tmp_path / str(step))
        assert load_state(checkpoint).step == step
    _, resumed = run_train(config, tmp_path / "rest", resume_from=checkpoint)
    assert_same_end(undisturbed, resumed)


def test_a_mix_goes_on_at_every_step_and_ends_with_the_first_of_its_sources(tmp_path):
    tokens, other = token_data().train, token_data(90).train
    data = dataclasses.replace(token_data(), train=Mix(("a", "b"), (tokens, other), (2.0, 1.0)))
    config = run_config(steps=100, optim={"accumulation": 2}, checkpoint_every=1)
    config = dataclasses.replace(config, data=DataConfig(at_end="stop"))
    _, undisturbed = run_train(config, tmp_path / "whole", data=data)
    # 19 and 10 windows, of which four steps of four take 11 and 5, or one more or less.
    assert undisturbed.step in (6, 7)
    checkpoint = None
    for step in range(1, undisturbed.step):
        with pytest.raises(CrashError):
            run_train(config, tmp_path / str(step), Recorder(react=crash_at(step + 1)), checkpoint, data)
        checkpoint = find_checkpoint(tmp_path / str(step))
    _, resumed = run_train(config, tmp_path / "rest", resume_from=checkpoint, data=data)
    assert_same_end(undisturbed, resumed)
    fewer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=undisturbed.step))
    assert_same_end(undisturbed, run_train(fewer, tmp_path / "fewer", data=data)[1])


def test_a_text_too_short_for_a_step_is_told_where_it_must_not_repeat(tmp_path):
    config = run_config(batch_size=32)
    run_train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1)), tmp_path)
    config = dataclasses.replace(config, data=DataConfig(at_end="stop"))
    with pytest.raises(
        ConfigError, match=r"data\.at_end=stop: the training split has fewer windows than a step"
    ):
        run_train(config, tmp_path)


@pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, 3), (signal.SIGTERM, 8)])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(tmp_path, number, at):
    config = run_config(steps=8)
    _, undisturbed = run_train(config, tmp_path / "whole")
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def send(step: int) -> None:
        if step == at:
            os.kill(os.getpid(), number)

    log = Recorder(react=send)
    _, stopped = run_train(config, tmp_path / "stopped", log)
    assert stopped.signal == number
    assert stopped.step == at
    assert max(log.losses()) == at
    assert stopped.valid is None
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    _, resumed = run_train(config, tmp_path / "rest", resume_from=stopped.checkpoint)
    assert resumed.signal is None
    assert_same_end(undisturbed, resumed)


@pytest.fixture
def leaving_on_sigterm():
    """SIGTERM raises SystemExit, as it does in a command."""
    handler = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.usefixtures("leaving_on_sigterm")
@pytest.mark.parametrize("checkpoint_every", [0, 3])
def test_a_signal_waits_for_the_last_checkpoint(tmp_path, monkeypatch, checkpoint_every):
    save = CheckpointWriter.save

    def signal_and_save(writer: CheckpointWriter, tensors: Any, state: Any, best: bool) -> None:
        if state.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        save(writer, tensors, state, best)

    monkeypatch.setattr(CheckpointWriter, "save", signal_and_save)
    _, stopped = run_train(run_config(steps=8, checkpoint_every=checkpoint_every), tmp_path)
    assert (stopped.signal, stopped.valid) == (signal.SIGTERM, None)
    assert load_state(find_sound_checkpoint(tmp_path)).step == 8


def test_a_second_signal_stops_at_once(tmp_path):
    def send(step: int) -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    # Whatever it was: a job in the background of a shell starts with SIGINT ignored.
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_train(run_config(), tmp_path, Recorder(react=send))
    assert signal.getsignal(signal.SIGINT) is handler


def test_evaluations_logging_and_checkpoints_do_not_change_the_training(tmp_path):
    plain = run_config(1, "bf16", steps=6)
    busy = run_config(1, "bf16", steps=6, eval_every=2, checkpoint_every=1, test=True, eval_tokens=16)
    busy.logger.log_every = 4
    results = [run_train(config, tmp_path / str(i))[1] for i, config in enumerate((plain, busy))]
    assert same(*(stored(result.checkpoint) for result in results))
    assert results[0].valid == results[1].valid
    assert results[0].test is None
    assert results[1].test is not None


@pytest.mark.parametrize(
    ("precision", "stage"),
    [
        ("bf16", {}),
        ("fp16-mixed", {"gradient": "reversible"}),
        ("bf16", {"gradient": "backprop"}),
        ("fp16-mixed", {"potential": "duffing"}),
    ],
    ids=str,
)
def test_watching_flows_does_not_change_the_training(tmp_path, monkeypatch, precision, stage):
    config = run_config(2, precision, steps=4, eval_every=2, checkpoint_every=2)
    config.stage = dataclasses.replace(config.stage, **stage)
    logs = [Recorder(), Recorder()]
    _, first = run_train(config, tmp_path / "watched", logs[0])
    monkeypatch.setattr(trainer, "watched_flows", lambda model: contextlib.nullcontext({}))
    _, second = run_train(config, tmp_path / "not watched", logs[1])
    assert same(contents(first.checkpoint), contents(second.checkpoint))
    assert first.valid == second.valid
    assert logs[0].losses() == logs[1].losses()
    watched, plain = (log.lines for log in logs)
    key = "flow/blocks_1_flow_0/drift_max"
    assert [step for step, metrics in watched if key in metrics] == [2, 4]
    assert not [step for step, metrics in plain if key in metrics]


def test_flows_are_watched_once_at_the_end_of_a_run_without_evaluations(tmp_path):
    log = Recorder()
    run_train(run_config(2, steps=2), tmp_path, log)
    (line,) = [metrics for _, metrics in log.lines if "flow/energy" in metrics]
    assert "valid/whole_loss" in line


def test_a_run_killed_in_its_last_evaluation_is_only_evaluated_again(tmp_path):
    config = run_config(steps=3)
    _, finished = run_train(config, tmp_path / "first")
    log = Recorder()
    _, again = run_train(config, tmp_path / "again", log, finished.checkpoint)
    assert again.valid == finished.valid
    assert not log.losses()
    assert_same_end(again, finished)


def test_a_line_tells_the_mean_of_the_steps_since_the_last_one(tmp_path):
    config = run_config(steps=10, optim={"accumulation": 2}, checkpoint_every=5)
    single = Recorder()
    run_train(config, tmp_path / "single", single)
    losses = single.losses()
    norms = {
        step: metrics["train/grad_norm"] for step, metrics in single.lines if "train/grad_norm" in metrics
    }
    config.logger.log_every = 4
    log = Recorder()
    run_train(config, tmp_path / "whole", log)
    lines = {step: metrics for step, metrics in log.lines if "train/loss" in metrics}
    assert list(lines) == [4, 8, 10]
    for step, before in ((4, 0), (8, 4), (10, 8)):
        since = range(before + 1, step + 1)
        assert lines[step]["train/loss"] == pytest.approx(
            sum(losses[i] for i in since) / len(since), rel=1e-12
        )
        assert lines[step]["train/last_loss"] == losses[step]
        mean_norm = sum(norms[i] for i in since) / len(since)
        assert lines[step]["train/grad_norm"] == pytest.approx(mean_norm, rel=1e-12)
        assert lines[step]["train/max_grad_norm"] == max(norms[i] for i in since)

    # From a checkpoint between two lines the rest is logged to the last bit as without the interruption.
    def timeless(metrics: dict[str, float]) -> dict[str, float]:
        return {key: value for key, value in metrics.items() if key != "train/tokens_per_second"}

    checkpoint = tmp_path / "whole" / "checkpoints" / "step_00000005"
    rest = Recorder()
    run_train(config, tmp_path / "rest", rest, checkpoint)
    assert [timeless(metrics) for _, metrics in rest.lines[:2]] == [timeless(lines[8]), timeless(lines[10])]


def test_the_seed_decides_the_run(tmp_path):
    losses = []
    for index, seed in enumerate((3, 3, 4)):
        config = run_config(1, "bf16", steps=3)
        config.seed = seed
        log = Recorder()
        run_train(config, tmp_path / str(index), log)
        losses.append(log.losses())
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "precision", "optim"),
    [
        (0, "bf16-mixed", "muon"),
        (0, "bf16", "adamw"),
        (1, "fp32", "adamw"),
        (1, "bf16", "muon"),
        (2, "fp32", "muon"),
        (2, "bf16-mixed", "adamw"),
    ],
)
def test_training_learns(tmp_path, number, precision, optim):
    config = run_config(number, precision, {"name": optim}, steps=60, batch_size=8)
    config.stage.dropout = 0.0
    log = Recorder()
    _, result = run_train(config, tmp_path, log)
    losses = log.losses()
    assert losses[1] > 0.8 * math.log(VOCAB)
    assert sum(losses[step] for step in range(51, 61)) / 10 < losses[1] - 0.5
    assert result.valid.loss < losses[1] - 0.5
    assert result.tokens == 60 * 8 * 8


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_micro_batches_equal_one_batch(tmp_path, number):
    runs = []
    for name, pieces, batch_size in (("pieces", 3, 2), ("whole", 1, 6)):
        # A large eps, as AdamW would turn a rounding error of a gradient near zero into a whole step.
        config = run_config(
            number, "fp32", {"accumulation": pieces, "eps": 1e-2}, steps=4, batch_size=batch_size
        )
        config.stage.dropout = 0.0
        log = Recorder()
        model, result = run_train(config, tmp_path / name, log)
        runs.append((model, result, log))
    (pieces, one, first), (whole, two, second) = runs
    for a, b in zip(pieces.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)
    # The last line is the evaluation.
    for (_, a), (_, b) in zip(first.lines[:4], second.lines[:4], strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-4)
    assert one.tokens == two.tokens


@pytest.mark.parametrize("name", ["blocks.1.ffn_norm.gain", "embedding.weight", "norm.gain"])
def test_a_bad_parameter_stops_the_run_and_is_named(tmp_path, monkeypatch, name):
    config = run_config(1, "fp32", steps=6, checkpoint_every=2)

    def poison_fourth_step(model: torch.nn.Module) -> None:
        parameter, loss, calls = dict(model.named_parameters())[name], model.loss, []

        def poisoned_loss(*arguments: torch.Tensor, **options: Any) -> torch.Tensor:
            calls.append(1)
            if len(calls) == 4:
                with torch.no_grad():
                    parameter.view(-1)[-1] = math.nan
            return loss(*arguments, **options)

        model.loss = poisoned_loss

    models = prepare_model(monkeypatch, poison_fourth_step)
    with pytest.raises(RunError, match=rf"step 4\b.* {re.escape(name)};") as caught:
        run_train(config, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "checkpoints" / "step_00000002") in str(caught.value)
    assert load_state(find_checkpoint(tmp_path)).step == 2
    # The poisoned number is the only one that is bad: nothing was updated from it.
    assert sum(int((~parameter.isfinite()).sum()) for parameter in models[0].parameters()) == 1


@pytest.mark.parametrize("how", ["a loss that is not finite", "a full disk"])
def test_what_is_written_in_the_background_when_a_run_fails_counts(tmp_path, monkeypatch, how):
    """Nothing is written before the run has failed and waits for it."""
    failing, waiting, write = threading.Event(), threading.Event(), dcp.FileSystemWriter.write_data
    finish = CheckpointWriter.finish

    def write_late(*arguments: Any) -> Any:
        assert waiting.wait(PATIENCE)
        return write(*arguments)

    def finish_and_let_write(writer: CheckpointWriter) -> None:
        if failing.is_set():
            waiting.set()
        finish(writer)

    def fail(model: torch.nn.Module) -> None:
        loss, calls = model.loss, []

        def failing_loss(*arguments: torch.Tensor, **options: Any) -> torch.Tensor:
            calls.append(1)
            if len(calls) < 4:
                return loss(*arguments, **options)
            failing.set()
            if how == "a full disk":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return loss(*arguments, **options) * math.nan

        model.loss = failing_loss

    prepare_model(monkeypatch, fail)
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", write_late)
    monkeypatch.setattr(CheckpointWriter, "finish", finish_and_let_write)
    config = run_config(steps=6, checkpoint_every=2, async_checkpoint=True)
    with pytest.raises((RunError, OSError)) as caught:
        run_train(config, tmp_path)
    assert load_state(find_sound_checkpoint(tmp_path)).step == 2
    if how != "a full disk":
        assert str(tmp_path / "checkpoints" / "step_00000002") in str(caught.value)


def first_dropped(monkeypatch: pytest.MonkeyPatch, run: Path, resume_from: Path | None) -> torch.Tensor:
    """Where the first dropout of a run is zero."""
    outputs: list[torch.Tensor] = []

    def watch(model: torch.nn.Module) -> None:
        dropout = model.blocks[0].dropout
        dropout.register_forward_hook(lambda module, given, output: outputs.append(output.detach() == 0))

    with monkeypatch.context() as patch:
        prepare_model(patch, watch)
        run_train(run_config(steps=4, checkpoint_every=2, batch_size=8), run, resume_from=resume_from)
    return outputs[0]


def test_on_another_number_of_ranks_dropout_does_not_begin_anew(tmp_path, monkeypatch):
    first = first_dropped(monkeypatch, tmp_path / "first", None)
    assert torch.equal(first, first_dropped(monkeypatch, tmp_path / "again", None))
    checkpoint = tmp_path / "first" / "checkpoints" / "step_00000002"
    state = load_state(checkpoint).random
    rewrite_state(checkpoint, random=state * 2)
    second = first_dropped(monkeypatch, tmp_path / "second", checkpoint)
    assert 0.1 < first.double().mean() < 0.3
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("precision", "bad"), [("fp32", math.inf), ("bf16", math.nan), ("bf16-mixed", math.inf)]
)
def test_a_bad_gradient_stops_the_run_before_the_update(tmp_path, monkeypatch, precision, bad):
    name = "blocks.0.ffn.up.weight"
    backwards = []

    def spoil(model: torch.nn.Module) -> None:
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            backwards.append(1)
            return torch.full_like(gradient, bad) if len(backwards) == 3 else gradient

        dict(model.named_parameters())[name].register_hook(hook)

    models = prepare_model(monkeypatch, spoil)
    weights = {}
    log = Recorder(react=lambda step: weights.update({step: snapshot(models[0])}))
    with pytest.raises(RunError, match=rf"gradient norm is not finite in step 3\b.*gradient of {name};") as e:
        run_train(run_config(1, precision), tmp_path, log)
    assert "no checkpoint was written yet" in str(e.value)
    assert sorted(weights) == [1, 2]
    assert same(weights[2], snapshot(models[0]))


def test_fp16_skips_a_step_whose_gradient_overflows_and_goes_on(tmp_path, monkeypatch):
    backwards = []

    def overflow(model: torch.nn.Module) -> None:
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            backwards.append(1)
            return gradient * math.inf if len(backwards) in (2, 4) else gradient

        model.norm.gain.register_hook(hook)

    models = prepare_model(monkeypatch, overflow)
    weights = {}
    log = Recorder(react=lambda step: weights.update({step: snapshot(models[0])}))
    _, result = run_train(run_config(1, "fp16-mixed", {"name": "muon"}, steps=5), tmp_path, log)
    changed = [not same(weights[step], weights[step + 1]) for step in (1, 2, 3, 4)]
    assert changed == [False, True, False, True]
    state = load_state(result.checkpoint)
    assert state.scaler["scale"] == torch.amp.GradScaler("cpu").get_scale() / 4
    assert all(parameter.isfinite().all() for parameter in models[0].parameters())
    assert math.isfinite(result.valid.loss)


def test_fp16_gives_up_when_the_scale_is_used_up(tmp_path, monkeypatch):
    def spoil(model: torch.nn.Module) -> None:
        model.norm.gain.register_hook(lambda gradient: gradient * math.nan)

    models = prepare_model(monkeypatch, spoil)
    initial = {}
    log = Recorder(react=lambda step: initial or initial.update(snapshot(models[0])))
    with pytest.raises(RunError, match=r"in step 17\b.*gradient of norm\.gain;"):
        run_train(run_config(1, "fp16-mixed", steps=40), tmp_path, log)
    assert same(initial, snapshot(models[0]))


def test_best_is_the_checkpoint_of_the_lowest_validation_loss(tmp_path):
    config = run_config(1, "fp32", {"lr": 0.1, "schedule": "constant", "clip": 0.0}, steps=30)
    config.train.eval_every = 3
    config.train.eval_tokens = 0
    log = Recorder()
    run_train(config, tmp_path, log)
    losses = {step: metrics["valid/loss"] for step, metrics in log.lines if "valid/loss" in metrics}
    assert len(losses) == 10
    best = find_checkpoint(tmp_path, "best")
    state = load_state(best)
    assert losses[state.step] == min(losses.values())
    assert state.best_loss == losses[state.step]
    last = load_state(find_checkpoint(tmp_path, "last"))
    assert (last.step, last.best_loss) == (30, min(losses.values()))


def evaluated(log: Recorder, key: str = "valid/loss") -> dict[int, float]:
    """Validation losses by step."""
    return {step: metrics[key] for step, metrics in log.lines if key in metrics}


def test_all_points_of_the_validation_curve_are_of_the_same_windows(tmp_path):
    data, limit = token_data(), 3 * SEQ_LEN
    config = run_config(steps=5, eval_every=2, eval_tokens=limit)
    log = Recorder()
    model, result = run_train(config, tmp_path, log)
    assert list(evaluated(log)) == [2, 4, 5]
    part = evaluate(model, data.valid, None, SEQ_LEN, 2, limit=limit)
    assert evaluated(log)[5] == part.loss != result.valid.loss
    assert set(evaluated(log, "valid/tokens").values()) == {part.tokens}
    assert evaluated(log, "valid/whole_loss") == {5: result.valid.loss}
    # A split that is no larger is evaluated once at the end.
    config.train.eval_tokens = 0
    again = Recorder()
    run_train(config, tmp_path / "all", again)
    assert evaluated(again)[5] == result.valid.loss == evaluated(again, "valid/whole_loss")[5]


@pytest.mark.parametrize("tokens", [0, 3 * SEQ_LEN])
def test_a_split_is_evaluated_no_more_often_than_needed(tmp_path, monkeypatch, tokens):
    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments[6])
        return evaluate(*arguments)

    monkeypatch.setattr(trainer, "evaluate", counted)
    run_train(run_config(steps=4, eval_every=2, eval_tokens=tokens), tmp_path / "along the way")
    assert calls == ([0, 0] if tokens == 0 else [tokens, tokens, 0])
    calls.clear()
    run_train(run_config(steps=4, eval_tokens=tokens), tmp_path / "at the end")
    assert calls == [0]
    assert find_checkpoint(tmp_path / "at the end", "best") is not None


@pytest.mark.parametrize("changed", [{}, {"eval_tokens": 2 * SEQ_LEN}, {"eval_stride": 3}])
def test_losses_of_other_windows_are_not_compared(tmp_path, changed):
    config = run_config(steps=4, checkpoint_every=2, eval_every=2, eval_tokens=SEQ_LEN)
    with pytest.raises(CrashError):
        run_train(config, tmp_path / "first", Recorder(react=crash_at(3)))
    checkpoint = find_checkpoint(tmp_path / "first")
    # Lower than anything that follows.
    rewrite_state(checkpoint, best_loss=0.0)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **changed))
    log = Recorder()
    run_train(config, tmp_path / "rest", log, resume_from=checkpoint)
    state = load_state(find_checkpoint(tmp_path / "rest"))
    assert state.best_loss == (evaluated(log)[4] if changed else 0.0)
    assert state.best == bool(changed)


def test_a_checkpoint_of_before_measures_were_stored_still_loads(tmp_path):
    config = run_config(steps=4, checkpoint_every=2, eval_every=2)
    with pytest.raises(CrashError):
        run_train(config, tmp_path / "first", Recorder(react=crash_at(3)))
    checkpoint = find_checkpoint(tmp_path / "first")
    old = vars(load_state(checkpoint))
    torch.save({k: v for k, v in old.items() if k not in ("best_measure", "unlogged")}, checkpoint / STATE)
    hashes = json.loads((checkpoint / HASHES).read_text())
    hashes[STATE] = hashlib.sha256((checkpoint / STATE).read_bytes()).hexdigest()
    (checkpoint / HASHES).write_text(json.dumps(hashes))
    log = Recorder()
    _, result = run_train(config, tmp_path / "rest", log, resume_from=checkpoint)
    assert load_state(result.checkpoint).best_loss == evaluated(log)[4]


def rewrite_state(checkpoint: Path, **changed: Any) -> None:
    torch.save({**vars(load_state(checkpoint)), **changed}, checkpoint / STATE)
    hashes = json.loads((checkpoint / HASHES).read_text())
    hashes[STATE] = hashlib.sha256((checkpoint / STATE).read_bytes()).hexdigest()
    (checkpoint / HASHES).write_text(json.dumps(hashes))


def test_a_resumed_run_knows_its_lowest_validation_loss(tmp_path):
    config = run_config(steps=4, checkpoint_every=2, eval_every=3)
    with pytest.raises(CrashError):
        run_train(config, tmp_path / "first", Recorder(react=crash_at(3)))
    checkpoint = find_checkpoint(tmp_path / "first")
    rewrite_state(checkpoint, best_loss=0.0)
    _, result = run_train(config, tmp_path / "rest", resume_from=checkpoint)
    assert load_state(result.checkpoint).best_loss == 0.0
    assert find_checkpoint(tmp_path / "rest", "best") is None


def test_a_compiled_model_keeps_the_names_of_its_weights(tmp_path, monkeypatch):
    compiled = []

    def compile_eagerly(function, **options):
        compiled.append(function)
        return functools.wraps(function)(lambda *arguments: function(*arguments))

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    config = run_config(steps=3)
    _, plain = run_train(config, tmp_path / "plain")
    assert compiled == []
    config.hardware.compile = True
    model, result = run_train(config, tmp_path / "compiled")
    assert len(compiled) == 1
    assert not [name for name in model.state_dict() if "_orig_mod" in name]
    assert_same_end(plain, result)


@needs_vectors
@pytest.mark.slow
def test_torch_compile_trains_the_same_model(tmp_path):
    config = run_config(steps=2)
    config.stage.dropout = 0.0
    config.model.complex.layers = 1
    plain, eager = run_train(config, tmp_path / "plain")
    config.hardware.compile = True
    model, result = run_train(config, tmp_path / "compiled")
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert result.valid.loss == pytest.approx(eager.valid.loss, rel=1e-3)


def test_a_run_without_words_has_only_a_perplexity_per_token(tmp_path):
    data = token_data()
    bare = type(data)(data.train, data.valid, data.test, data.vocab_size, None, {})
    _, result = run_train(run_config(steps=1), tmp_path, data=bare)
    assert result.valid.word_ppl is None
    assert result.valid.bits_per_byte is None
    assert result.valid.ppl == math.exp(result.valid.loss)


def test_a_failed_reconstruction_is_counted_and_training_goes_on(tmp_path, monkeypatch):
    config = run_config(2, "fp32", steps=8, checkpoint_every=4)
    config.stage.gradient, config.stage.dropout = "reversible", 0.0
    expected = Recorder()
    run_train(
        dataclasses.replace(config, stage=dataclasses.replace(config.stage, gradient="backprop")),
        tmp_path / "backprop",
        expected,
    )
    undo, calls = MLPPotential.undo, []

    def perturbed(self, *arguments):
        start_q, *rest = undo(self, *arguments)
        calls.append(1)
        return (start_q + 1e-3 * (len(calls) == 9), *rest)

    monkeypatch.setattr(MLPPotential, "undo", perturbed)
    log = Recorder()
    with pytest.warns(
        UserWarning, match=r"blocks\.\d\.flow\.\d: the initial state was rebuilt with an error of 0\.001"
    ):
        _, result = run_train(config, tmp_path / "perturbed", log)
    counts = [metrics["flow/fallbacks"] for _, metrics in log.lines if "flow/fallbacks" in metrics]
    assert counts == [0, 0, 1, 1, 1, 1, 1, 1]
    # One of the four flows rebuilds nothing any more.
    assert len(calls) == 9 + 3 + 5 * 3
    for step, loss in expected.losses().items():
        assert log.losses()[step] == pytest.approx(loss, rel=1e-5)

    # A resumed run remembers.
    later = Recorder()
    run_train(
        dataclasses.replace(config, train=dataclasses.replace(config.train, steps=10)),
        tmp_path / "later",
        later,
        result.checkpoint,
    )
    assert [m["flow/fallbacks"] for _, m in later.lines if "flow/fallbacks" in m] == [1, 1]


def test_a_state_that_is_not_finite_names_its_layer_and_step(tmp_path, monkeypatch):
    config = run_config(2, "fp32", steps=3)
    build = trainer.build_model

    def poisoned(*arguments):
        model = build(*arguments)
        with torch.no_grad():
            model.blocks[1].flow.odes[0].potential.w1.fill_(1e25)
        return model

    monkeypatch.setattr(trainer, "build_model", poisoned)
    with pytest.raises(
        RunError, match=r"^blocks\.1\.flow\.0: the state of the flow is not finite after step 1 of 1; "
    ):
        run_train(config, tmp_path)
