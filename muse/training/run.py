"""One run of train.py: data, training, and everything it leaves in its folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from muse.config import RunConfig
from muse.data import Counts, TokenData, load_tokens
from muse.data.evaluation_sets import tokens_of_files
from muse.errors import ConfigError
from muse.files import write_atomically, write_json
from muse.generation import Sampling, continuation
from muse.hardware import autocast_dtype, describe, use_hardware
from muse.models import LanguageModel
from muse.processes.ranks import broadcast, on_first_rank, process_group, rank, ranks
from muse.report.metrics import MetricsLog, read_metrics, require_trackers
from muse.report.run_plot import (
    plot_contradiction,
    plot_flow,
    plot_half_lives,
    plot_levels_read,
    plot_loss_curve,
)
from muse.runs.checkpoints import (
    adopt_checkpoints,
    find_sound_checkpoint,
    find_weights,
    load_state,
    stored_vocabulary,
)
from muse.runs.folder import RESULT_FILE, RUN_FILE, SAMPLE_FILE, TOKENIZER_FILE, read_result
from muse.runs.options import format_changes
from muse.runs.provenance import provenance
from muse.trained import tokenizer_for, trained_options
from muse.training.evaluate import Evaluation, evaluate, evaluation_table
from muse.training.profile import require_steps
from muse.training.resume import (
    Previous,
    history_of,
    lines_before,
    run_to_resume,
    warn_of_changes,
)
from muse.training.trainer import TrainResult, train, until_end_of_text

# Tokens and sizes of each, by name.
EvaluationSets = Mapping[str, tuple[np.ndarray, Counts]]
# Tokens of the validation split that the sample goes on from.
PROMPT = 16


def run_training(config: RunConfig, run: Path, in_sweep: bool = False) -> int:
    """Train as configured and write the results into the folder ``run``.

    Of several ranks the first one writes, and all others train with it.

    Args:
        config: what to train and how.
        run: folder of the run.
        in_sweep: whether the run is a cell of a sweep, whose cells may differ in ``hardware`` alone.

    Returns:
        Exit status: 0, or 128 + the number of the signal that interrupted the run.
    """
    device = use_hardware(config.hardware)
    with process_group(device):
        return _run_on_ranks(config, broadcast(run), device, in_sweep)


def _run_on_ranks(config: RunConfig, run: Path, device: torch.device, in_sweep: bool) -> int:
    if config.data.name == "synthetic":
        raise ConfigError(
            "data=synthetic has nothing to learn, it is for benchmarks; choose data=stdlib, wikitext2, text, "
            "files or mix"
        )
    found, checkpoint = on_first_rank(lambda: _found_to_resume(config, in_sweep))
    if found is not None and found.is_finished:
        if rank() == 0:
            _reuse(found.run, run)
        return 0
    # Only the first rank logs.
    on_first_rank(lambda: require_trackers(config.logger))
    previous = found.run if found is not None else None
    resume_from = (checkpoint, load_state(checkpoint)) if checkpoint is not None else None
    state = resume_from[1] if resume_from is not None else None
    if state is not None and state.step > config.train.steps:
        raise ConfigError(
            f"train.steps={config.train.steps} is less than the {state.step} steps that {previous} has made; "
            f"it must be at least {state.step}"
        )
    require_steps(config, state.step if state else 0)
    loaded: list[TokenData] = []
    # The first rank fills data.cache, the others find everything there.
    on_first_rank(lambda: loaded.append(_load_data(config, previous)))
    try:
        data = loaded[0] if loaded else _load_data(config, previous)
    except ConfigError as error:
        # The first rank has found everything.
        error.of_all_ranks = False
        raise
    # Before the training, so that what cannot be read is told then.
    sets = _evaluation_sets(config, data)
    ending = until_end_of_text(config, data)
    if rank() > 0:
        model, result = train(config, data, device, run, lambda step, metrics: None, resume_from)
        if result.signal is None:
            _evaluated(config, model, sets)
            _sample(config, model, data)
        return 128 + result.signal if result.signal is not None else 0
    earlier: list[dict[str, Any]] = []
    history: dict[str, Any] = {}
    if found is not None and previous is not None and state is not None:
        changes = f", {format_changes(found.changes)}" if found.changes else ""
        print(f"resuming {previous} after step {state.step}{changes}")
        warn_of_changes(config, found, state.step)
        earlier = lines_before(previous, state.step, ending.train.steps)
        history = history_of(found, state.step)
    if config.train.init is not None and state is None:
        print(f"beginning with the weights of {config.train.init}")
    print(
        f"stage {config.stage.number}, {config.model.name}, {config.stage.precision} on {describe(device)}"
        f"{f', {ranks()} ranks' if ranks() > 1 else ''}: "
        f"{len(data.train):,} training tokens of a vocabulary of {data.vocab_size:,}"
    )
    if ending.train.steps < config.train.steps:
        print(f"data.at_end=stop: the training ends with its text, after {ending.train.steps:,} steps")
    log = MetricsLog(run, config, earlier, state.wandb_id if state else None, previous)
    failed = True
    try:
        if previous is not None and checkpoint is not None:
            adopt_checkpoints(previous, checkpoint, run, state is not None and state.best)
        if data.tokenizer is not None:
            write_atomically(run / TOKENIZER_FILE, data.tokenizer.to_json())
        # Last, because a run is continued as soon as this is there: it then has all of the one before.
        write_json(
            run / RUN_FILE,
            {
                **provenance(config),
                "device": describe(device),
                "ranks": ranks(),
                "resumed_from": os.path.relpath(previous, run) if previous else None,
                **history,
            },
        )
        model, result = train(config, data, device, run, log, resume_from, log.wandb_id)
        if result.signal is not None:
            # A sweep's resume=auto takes no run whose options have changed.
            resume = f"resume={run}" if history else "resume=auto"
            goes_on = f"{resume} with the same options goes on from there"
            # Before the pictures: whoever sent the signal may not wait for them.
            print(f"interrupted; step {result.step} is saved, {goes_on}", flush=True)
        plots = _plots(config, run)
        if result.signal is not None:
            return 128 + result.signal
        evaluated = _evaluated(config, model, sets)
        for name, evaluation in evaluated.items():
            log(result.step, {f"sets/{name}_loss": evaluation.loss, f"sets/{name}_ppl": evaluation.ppl})
        summary = _summary(result, run)
        if evaluated:
            summary["sets"] = {name: dataclasses.asdict(own) for name, own in evaluated.items()}
        write_json(run / RESULT_FILE, {**summary, **provenance(config), **history})
        log.add_results(summary, plots)
        print(_table(result, evaluated))
        text = _sample(config, model, data)
        if text is not None:
            write_atomically(run / SAMPLE_FILE, text + "\n")
            print(f"\nsample, after {PROMPT} tokens of the validation split:\n{text}")
        print(f"\neverything is in {run}")
        failed = False
        return 0
    finally:
        log.close(failed)


def _plots(config: RunConfig, run: Path) -> list[Path]:
    """Draw what the run has logged."""
    metrics, title = read_metrics(run), f"stage {config.stage.number}, {config.model.name}"
    plot_loss_curve(run / "loss.png", metrics, title)
    plot_flow(run / "flow.png", metrics, f"{title}: what its flows do")
    plot_half_lives(run / "half_lives.png", metrics, f"{title}: half-lives of its Koopman operators")
    plot_levels_read(run / "levels_read.png", metrics, f"{title}: what its MERA routers read")
    plot_contradiction(
        run / "contradiction.png", metrics, f"{title}: how far its synthesis is from its thesis"
    )
    names = ("loss.png", "flow.png", "half_lives.png", "levels_read.png", "contradiction.png")
    paths = (run / name for name in names)
    return [path for path in paths if path.exists()]


def _load_data(config: RunConfig, previous: Path | None) -> TokenData:
    """The text, in the tokens of the weights that the training begins with, if there are any.

    Raises:
        ConfigError: it cannot be loaded, or these have no tokenizer.
    """
    if config.train.init is None:
        return load_tokens(config.data, config.tokenizer, config.model.vocab_size)
    # Of a run that goes on: what it began with may be gone.
    place = previous if previous is not None else Path(config.train.init)
    weights = find_weights(place)
    size = stored_vocabulary(weights) if weights is not None else None
    tokenizer = tokenizer_for(place, trained_options(place), size) if size is not None else None
    if tokenizer is None:
        raise ConfigError(f"train.init={config.train.init} has no tokenizer; its tokens mean nothing without")
    return load_tokens(config.data, config.tokenizer, config.model.vocab_size, tokenizer)


def _evaluation_sets(config: RunConfig, data: TokenData) -> EvaluationSets:
    """What ``train.eval_sets`` names.

    Raises:
        ConfigError: one cannot be read.
    """
    assert data.tokenizer is not None
    return {
        name: tokens_of_files(data.tokenizer, [Path(file)], f"train.eval_sets.{name}")
        for name, file in config.train.eval_sets.items()
    }


def _evaluated(config: RunConfig, model: LanguageModel, sets: EvaluationSets) -> dict[str, Evaluation]:
    """Their evaluations, by all ranks together."""
    length, windows, stride = config.model.seq_len, config.train.batch_size, config.train.eval_stride
    precision = autocast_dtype(config.stage.precision)
    return {
        name: evaluate(model, tokens, counts, length, windows, stride, 0, precision)
        for name, (tokens, counts) in sets.items()
    }


def _sample(config: RunConfig, model: LanguageModel, data: TokenData) -> str | None:
    """Text that the model goes on with; every rank draws it, since parameters may be sharded."""
    if not config.train.sample_tokens or data.tokenizer is None:
        return None
    prompt = [int(token) for token in data.valid[:PROMPT]]
    drawn = continuation(model, prompt, config.train.sample_tokens, config.model.seq_len, Sampling())
    return data.tokenizer.decode([*prompt, *drawn])


def _summary(result: TrainResult, run: Path) -> dict[str, Any]:
    """The result as the JSON file in the folder ``run`` holds it; paths are relative to that folder."""
    return {
        "steps": result.step,
        "tokens": result.tokens,
        "parameters": result.parameters,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "checkpoint": os.path.relpath(result.checkpoint, run) if result.checkpoint is not None else None,
        "valid": dataclasses.asdict(result.valid) if result.valid else None,
        "test": dataclasses.asdict(result.test) if result.test else None,
    }


def _table(result: TrainResult, sets: Mapping[str, Evaluation]) -> str:
    own = {"valid": result.valid, "test": result.test}
    splits = {**{name: split for name, split in own.items() if split}, **sets}
    reasons = [
        f"{name} has no perplexity per word: {split.word_ppl_reason}"
        for name, split in splits.items()
        if split.word_ppl_reason
    ]
    return "\n".join([evaluation_table(splits, "split"), *reasons])


def _reuse(previous: Path, run: Path) -> None:
    """Give the folder ``run`` the results of a finished run."""
    finished = read_result(previous)
    if finished.get("checkpoint") is not None:
        finished["checkpoint"] = os.path.relpath(previous / finished["checkpoint"], run)
    write_json(run / RESULT_FILE, {"reused_from": os.path.relpath(previous, run), **finished})
    print(
        f"{previous} is finished; its results are in {previous / RESULT_FILE}, resume=never starts afresh, "
        f"resume={previous} train.steps=<more> goes on"
    )


def _found_to_resume(config: RunConfig, in_sweep: bool) -> tuple[Previous | None, Path | None]:
    """The run that ``resume`` means and its newest sound checkpoint; None to start afresh.

    Raises:
        ConfigError: when a folder is named that holds no checkpoint or another configuration.
        RunError: when every checkpoint of the run is damaged.
    """
    found = run_to_resume(config, in_sweep)
    if found is None or found.is_finished:
        return found, None
    return found, find_sound_checkpoint(found.run)
