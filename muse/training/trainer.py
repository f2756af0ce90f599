"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from muse.config import RunConfig
from muse.data import (
    TokenData,
    document_batch,
    document_targets,
    end_of_training_text,
    evaluation_windows,
    packed_text,
    training_batch,
)
from muse.dynamics import flow_metrics, watched_flows
from muse.errors import ConfigError, RunError, of_all_ranks
from muse.layers.koopman import half_lives, watched_predictions
from muse.layers.mera import levels_read
from muse.models import LanguageModel, build_model, count_parameters
from muse.models.dialectic import watched_contradiction
from muse.options import changed
from muse.processes.ranks import all_reduced_max, rank, ranks
from muse.runs.checkpoints import TrainingState, find_checkpoint, find_weights, load_tensors, load_weights
from muse.runs.folder import CHECKPOINTS
from muse.training.checkpoint import CheckpointWriter, restore_random_state
from muse.training.evaluate import Evaluation, evaluate
from muse.training.interrupt import deferred_interrupt
from muse.training.profile import profiled
from muse.training.progress import Progress, shown_progress
from muse.training.schedule import learning_rate_factor
from muse.training.selection import check_reference
from muse.training.step import Batch, NotFinite, training_step

# What a selection of tokens is told by, in the order of ``TakenStep.selected``.
SELECTED = ("train/selected_loss", "train/selected_share", "train/selected_windows")
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
    resume_from: tuple[Path, TrainingState] | None = None,
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
        resume_from: a checkpoint to go on from, and its state.
        wandb_id: kept in the checkpoints, so that a resumed run finds its W&B run.
        progress: whether a progress bar is drawn where standard error is a terminal.

    Returns:
        The model with its last weights, in evaluation mode, and the result.

    Raises:
        ConfigError: when a micro-batch cannot be shared among the ranks.
        RunError: when a loss or gradient is not finite, or a checkpoint cannot be written or read.
    """
    config = until_end_of_text(config, data)
    trainer = Trainer(config, data, device, run, log, resume_from, wandb_id)
    began, signal_number = time.perf_counter(), None
    profiling = profiled(config, trainer.model, trainer.step.optimizer, data.vocab_size, device, run)
    with (
        deferred_interrupt() as interrupt,
        shown_progress(config, trainer.done, progress) as shown,
        profiling as profile_step,
        trainer.writer.finished_on_error(),
    ):
        while not trainer.ended and signal_number is None:
            before = time.perf_counter()
            signal_number = trainer.take_step(interrupt.signal)
            seconds = time.perf_counter() - before
            profile_step(seconds)
            shown.advance()
            trainer.log_step(seconds, shown)
            trainer.validate(shown)
            trainer.save_if_due()
            if ranks() == 1:
                # Several agree on it in their next step.
                signal_number = interrupt.signal
        # Before the whole split is evaluated, which may take long: a run that is killed in it goes on from
        # here. A signal still waits: that of this rank may come after all have stopped for that of another.
        trainer.save()
        trainer.writer.finish()
        signal_number = signal_number or _agreed(interrupt.signal, device)
    valid, test = (None, None) if signal_number is not None else trainer.evaluate_at_the_end()
    trainer.model.eval()
    return trainer.model, TrainResult(
        step=trainer.done,
        valid=valid,
        test=test,
        parameters=trainer.parameters,
        tokens=trainer.done * trainer.tokens_per_step,
        seconds=time.perf_counter() - began,
        tokens_per_second=median(trainer.speeds) if trainer.speeds else 0.0,
        checkpoint=find_checkpoint(run),
        signal=signal_number,
    )


def until_end_of_text(config: RunConfig, data: TokenData) -> RunConfig:
    """``config`` with the steps that there is training text for, where the end of that ends the run.

    Raises:
        ConfigError: it is not enough for one step, or cannot be packed.
    """
    seq_len, steps = config.model.seq_len, config.train.steps
    # First, so that what cannot be packed is told in any case.
    text = packed_text(data, seq_len) if config.data.packing == "documents" else data.train
    if config.data.at_end == "repeat":
        return config
    windows = config.train.batch_size * config.optim.accumulation
    end = end_of_training_text(text, windows, seq_len, config.seed, steps)
    if end is None:
        return config
    if end[0] == 0:
        raise ConfigError(
            f"data.at_end=stop: {end[1]} has fewer windows than a step takes of it; give more text, a lower "
            "train.batch_size or model.seq_len, or data.at_end=repeat"
        )
    return changed(config, train={"steps": end[0]})


class Trainer:
    """A model in training, as far as its checkpoints hold it, and what is logged on the way.

    Attributes:
        model: with its weights after ``done`` steps.
        step: what a step does.
        done: finished steps.
        writer: of the checkpoints.
        parameters: number of parameters.
        tokens_per_step: of all ranks.
        speeds: tokens a second of the steps of this process.
    """

    def __init__(
        self,
        config: RunConfig,
        data: TokenData,
        device: torch.device,
        run: Path,
        log: Log,
        resume_from: tuple[Path, TrainingState] | None,
        wandb_id: str | None,
    ) -> None:
        options, seq_len = config.train, config.model.seq_len
        if options.batch_size % ranks():
            raise ConfigError(
                f"train.batch_size={options.batch_size} windows cannot be shared by {ranks()} processes; "
                "choose a multiple"
            )
        self.config, self.data, self.device = config, data, device
        self.log, self.wandb_id = log, wandb_id
        self.model = build_model(config.stage, config.model, data.vocab_size, config.seed)
        self.parameters = count_parameters(self.model)
        done = resume_from[1].step if resume_from is not None else 0
        if options.init is not None and resume_from is None:
            weights = find_weights(Path(options.init))
            if weights is None:
                raise ConfigError(f"train.init={options.init} has no checkpoint yet; give a run that has one")
            load_weights(weights, self.model)
        # Ranks drop different activations; on another number of ranks, see ``_restore``, a run that goes on
        # drops others than at its beginning.
        torch.manual_seed(config.seed + rank() * 1_000_003 + done * 1_000_000_007)
        self.model.to(device)
        if config.hardware.compile:
            self.model.compile_features()
        check_reference(config, data.tokenizer)
        self.step = training_step(config, self.model)
        self.stride = options.eval_stride or seq_len
        self.sampled, self.every_window = (
            evaluation_windows(len(data.valid), seq_len, self.stride, limit)
            for limit in (options.eval_tokens, 0)
        )
        # Losses along the way are compared where they are of the same windows.
        self.measure = (self.sampled, self.every_window, self.stride)
        self.done, self.best, self.best_loss, self.stale = 0, False, math.inf, 0
        self.valid: Evaluation | None = None
        self.unlogged: list[tuple[float, float, float | None]] = []
        self.selected: list[tuple[float, float, float]] = []
        if resume_from is not None:
            self._restore(*resume_from)
        self.writer = CheckpointWriter(run / CHECKPOINTS, options.async_checkpoint)
        self.tokens_per_step = options.batch_size * config.optim.accumulation * seq_len
        self.speeds: list[float] = []
        self.model.train()

    def _restore(self, checkpoint: Path, state: TrainingState) -> None:
        tensors = self._tensors()
        load_tensors(checkpoint, tensors)
        self.model.load_state_dict(tensors["model"])
        self.step.optimizer.load_state_dict(tensors["optimizer"])
        self.step.scaler.load_state_dict(state.scaler)
        # A checkpoint of another number of ranks has no random states for these.
        if len(state.random) == ranks():
            restore_random_state(state.random[rank()])
        self.done, self.best, self.unlogged = state.step, state.best, list(state.unlogged)
        self.selected = list(state.selected)
        if state.best_measure == self.measure:
            self.best_loss, self.stale = state.best_loss, state.stale

    @property
    def ended(self) -> bool:
        """Whether all steps are made, or the validation loss has not fallen for long enough."""
        options = self.config.train
        return self.done >= options.steps or 0 < options.early_stop <= self.stale

    def take_step(self, signal: int | None) -> int | None:
        """Take a step; the signal that a rank was sent, where several have agreed on one.

        Raises:
            RunError: the loss or the gradient is not finite.
        """
        self.step.optimizer.set_learning_rate(
            learning_rate_factor(self.config.optim, self.done, self.config.train.steps)
        )
        try:
            taken = self.step.take(self.done, _batches(self.config, self.data, self.done), signal)
        except NotFinite as bad:
            raise _not_finite(bad, self.done, self.writer) from None
        self.done += 1
        self.unlogged.append((taken.loss, taken.gradient_norm, taken.reconstruction_error))
        if taken.selected is not None:
            self.selected.append(taken.selected)
        return taken.signal if ranks() > 1 else None

    def log_step(self, seconds: float, progress: Progress) -> None:
        """Note how long the step took, and where a line of metrics is due log and show it."""
        self.speeds.append(self.tokens_per_step / seconds)
        if self.done % self.config.logger.log_every and self.done < self.config.train.steps:
            return
        speed = median(self.speeds[-len(self.unlogged) :])
        line = {
            **_means(self.unlogged),
            "train/lr": self.step.optimizer.learning_rate,
            "train/tokens": self.done * self.tokens_per_step,
            "train/tokens_per_second": speed,
            **flow_metrics(self.model, (error for _, _, error in self.unlogged)),
        }
        if self.model.trunk is not None:
            line["trunk/fallbacks"] = float(self.model.trunk.fallback_count)
        if self.config.data.packing == "documents":
            line["train/padding"] = self._padding(self.done - len(self.unlogged))
        for name, values in zip(SELECTED, zip(*self.selected, strict=True), strict=False):
            line[name] = math.fsum(values) / len(values)
        self.unlogged, self.selected = [], []
        self.log(self.done, line)
        progress.show(self.done, line["train/loss"], speed, self.tokens_per_step)

    def _padding(self, before: int) -> float:
        """The share of padding in the steps after so many."""
        places = (self.done - before) * self.tokens_per_step
        return 1 - _targets(self.config, self.data, before, self.done) / places

    def validate(self, progress: Progress) -> None:
        """Where an evaluation is due, evaluate, and see whether the model is the best so far."""
        options = self.config.train
        ended = self.done == options.steps
        self.best, self.valid = False, None
        if options.eval_every and (self.done % options.eval_every == 0 or ended):
            with (
                watched_flows(self.model) as flows,
                watched_contradiction(self.model.antithesis) as contradiction,
                watched_predictions(self.model, self.model.koopman_prediction > 0) as predictions,
            ):
                self.valid = valid = self._evaluate("valid", options.eval_tokens)
            measured_on = {"valid/tokens": valid.tokens, "valid/stride": self.stride}
            watched = {**measured_on, **flows, **contradiction, **half_lives(self.model)}
            watched |= {**predictions, **levels_read(self.model)}
            self.log(self.done, {"valid/loss": valid.loss, "valid/ppl": valid.ppl, **watched})
            if not ended:
                progress.tell(
                    f"step {self.done}: validation loss {valid.loss:.3f}, perplexity {valid.ppl:.1f}"
                )
            self.best, self.best_loss = valid.loss < self.best_loss, min(self.best_loss, valid.loss)
            self.stale = 0 if self.best else self.stale + 1
            if self.ended and not ended:
                progress.tell(
                    f"the validation loss has not fallen for {self.stale} evaluations; the training ends "
                    f"(train.early_stop={options.early_stop})"
                )
        elif ended:
            # Nothing was compared.
            self.best = self.best_loss == math.inf

    def evaluate_at_the_end(self) -> tuple[Evaluation, Evaluation | None]:
        """The evaluations of the whole validation split, and of the test split where asked for."""
        if self.valid is not None and self.sampled == self.every_window:
            valid, flows = self.valid, {}
        else:
            with watched_flows(self.model) as flows:
                valid = self._evaluate("valid", 0)
        whole = {"valid/whole_loss": valid.loss, "valid/whole_ppl": valid.ppl}
        # One measurement of the flows a step.
        self.log(self.done, whole if self.config.train.eval_every else {**whole, **flows})
        if not self.config.train.test:
            return valid, None
        test = self._evaluate("test", 0)
        self.log(self.done, {"test/loss": test.loss, "test/ppl": test.ppl})
        return valid, test

    def _evaluate(self, split: str, limit: int) -> Evaluation:
        options = self.config.train
        return evaluate(
            self.model,
            getattr(self.data, split),
            self.data.counts.get(split),
            self.config.model.seq_len,
            options.batch_size,
            options.eval_stride,
            limit,
            self.step.cast,
        )

    def save_if_due(self) -> None:
        """Save a model that is the best so far, and one from time to time; the last one is saved anyway."""
        every = self.config.train.checkpoint_every
        periodic = every and self.done % every == 0
        if (periodic or self.best) and self.done < self.config.train.steps:
            self.save()

    def save(self) -> None:
        """Write a checkpoint of the finished steps."""
        state = TrainingState(
            step=self.done,
            scaler=self.step.scaler.state_dict(),
            random=[],
            best_loss=self.best_loss,
            wandb_id=self.wandb_id,
            best_measure=self.measure,
            stale=self.stale,
            unlogged=self.unlogged,
            selected=self.selected,
        )
        self.writer.save(self._tensors(), state, self.best)

    def _tensors(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.step.optimizer.state_dict()}


def _batches(config: RunConfig, data: TokenData, step: int) -> list[Batch]:
    """What this rank has of each micro-batch of a step."""
    pieces, size, seq_len = config.optim.accumulation, config.train.batch_size, config.model.seq_len
    own = slice(rank() * size // ranks(), (rank() + 1) * size // ranks())
    numbers = range(step * pieces, (step + 1) * pieces)
    if config.data.packing == "stream":
        batches = (training_batch(data.train, number, size, seq_len, config.seed) for number in numbers)
        return [Batch(inputs[own], targets[own]) for inputs, targets in batches]
    text, counted = packed_text(data, seq_len), _targets(config, data, step, step + 1)
    packed = []
    for number in numbers:
        inputs, targets, positions = (part[own] for part in document_batch(text, number, size, config.seed))
        # Windows have unequal numbers of targets, and each of these counts as much.
        weight = int((targets >= 0).sum()) * ranks() / counted
        packed.append(Batch(inputs, targets, positions, weight))
    return packed


def _targets(config: RunConfig, data: TokenData, first: int, last: int) -> int:
    """Targets that count in the steps ``first`` to ``last - 1`` on documents, of all ranks."""
    windows = config.train.batch_size * config.optim.accumulation
    text = packed_text(data, config.model.seq_len)
    return document_targets(text, first * windows, last * windows, config.seed)


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


def _means(steps: list[tuple[float, float, float | None]]) -> dict[str, float]:
    """What is logged of some steps' losses and gradient norms.

    A norm that is not finite belongs to a step that was skipped.
    """
    losses = [loss for loss, _, _ in steps]
    norms = [norm for _, norm, _ in steps if math.isfinite(norm)]
    return {
        "train/loss": math.fsum(losses) / len(losses),
        "train/last_loss": losses[-1],
        "train/grad_norm": math.fsum(norms) / len(norms) if norms else math.nan,
        "train/max_grad_norm": max(norms, default=math.nan),
    }


def _agreed(signal: int | None, device: torch.device) -> int | None:
    """The signal that a rank was sent, on all."""
    return int(all_reduced_max(torch.tensor(signal or 0, device=device))) or None
