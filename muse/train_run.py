"""One run of train.py: data, training, and everything it leaves in its folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from muse.config import RunConfig
from muse.data import TokenData, load_tokens
from muse.distributed import first_rank_does, joined_ranks, rank, ranks, same
from muse.errors import ConfigError
from muse.files import find_files, write_atomically, write_json
from muse.hardware import describe, use_hardware
from muse.models import LanguageModel
from muse.provenance import identity, provenance
from muse.report.metrics import MetricsLog, read_metrics
from muse.report.plots import plot_loss_curve
from muse.report.table import table
from muse.training.checkpoint import adopt_checkpoints, find_checkpoint, find_sound_checkpoint, load_state
from muse.training.profile import require_steps
from muse.training.sample import sample_text
from muse.training.trainer import TrainResult, train

RUN_FILE = "run.json"
RESULT_FILE = "result.json"
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
    with joined_ranks(device):
        return _run_on_ranks(config, same(run), device, in_sweep)


def _run_on_ranks(config: RunConfig, run: Path, device: torch.device, in_sweep: bool) -> int:
    if config.data.name == "synthetic":
        raise ConfigError(
            "data=synthetic has nothing to learn, it is for benchmarks; choose data=stdlib, wikitext2 or text"
        )
    previous, checkpoint = first_rank_does(lambda: _found_to_resume(config, in_sweep))
    if previous is not None and (previous / RESULT_FILE).exists():
        if rank() == 0:
            finished = json.loads((previous / RESULT_FILE).read_text(encoding="utf-8"))
            write_json(run / RESULT_FILE, {"reused_from": str(previous), **finished})
            print(
                f"{previous} is finished; its results are in {previous / RESULT_FILE}, resume=never starts "
                "afresh"
            )
        return 0
    state = load_state(checkpoint) if checkpoint is not None else None
    require_steps(config, state.step if state else 0)
    # The first rank fills data.cache, the others find everything there.
    first_rank_does(lambda: bool(_load_data(config)))
    try:
        data = _load_data(config)
    except ConfigError as error:
        # The first rank has found everything.
        error.everywhere = False
        raise
    if rank() > 0:
        model, result = train(config, data, device, run, lambda step, metrics: None, checkpoint)
        if result.signal is None:
            _sample(config, model, data)
        return 128 + result.signal if result.signal is not None else 0
    earlier: list[dict[str, Any]] = []
    if previous is not None and state is not None:
        print(f"resuming {previous} after step {state.step}")
        earlier = lines_before(previous, state.step, config.train.steps)
    print(
        f"stage {config.stage.number}, {config.model.name}, {config.stage.precision} on {describe(device)}"
        f"{f', {ranks()} ranks' if ranks() > 1 else ''}: "
        f"{len(data.train):,} training tokens of a vocabulary of {data.vocab_size:,}"
    )
    log = MetricsLog(run, config, earlier, state.wandb_id if state else None, previous)
    failed = True
    try:
        if previous is not None and checkpoint is not None:
            adopt_checkpoints(previous, checkpoint, run)
        # Last, because a run is continued as soon as this is there: it then has all of the one before.
        write_json(
            run / RUN_FILE,
            {
                **provenance(config),
                "device": describe(device),
                "resumed_from": str(previous) if previous else None,
            },
        )
        model, result = train(config, data, device, run, log, checkpoint, log.wandb_id)
        if result.signal is not None:
            # Before the picture: whoever sent the signal may not wait for that.
            print(
                f"interrupted; step {result.step} is saved, "
                "resume=auto with the same options goes on from there",
                flush=True,
            )
        curve = run / "loss.png"
        plot_loss_curve(curve, read_metrics(run), f"stage {config.stage.number}, {config.model.name}")
        if result.signal is not None:
            return 128 + result.signal
        summary = _summary(result)
        write_json(run / RESULT_FILE, {**summary, **provenance(config)})
        log.add_results(summary, [curve])
        print(_table(result))
        text = _sample(config, model, data)
        if text is not None:
            write_atomically(run / "sample.txt", text + "\n")
            print(f"\nsample, after {PROMPT} tokens of the validation split:\n{text}")
        print(f"\neverything is in {run}")
        failed = False
        return 0
    finally:
        log.close(failed)


def _load_data(config: RunConfig) -> TokenData:
    return load_tokens(config.data, config.tokenizer, config.model.vocab_size)


def _sample(config: RunConfig, model: LanguageModel, data: TokenData) -> str | None:
    """Text that the model goes on with; every rank draws it, since parameters may be sharded."""
    if not config.train.sample_tokens or data.tokenizer is None:
        return None
    prompt = [int(token) for token in data.valid[:PROMPT]]
    return sample_text(model, data.tokenizer, prompt, config.train.sample_tokens, config.model.seq_len)


def lines_before(previous: Path, step: int, last_step: int) -> list[dict[str, Any]]:
    """Metrics of the run to continue that will not be logged again: up to its checkpoint.

    The evaluation at the very end comes after the last checkpoint, all others come before theirs.
    """
    lines = [line for line in read_metrics(previous) if line["step"] <= step]
    return [line for line in lines if line["step"] < last_step or "train/loss" in line]


def _summary(result: TrainResult) -> dict[str, Any]:
    """The result as the JSON file holds it."""
    return {
        "steps": result.step,
        "tokens": result.tokens,
        "parameters": result.parameters,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "checkpoint": str(result.checkpoint),
        "valid": dataclasses.asdict(result.valid) if result.valid else None,
        "test": dataclasses.asdict(result.test) if result.test else None,
    }


def _table(result: TrainResult) -> str:
    splits = [(name, split) for name, split in (("valid", result.valid), ("test", result.test)) if split]
    return table(
        ("split", "loss [nats/token]", "perplexity", "per word", "bits/byte", "tokens"),
        [(name, s.loss, s.ppl, s.word_ppl, s.bits_per_byte, s.tokens) for name, s in splits],
    )


def _found_to_resume(config: RunConfig, in_sweep: bool) -> tuple[Path | None, Path | None]:
    """Folder of the run that ``resume`` means and its newest sound checkpoint; None to start afresh.

    Raises:
        ConfigError: when a folder is named that holds no checkpoint or another configuration.
        RunError: when every checkpoint of the run is damaged.
    """
    previous = run_to_resume(config, in_sweep)
    if previous is None or (previous / RESULT_FILE).exists():
        return previous, None
    return previous, find_sound_checkpoint(previous)


def run_to_resume(config: RunConfig, same_hardware: bool = False) -> Path | None:
    """Folder of the run that ``resume`` means; None to start afresh.

    Args:
        config: of the run that goes on.
        same_hardware: whether ``resume=auto`` takes runs with the same ``hardware`` options alone.

    Raises:
        ConfigError: when a folder is named that holds no checkpoint or another configuration.
    """
    if config.resume == "never":
        return None
    wanted = identity(config)
    if config.resume != "auto":
        run = Path(config.resume)
        if find_checkpoint(run) is None or not (run / RUN_FILE).exists():
            raise ConfigError(f"resume={config.resume} holds no checkpoint; give a run folder, auto or never")
        if _described(run).get("identity") != wanted:
            raise ConfigError(
                f"resume={config.resume} was trained with other options (see {run / RUN_FILE}); repeat its "
                "options, only hardware, logger, profile and output_root may differ"
            )
        return run

    def fits(run: dict[str, Any]) -> bool:
        hardware = dataclasses.asdict(config.hardware)
        return run.get("identity") == wanted and (
            not same_hardware or run.get("config", {}).get("hardware") == hardware
        )

    candidates = [
        file.parent
        for file in find_files(Path(config.output_root) / "train", RUN_FILE)
        if fits(_described(file.parent)) and find_checkpoint(file.parent) is not None
    ]
    return max(candidates, key=lambda run: (run / RUN_FILE).stat().st_mtime_ns, default=None)


def _described(run: Path) -> dict[str, Any]:
    """What a run wrote of itself; nothing where that cannot be read."""
    try:
        found = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
