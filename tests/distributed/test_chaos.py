"""Killed at every kind of moment, a run on two ranks ends with the bits of an undisturbed one."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.configs import run_config, small_sizes, stage_config
from support.ranks import Ranks
from support.runs import logged, read_json, run_folders, same, stored
from support.waiting import wait_until
from torch.distributed.checkpoint import FileSystemWriter

from muse.config import RunConfig, TokenizerConfig
from muse.files import find_files
from muse.processes.torchrun import launched_rank
from muse.runs.checkpoints import find_checkpoint, find_damage
from muse.training import run as train_run
from muse.training import step as training_step
from muse.training import trainer
from muse.training.checkpoint import CheckpointWriter
from muse.training.run import run_training
from muse.training.step import TrainingStep

STEPS = 24


def second_time(calls: int, *arguments: Any) -> bool:
    return calls == 2


def first_time(calls: int, *arguments: Any) -> bool:
    return calls == 1


def second_folder(calls: int, source: Path, target: Path) -> bool:
    return Path(target).name == "step_00000002"


def with_best(calls: int, writer: CheckpointWriter, name: str, best: bool) -> bool:
    return best


def at_the_end(calls: int, writer: CheckpointWriter, tensors: Any, state: Any, best: bool) -> bool:
    return state.step == STEPS


BEFORE, AFTER = False, True
# What a rank does when it is killed: a function, whether it has returned by then, and in which call.
MOMENTS: dict[str, tuple[Any, str, bool, Callable[..., bool]]] = {
    "reading data": (train_run, "_load_data", BEFORE, first_time),
    "having taken over checkpoints": (train_run, "adopt_checkpoints", AFTER, first_time),
    "loading": (trainer, "load_tensors", BEFORE, first_time),
    "computing": (TrainingStep, "gradients", BEFORE, second_time),
    "agreeing": (training_step, "all_reduced_sum", BEFORE, second_time),
    "having agreed": (TrainingStep, "agree", AFTER, second_time),
    "evaluating": (trainer, "evaluate", BEFORE, first_time),
    "saving": (CheckpointWriter, "save", BEFORE, second_time),
    "having written": (FileSystemWriter, "write_data", AFTER, second_time),
    "renaming": (os, "rename", BEFORE, second_folder),
    "calling it the best": (CheckpointWriter, "_counts", BEFORE, with_best),
    "having saved": (CheckpointWriter, "save", AFTER, second_time),
    "saving the last step": (CheckpointWriter, "save", BEFORE, at_the_end),
    "agreeing that no signal came": (trainer, "_agreed", BEFORE, first_time),
    "ending": (train_run, "_summary", BEFORE, first_time),
}
BOTH, ALONE = False, True
# In this order: a moment, the rank that is held in it, and whether it is killed alone.
KILLS = [
    # The only part that takes nothing over.
    ("renaming", 0, BOTH),
    ("calling it the best", 0, BOTH),
    ("having taken over checkpoints", 0, BOTH),
    ("having written", 1, ALONE),
    ("loading", 1, ALONE),
    ("agreeing", 1, ALONE),
    ("having agreed", 0, ALONE),
    ("having written", 0, BOTH),
    ("reading data", 0, ALONE),
    ("evaluating", 1, ALONE),
    ("saving", 0, ALONE),
    ("computing", 1, BOTH),
    ("having saved", 0, BOTH),
    ("saving", 1, ALONE),
    ("saving the last step", 1, ALONE),
    ("agreeing that no signal came", 1, ALONE),
    ("ending", 0, BOTH),
]


def train_until_killed(config: RunConfig, run: Path, moment: str, rank: int) -> None:
    """Train, and let a rank wait for ever at a moment, of which it tells by a file ``held`` in the folder."""
    owner, name, after, is_it = MOMENTS[moment]
    act, calls = getattr(owner, name), []

    def wait_to_be_killed() -> None:
        (run / "held").touch()
        threading.Event().wait()

    def act_and_wait(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        held = is_it(len(calls), *arguments)
        if held and not after:
            wait_to_be_killed()
        result = act(*arguments, **options)
        if held:
            wait_to_be_killed()
        return result

    if launched_rank() == rank:
        setattr(owner, name, act_and_wait)
    train(config, run)


def train(config: RunConfig, run: Path) -> None:
    sys.exit(run_training(config, run))


def configured(place: Path, root: str, together: str) -> RunConfig:
    stage = stage_config("2", dropout=0.1)
    config = run_config(stage, steps=STEPS, eval_every=3, eval_tokens=64, checkpoint_every=1)
    config.hardware.parallel = together
    config.data.name, config.data.path = "text", str(place / "text.txt")
    config.data.cache, config.output_root = str(place / "cache"), str(place / root)
    return dataclasses.replace(
        config, model=small_sizes(300, 16, layers=1), tokenizer=TokenizerConfig(vocab_size=300), resume="auto"
    )


@pytest.mark.slow
@pytest.mark.parametrize("together", ["ddp", "fsdp"])
def test_a_run_killed_at_every_kind_of_moment_ends_with_the_same_bits(place, together):
    assert {moment for moment, *_ in KILLS} == set(MOMENTS)
    config = configured(place, f"undisturbed {together}", together)
    undisturbed = Path(config.output_root) / "train" / "whole"
    whole = Ranks(2, place / "output" / together, train, config, undisturbed)
    assert whole.wait() == [0, 0], whole.err()

    config = configured(place, f"killed {together}", together)
    root = Path(config.output_root)
    for number, (moment, rank, alone) in enumerate(KILLS):
        run, output = root / "train" / str(number), place / "output" / f"{together} {number}"
        # How checkpoints are written may change from one part of a run to the next.
        config.train.async_checkpoint = (number % 2 == 0) == (together == "ddp")
        run.mkdir(parents=True)
        ranks = Ranks(2, output, train_until_killed, config, run, moment, rank)
        try:
            wait_until((run / "held").exists, ranks.processes[rank].is_alive)
        except AssertionError as error:
            raise AssertionError(moment, ranks.err()) from error
        finally:
            ranks.processes[rank].kill()
            if not alone:
                ranks.processes[1 - rank].kill()
            statuses = ranks.wait()
        assert statuses[rank] == -signal.SIGKILL
        # A rank that is left notices by itself, if it still has to hear of the other.
        assert statuses[1 - rank] in ((0, 1) if alone else (0, -signal.SIGKILL)), ranks.err()
        assert find_files(root, "result.json") == []
        for which in ("last", "best"):
            kept = [find_checkpoint(path, which) for path in root.glob("train/*")]
            assert all(find_damage(path) is None for path in kept if path is not None)
    config.train.async_checkpoint = False
    ranks = Ranks(2, place / "output" / f"{together} end", train, config, root / "train" / "end")
    assert ranks.wait() == [0, 0], ranks.err()
    assert "resuming" in ranks.out()[0]
    run = run_folders(root)[-1]
    assert run.name == "end"
    for which in ("last", "best"):
        end, expected = find_checkpoint(run, which), find_checkpoint(undisturbed, which)
        assert end.name == expected.name
        assert same(stored(end), stored(expected))
    assert logged(run) == logged(undisturbed)
    assert read_json(run / "result.json")["valid"] == read_json(undisturbed / "result.json")["valid"]
