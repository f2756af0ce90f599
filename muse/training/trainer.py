"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from muse.config import RunConfig
from muse.data import TokenData, training_batch
from muse.dynamics import flow_metrics
from muse.errors import RunError
from muse.hardware import autocast_dtype
from muse.models import LanguageModel, build_model, count_parameters
from muse.training.checkpoint import (
    TrainingState,
    load_state,
    load_weights,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from muse.training.evaluate import Evaluation, evaluate
from muse.training.interrupt import deferred_interrupt
from muse.training.optim import ModelOptimizer, first_non_finite, gradient_norm
from muse.training.schedule import learning_rate_factor

Log = Callable[[int, dict[str, float]], None]


@dataclass
class TrainResult:
    """What a training run ended with.

    Attributes:
        step: finished steps.
        valid: evaluation of the whole validation split; None when the run was interrupted.
        test: evaluation of the test split, where asked for.
        parameters: number of parameters.
        tokens: training tokens seen.
        seconds: wall time of this process's part of the run.
        tokens_per_second: median training speed, evaluation and checkpoints left out.
        checkpoint: folder of the last checkpoint.
        signal: number of the signal that interrupted the run.
    """

    step: int
    valid: Evaluation | None
    test: Evaluation | None
    parameters: int
    tokens: int
    seconds: float
    tokens_per_second: float
    checkpoint: Path | None
    signal: int | None


def train(
    config: RunConfig,
    data: TokenData,
    device: torch.device,
    run: Path,
    log: Log,
    resume_from: Path | None = None,
    wandb_id: str | None = None,
    progress: bool = True,
) -> tuple[LanguageModel, TrainResult]:
    """Train the model of a stage.

    Every step is a function of the weights, the optimiser's state, the random state and the step's
    number, all of which a checkpoint holds: a resumed run ends with the same bits as an undisturbed one.

    Args:
        config: what to train and how.
        data: tokenised splits.
        device: device of the model.
        run: folder of the run; checkpoints go below it.
        log: called with the step and its metrics.
        resume_from: a checkpoint to go on from.
        wandb_id: kept in the checkpoints, so that a resumed run finds its W&B run.
        progress: whether a progress bar is drawn where standard error is a terminal.

    Returns:
        The model with its last weights, in evaluation mode, and the result.

    Raises:
        RunError: when a loss or gradient is not finite, or a checkpoint cannot be written or read.
    """
    options, seq_len = config.train, config.model.seq_len
    model = build_model(config.stage, config.model, data.vocab_size, config.seed)
    torch.manual_seed(config.seed)
    state = load_state(resume_from) if resume_from is not None else None
    if resume_from is not None:
        load_weights(resume_from, model)
    model.to(device)
    if config.hardware.compile:
        model.compile_features()
    optimizer = ModelOptimizer(model, config.optim, config.seed)
    cast = autocast_dtype(config.stage.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=cast == torch.float16)
    start, best_loss = 0, math.inf
    if state is not None:
        optimizer.load_state_dict(state.optimizers)
        scaler.load_state_dict(state.scaler)
        restore_random_state(state.random)
        start, best_loss = state.step, state.best_loss

    checkpoints = run / "checkpoints"
    last_checkpoint = resume_from
    tokens_per_step = options.batch_size * config.optim.accumulation * seq_len
    speeds: list[float] = []
    began = time.perf_counter()

    def save(step: int, best: bool) -> Path:
        return save_checkpoint(
            checkpoints,
            model,
            TrainingState(
                step=step,
                optimizers=optimizer.state_dict(),
                scaler=scaler.state_dict(),
                random=random_state(),
                best_loss=best_loss,
                wandb_id=wandb_id,
            ),
            best,
        )

    def evaluation(split: str, limit: int) -> Evaluation:
        return evaluate(
            model,
            getattr(data, split),
            data.counts.get(split),
            seq_len,
            options.batch_size,
            options.eval_stride,
            limit,
            cast,
        )

    model.train()
    bar = tqdm(
        total=options.steps,
        initial=start,
        unit="step",
        disable=None if progress else True,
        dynamic_ncols=True,
    )
    quiet = bool(bar.disable)
    step = start
    with deferred_interrupt() as interrupt, bar:
        while step < options.steps and interrupt.signal is None:
            before = time.perf_counter()
            optimizer.set_learning_rate(learning_rate_factor(config.optim, step, options.steps))
            loss = _accumulate_gradients(model, config, data, device, step, cast, scaler)
            norm = _update(model, optimizer, scaler, config, step, loss, last_checkpoint)
            step += 1
            seconds = time.perf_counter() - before
            speeds.append(tokens_per_step / seconds)
            bar.update()
            if step % config.logger.log_every == 0 or step == options.steps:
                recent = sorted(speeds[-config.logger.log_every :])
                speed = recent[len(recent) // 2]
                rate = optimizer.optimizers[0].param_groups[0]["lr"]
                log(
                    step,
                    {
                        "train/loss": loss,
                        "train/grad_norm": norm,
                        "train/lr": rate,
                        "train/tokens": step * tokens_per_step,
                        "train/tokens_per_second": speed,
                        **flow_metrics(model),
                    },
                )
                bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
                if quiet and progress and step % (10 * config.logger.log_every) == 0:
                    left = (options.steps - step) * tokens_per_step / speed
                    print(
                        f"step {step}/{options.steps}  loss {loss:.3f}  {speed:,.0f} tokens/s  "
                        f"{tqdm.format_interval(left)} left",
                        flush=True,
                    )
            due = options.eval_every and step % options.eval_every == 0 and step < options.steps
            best = False
            if due:
                valid = evaluation("valid", options.eval_tokens)
                log(step, {"valid/loss": valid.loss, "valid/ppl": valid.ppl})
                bar.write(f"step {step}: validation loss {valid.loss:.3f}, perplexity {valid.ppl:.1f}")
                best, best_loss = valid.loss < best_loss, min(best_loss, valid.loss)
            periodic = options.checkpoint_every and step % options.checkpoint_every == 0
            if (periodic or best) and step < options.steps:
                last_checkpoint = save(step, best)
        signal_number = interrupt.signal

    # Before the evaluation, which may take long: a run that is killed in it goes on from here.
    last_checkpoint = save(step, best=False)
    valid_end = test_end = None
    if signal_number is None:
        valid_end = evaluation("valid", 0)
        log(step, {"valid/loss": valid_end.loss, "valid/ppl": valid_end.ppl})
        if options.test:
            test_end = evaluation("test", 0)
            log(step, {"test/loss": test_end.loss, "test/ppl": test_end.ppl})
        if valid_end.loss < best_loss:
            save(step, best=True)
    model.eval()
    return model, TrainResult(
        step=step,
        valid=valid_end,
        test=test_end,
        parameters=count_parameters(model),
        tokens=step * tokens_per_step,
        seconds=time.perf_counter() - began,
        tokens_per_second=sorted(speeds)[len(speeds) // 2] if speeds else 0.0,
        checkpoint=last_checkpoint,
        signal=signal_number,
    )


def _accumulate_gradients(
    model: LanguageModel,
    config: RunConfig,
    data: TokenData,
    device: torch.device,
    step: int,
    cast: torch.dtype | None,
    scaler: torch.amp.GradScaler,
) -> float:
    """Leave the gradient of the mean loss of a step's micro-batches in the parameters; return that loss."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    pieces = config.optim.accumulation
    for piece in range(pieces):
        inputs, targets = training_batch(
            data.train, step * pieces + piece, config.train.batch_size, config.model.seq_len, config.seed
        )
        with torch.autocast(device.type, cast, enabled=cast is not None):
            loss = model.loss(inputs.to(device), targets.to(device)) / pieces
        scaler.scale(loss).backward()
        total += loss.item()
    return total


def _update(
    model: LanguageModel,
    optimizer: ModelOptimizer,
    scaler: torch.amp.GradScaler,
    config: RunConfig,
    step: int,
    loss: float,
    last_checkpoint: Path | None,
) -> float:
    """Clip the gradients, update the parameters and return the norm before clipping.

    Raises:
        RunError: when the loss or a gradient is not finite. With a loss scaler a gradient that overflowed
            skips the step and lowers the scale, as is usual, until the scale is used up.
    """
    optimizer.attach_gradients()
    if scaler.is_enabled():
        for inner in optimizer.optimizers:
            scaler.unscale_(inner)
    norm = gradient_norm(model).item()
    finite = math.isfinite(loss) and math.isfinite(norm)
    overflowed = scaler.is_enabled() and math.isfinite(loss) and scaler.get_scale() > 1
    if not finite and not overflowed:
        what = "loss" if not math.isfinite(loss) else "gradient norm"
        kept = (
            f"the last good checkpoint is {last_checkpoint}"
            if last_checkpoint
            else "no checkpoint was written yet"
        )
        raise RunError(
            f"the {what} is not finite in step {step + 1}; the first bad value is in "
            f"{first_non_finite(model) or 'the activations'}; {kept}; a lower optim.lr, a longer "
            "optim.warmup or stage.precision=fp32 may help"
        )
    if finite:
        clip = config.optim.clip
        optimizer.step(step, min(1.0, clip / (norm + 1e-6)) if clip else 1.0)
    if scaler.is_enabled():
        scaler.update()
    return norm
