"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from muse.config import RunConfig
from muse.data import TokenData, evaluation_windows, training_batch
from muse.dynamics import agree_on_fallbacks, flow_metrics, take_reconstruction_error, watched_flows
from muse.errors import ConfigError, RunError, of_all_ranks
from muse.models import LanguageModel, build_model, count_parameters
from muse.processes.ranks import largest, rank, ranks, summed
from muse.runs.checkpoints import TrainingState, find_checkpoint, load_state, load_tensors
from muse.training.checkpoint import CheckpointWriter, restore_random_state
from muse.training.evaluate import Evaluation, evaluate
from muse.training.interrupt import deferred_interrupt
from muse.training.profile import profiled
from muse.training.schedule import learning_rate_factor
from muse.training.step import NotFinite, TrainingStep

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
    training_step = TrainingStep(model, config.optim, config.hardware, config.stage.precision, config.seed)
    optimizer, scaler = training_step.optimizer, training_step.scaler
    start, best, best_loss = 0, False, math.inf
    stride = options.eval_stride or seq_len
    sampled, every_window = (
        evaluation_windows(len(data.valid), seq_len, stride, limit) for limit in (options.eval_tokens, 0)
    )
    # Losses along the way are compared where they are of the same windows.
    measure = (sampled, every_window, stride)
    unlogged: list[tuple[float, float, float | None]] = []
    if resume_from is not None and state is not None:
        tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        load_tensors(resume_from, tensors)
        model.load_state_dict(tensors["model"])
        optimizer.load_state_dict(tensors["optimizer"])
        scaler.load_state_dict(state.scaler)
        # A checkpoint of another number of ranks has no random states for these.
        if len(state.random) == ranks():
            restore_random_state(state.random[rank()])
        start, best, unlogged = state.step, state.best, list(state.unlogged)
        best_loss = state.best_loss if state.best_measure == measure else math.inf

    writer = CheckpointWriter(run / "checkpoints", options.async_checkpoint)
    tokens_per_step = options.batch_size * config.optim.accumulation * seq_len
    speeds: list[float] = []
    began = time.perf_counter()

    def save(step: int, best: bool) -> None:
        writer.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
            TrainingState(
                step=step,
                scaler=scaler.state_dict(),
                random=[],
                best_loss=best_loss,
                wandb_id=wandb_id,
                best_measure=measure,
                unlogged=unlogged,
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
            training_step.cast,
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
    valid: Evaluation | None = None
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
            loss = training_step.gradients(_batches(config, data, step))
            error = take_reconstruction_error(model)
            loss, error, signal_number = _agree(model, loss, error, interrupt.signal, device)
            try:
                norm = training_step.update(step, loss)
            except NotFinite as bad:
                raise _not_finite(bad, step, writer) from None
            step += 1
            seconds = time.perf_counter() - before
            speeds.append(tokens_per_step / seconds)
            profile_step(seconds)
            bar.update()
            unlogged.append((loss, norm, error))
            if step % config.logger.log_every == 0 or step == options.steps:
                speed = median(speeds[-len(unlogged) :])
                line = {
                    **_means(unlogged),
                    "train/lr": optimizer.optimizers[0].param_groups[0]["lr"],
                    "train/tokens": step * tokens_per_step,
                    "train/tokens_per_second": speed,
                    **flow_metrics(model),
                }
                unlogged = []
                log(step, line)
                told = f"loss {line['train/loss']:.3f}"
                bar.set_postfix_str(f"{told}, {speed:,.0f} tokens/s")
                if quiet and progress and step % (10 * config.logger.log_every) == 0:
                    left = (options.steps - step) * tokens_per_step / speed
                    print(
                        f"step {step}/{options.steps}  {told}  {speed:,.0f} tokens/s  "
                        f"{tqdm.format_interval(left)} left",
                        flush=True,
                    )
            best, valid = False, None
            if options.eval_every and (step % options.eval_every == 0 or step == options.steps):
                with watched_flows(model) as flows:
                    valid = evaluation("valid", options.eval_tokens)
                measured_on = {"valid/tokens": valid.tokens, "valid/stride": stride}
                log(step, {"valid/loss": valid.loss, "valid/ppl": valid.ppl, **measured_on, **flows})
                if rank() == 0 and step < options.steps:
                    bar.write(f"step {step}: validation loss {valid.loss:.3f}, perplexity {valid.ppl:.1f}")
                best, best_loss = valid.loss < best_loss, min(best_loss, valid.loss)
            elif step == options.steps:
                # Nothing was compared.
                best = best_loss == math.inf
            periodic = options.checkpoint_every and step % options.checkpoint_every == 0
            if (periodic or best) and step < options.steps:
                save(step, best)
            if ranks() == 1:
                # Several agree on it in their next step.
                signal_number = interrupt.signal
        # Before the whole split is evaluated, which may take long: a run that is killed in it goes on from
        # here. A signal still waits: that of this rank may come after all have stopped for that of another.
        save(step, best)
        writer.finish()
        signal_number = signal_number or _agreed(interrupt.signal, device)

    valid_end = test_end = None
    if signal_number is None:
        if valid is not None and sampled == every_window:
            valid_end, flows = valid, {}
        else:
            with watched_flows(model) as flows:
                valid_end = evaluation("valid", 0)
        whole = {"valid/whole_loss": valid_end.loss, "valid/whole_ppl": valid_end.ppl}
        # One measurement of the flows a step.
        log(step, whole if options.eval_every else {**whole, **flows})
        if options.test:
            test_end = evaluation("test", 0)
            log(step, {"test/loss": test_end.loss, "test/ppl": test_end.ppl})
    model.eval()
    return model, TrainResult(
        step=step,
        valid=valid_end,
        test=test_end,
        parameters=parameters,
        tokens=step * tokens_per_step,
        seconds=time.perf_counter() - began,
        tokens_per_second=median(speeds) if speeds else 0.0,
        checkpoint=find_checkpoint(run),
        signal=signal_number,
    )


def _batches(config: RunConfig, data: TokenData, step: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets of this rank in each micro-batch of a step."""
    pieces, size = config.optim.accumulation, config.train.batch_size
    own = slice(rank() * size // ranks(), (rank() + 1) * size // ranks())
    batches = (
        training_batch(data.train, step * pieces + piece, size, config.model.seq_len, config.seed)
        for piece in range(pieces)
    )
    return [(inputs[own], targets[own]) for inputs, targets in batches]


def _not_finite(bad: NotFinite, step: int, writer: CheckpointWriter) -> RunError:
    """What is said of a step that is not finite, when the last checkpoint is written."""
    writer.finish()
    last_checkpoint = find_checkpoint(writer.folder.parent)
    kept = (
        f"the last good checkpoint is {last_checkpoint}"
        if last_checkpoint
        else "no checkpoint was written yet"
    )
    return of_all_ranks(
        f"the {bad.what} is not finite in step {step + 1}; the first bad value is in {bad.where}; {kept}; a "
        "lower optim.lr, a longer optim.warmup or stage.precision=fp32 may help"
    )


def _agree(
    model: LanguageModel, loss: float, error: float | None, signal: int | None, device: torch.device
) -> tuple[float, float | None, int | None]:
    """Of a step the mean loss and the largest reconstruction error of all ranks, and the signal to one.

    They stop after the same step.
    """
    if ranks() == 1:
        return loss, error, None
    agree_on_fallbacks(model)
    losses, errors, signals = torch.zeros(3, ranks(), dtype=torch.float64, device=device)
    losses[rank()], errors[rank()] = loss / ranks(), -1 if error is None else error
    signals[rank()] = signal or 0
    losses, errors, signals = summed(torch.stack((losses, errors, signals))).cpu()
    worst = errors.max().item()
    return losses.sum().item(), None if worst < 0 else worst, int(signals.max()) or None


def _means(steps: list[tuple[float, float, float | None]]) -> dict[str, float]:
    """What is logged of some steps' losses, gradient norms and reconstruction errors.

    A norm that is not finite belongs to a step that was skipped.
    """
    losses = [loss for loss, _, _ in steps]
    norms = [norm for _, norm, _ in steps if math.isfinite(norm)]
    errors = [error for _, _, error in steps if error is not None]
    return {
        "train/loss": math.fsum(losses) / len(losses),
        "train/last_loss": losses[-1],
        "train/grad_norm": math.fsum(norms) / len(norms) if norms else math.nan,
        "train/max_grad_norm": max(norms, default=math.nan),
        **({"flow/reconstruction_error": max(errors)} if errors else {}),
    }


def _agreed(signal: int | None, device: torch.device) -> int | None:
    """The signal that a rank was sent, on all."""
    return int(largest(torch.tensor(signal or 0, device=device))) or None
