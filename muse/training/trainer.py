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
from muse.distributed import largest, rank, ranks, summed
from muse.dynamics import agree_on_fallbacks, flow_metrics
from muse.errors import ConfigError, of_all_ranks
from muse.hardware import autocast_dtype
from muse.models import LanguageModel, build_model, count_parameters
from muse.training.checkpoint import (
    CheckpointWriter,
    TrainingState,
    find_checkpoint,
    load_state,
    load_tensors,
    restore_random_state,
)
from muse.training.evaluate import Evaluation, evaluate
from muse.training.interrupt import deferred_interrupt
from muse.training.optim import ModelOptimizer, first_non_finite, gradient_norm
from muse.training.parallel import ParallelLoss
from muse.training.profile import profiled
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
    """Train the model of a stage, on all ranks together.

    Every step is a function of the weights, the optimiser's state, the random state and the step's
    number, all of which a checkpoint holds: a resumed run ends with the same bits as an undisturbed one.
    On another number of ranks it sees the same windows, but sums them in another order.

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
        ConfigError: when a micro-batch cannot be shared among the ranks.
        RunError: when a loss or gradient is not finite, or a checkpoint cannot be written or read.
    """
    options, seq_len = config.train, config.model.seq_len
    if options.batch_size % ranks():
        raise ConfigError(
            f"train.batch_size={options.batch_size} windows cannot be shared by {ranks()} processes; choose "
            "a multiple"
        )
    model = build_model(config.stage, config.model, data.vocab_size, config.seed)
    parameters = count_parameters(model)
    state = load_state(resume_from) if resume_from is not None else None
    # Ranks drop different activations; on another number of ranks, see below, a run that goes on drops others
    # than at its beginning.
    torch.manual_seed(config.seed + rank() * 1_000_003 + (state.step if state else 0) * 1_000_000_007)
    model.to(device)
    if config.hardware.compile:
        model.compile_features()
    parallel_loss = ParallelLoss(model, config.hardware.parallel)
    optimizer = ModelOptimizer(model, config.optim, config.seed)
    cast = autocast_dtype(config.stage.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=cast == torch.float16)
    start, best_loss = 0, math.inf
    if resume_from is not None and state is not None:
        tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        load_tensors(resume_from, tensors)
        model.load_state_dict(tensors["model"])
        optimizer.load_state_dict(tensors["optimizer"])
        scaler.load_state_dict(state.scaler)
        # A checkpoint of another number of ranks has no random states for these.
        if len(state.random) == ranks():
            restore_random_state(state.random[rank()])
        start, best_loss = state.step, state.best_loss

    writer = CheckpointWriter(run / "checkpoints", options.async_checkpoint)
    tokens_per_step = options.batch_size * config.optim.accumulation * seq_len
    speeds: list[float] = []
    began = time.perf_counter()

    def save(step: int, best: bool) -> None:
        writer.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
            TrainingState(
                step=step, scaler=scaler.state_dict(), random=[], best_loss=best_loss, wandb_id=wandb_id
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
        disable=None if progress and rank() == 0 else True,
        dynamic_ncols=True,
    )
    quiet = bool(bar.disable) and rank() == 0
    step, signal_number = start, None
    profiling = profiled(config, model, optimizer, data.vocab_size, device, run)
    with (
        deferred_interrupt() as interrupt,
        bar,
        profiling as profile_step,
        writer.finished_on_error(),
    ):
        while step < options.steps and signal_number is None:
            before = time.perf_counter()
            optimizer.set_learning_rate(learning_rate_factor(config.optim, step, options.steps))
            loss = _accumulate_gradients(parallel_loss, config, data, device, step, cast, scaler)
            loss, signal_number = _agree(model, loss, interrupt.signal, device)
            norm = _update(model, optimizer, scaler, config, step, loss, writer)
            step += 1
            seconds = time.perf_counter() - before
            speeds.append(tokens_per_step / seconds)
            profile_step(seconds)
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
                if rank() == 0:
                    bar.write(f"step {step}: validation loss {valid.loss:.3f}, perplexity {valid.ppl:.1f}")
                best, best_loss = valid.loss < best_loss, min(best_loss, valid.loss)
            periodic = options.checkpoint_every and step % options.checkpoint_every == 0
            if (periodic or best) and step < options.steps:
                save(step, best)
            if ranks() == 1:
                # Several agree on it in their next step.
                signal_number = interrupt.signal
        # Before the evaluation, which may take long: a run that is killed in it goes on from here. A signal
        # still waits: that of this rank may come after all have stopped for that of another one.
        save(step, best=False)
        writer.finish()
        signal_number = signal_number or _agreed(interrupt.signal, device)

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
        parameters=parameters,
        tokens=step * tokens_per_step,
        seconds=time.perf_counter() - began,
        tokens_per_second=sorted(speeds)[len(speeds) // 2] if speeds else 0.0,
        checkpoint=find_checkpoint(run),
        signal=signal_number,
    )


def _accumulate_gradients(
    parallel_loss: ParallelLoss,
    config: RunConfig,
    data: TokenData,
    device: torch.device,
    step: int,
    cast: torch.dtype | None,
    scaler: torch.amp.GradScaler,
) -> float:
    """Leave the gradient of the mean loss of a step's micro-batches in the parameters.

    Returns:
        That loss, over the windows of this rank.
    """
    parallel_loss.model.zero_grad(set_to_none=True)
    total = 0.0
    pieces, size = config.optim.accumulation, config.train.batch_size
    own = slice(rank() * size // ranks(), (rank() + 1) * size // ranks())
    for piece in range(pieces):
        inputs, targets = training_batch(
            data.train, step * pieces + piece, size, config.model.seq_len, config.seed
        )
        with parallel_loss.gradients_summed(last=piece == pieces - 1):
            with torch.autocast(device.type, cast, enabled=cast is not None):
                loss = parallel_loss(inputs[own].to(device), targets[own].to(device)) / pieces
            scaler.scale(loss).backward()
        total += loss.item()
    return total


def _agree(
    model: LanguageModel, loss: float, signal: int | None, device: torch.device
) -> tuple[float, int | None]:
    """The mean loss of all ranks, and the signal that one was sent: they stop after the same step."""
    if ranks() == 1:
        return loss, None
    agree_on_fallbacks(model)
    losses, signals = torch.zeros(2, ranks(), dtype=torch.float64, device=device)
    losses[rank()], signals[rank()] = loss / ranks(), signal or 0
    losses, signals = summed(torch.stack((losses, signals))).cpu()
    return losses.sum().item(), int(signals.max()) or None


def _agreed(signal: int | None, device: torch.device) -> int | None:
    """The signal that a rank was sent, on all."""
    return int(largest(torch.tensor(signal or 0, device=device))) or None


def _update(
    model: LanguageModel,
    optimizer: ModelOptimizer,
    scaler: torch.amp.GradScaler,
    config: RunConfig,
    step: int,
    loss: float,
    writer: CheckpointWriter,
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
        writer.finish()
        last_checkpoint = find_checkpoint(writer.folder.parent)
        kept = (
            f"the last good checkpoint is {last_checkpoint}"
            if last_checkpoint
            else "no checkpoint was written yet"
        )
        where = first_non_finite(model) or "the activations"
        raise of_all_ranks(
            f"the {what} is not finite in step {step + 1}; the first bad value is in "
            f"{where}; {kept}; a lower optim.lr, a longer "
            "optim.warmup or stage.precision=fp32 may help"
        )
    if finite:
        clip = config.optim.clip
        optimizer.step(step, min(1.0, clip / (norm + 1e-6)) if clip else 1.0)
    if scaler.is_enabled():
        scaler.update()
    return norm
