"""Trainings that a benchmark compares, each of which is made once, by whichever command comes to it first."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from muse.benchmarks.results import Results
from muse.benchmarks.workload import batch_shape
from muse.config import BenchConfig, RunConfig
from muse.data import load_tokens
from muse.files import claimed, read_json, write_json
from muse.hardware import describe
from muse.options import changed
from muse.runs.checkpoints import find_sound_checkpoint, load_state
from muse.runs.folder import CHECKPOINTS
from muse.runs.provenance import identity, provenance, source_hash
from muse.training.trainer import train

# Seconds between two looks for a training that another command makes.
WAIT = 5.0
# Held by the command that makes a training or measures what all of them need.
CLAIM = ".claim"
# Folder of them all, below output_root.
TRAININGS = "trainings"
# What a training found. It is no run of train.py, and has no name of its files.
TRAINING_FILE = "training.json"


def measure_training(config: BenchConfig, device: torch.device) -> dict[str, Any]:
    """Train in a folder of its own, from where an earlier command was stopped, and keep the results there.

    Returns:
        ``valid_loss`` and ``test_loss`` in nats a token of the whole splits, ``steps``, ``tokens`` of
        training, and ``seconds``, the wall time of the part that this process trained.

    Raises:
        KeyboardInterrupt: the training was interrupted; it is saved.
    """
    # The splits are those of every training, and were told before.
    log = logging.getLogger("muse.data")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        data = load_tokens(config.data, config.tokenizer, config.model.vocab_size)
    finally:
        log.setLevel(level)
    folder = training_folder(config)
    checkpoint = find_sound_checkpoint(folder)
    resume_from = (checkpoint, load_state(checkpoint)) if checkpoint is not None else None
    _, result = train(config, data, device, folder, lambda step, metrics: None, resume_from)
    if result.valid is None or result.test is None:
        raise KeyboardInterrupt
    values = {
        "valid_loss": result.valid.loss,
        "test_loss": result.test.loss,
        "steps": result.step,
        "tokens": result.tokens,
        "seconds": result.seconds,
    }
    write_json(folder / TRAINING_FILE, {**values, "device": describe(device), **provenance(run_of(config))})
    # Some hundred of them would fill a disk, and nobody goes on from one.
    shutil.rmtree(folder / CHECKPOINTS)
    return values


def run_of(config: BenchConfig) -> RunConfig:
    """The options of a training alone: what else a benchmark measures changes nothing in it."""
    return RunConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(RunConfig)})


def training_of(config: BenchConfig, steps: int, rate: float, seed: int) -> BenchConfig:
    """The training of a model for so many steps, at a multiple of its learning rate, from a seed."""
    batch, length = batch_shape(config)
    return changed(
        dataclasses.replace(config, seed=config.seed + seed),
        model={"seq_len": length},
        optim={"lr": rate * config.optim.lr, "muon_lr": rate * config.optim.muon_lr},
        train={"steps": steps, "batch_size": batch, "eval_every": 0, "test": True, "sample_tokens": 0},
    )


def training_folder(config: BenchConfig) -> Path:
    """Of a training, the same for every command that asks for it with this code."""
    return Path(config.output_root) / TRAININGS / identity(run_of(config), source_hash())


class Trainings:
    """Trainings, each of which is made once, whoever asks for it and however often.

    Args:
        results: has them run, and notes which fail.
        rerun: whether results that are there already are left out.
        planned: milliseconds that all of them take, for the estimate.
    """

    def __init__(self, results: Results, rerun: bool, planned: list[float]) -> None:
        self._results, self._rerun = results, rerun
        self._left, self._count, self._number = sum(planned), len(planned), 0
        self._found: dict[Path, dict[str, Any]] = {}

    def make(self, wanted: Sequence[tuple[str, BenchConfig, float]]) -> list[dict[str, Any]]:
        """The results of trainings, given by name, options and milliseconds; of one that failed nothing.

        One that another command makes meanwhile is waited for.
        """
        open_ = list(wanted)
        while open_:
            held = []
            for one in open_:
                folder = training_folder(one[1])
                with claimed(folder / CLAIM) as own:
                    if own:
                        self._make(folder, *one)
                    else:
                        held.append(one)
            if len(held) == len(open_):
                time.sleep(WAIT)
            open_ = held
        return [self._found[training_folder(config)] for _, config, _ in wanted]

    def _make(self, folder: Path, name: str, config: BenchConfig, milliseconds: float) -> None:
        if folder in self._found:
            return
        self._number += 1
        stored = {} if self._rerun else read_json(folder / TRAINING_FILE)
        if not stored:
            told = f"training {self._number} of {self._count}: {name}, {config.train.steps} steps"
            print(f"{told}; {tqdm.format_interval(self._left / 1e3)} left", flush=True)
            if self._rerun:
                shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            stored = self._results.run("training", config, name)
        self._found[folder] = stored
        self._left -= milliseconds
