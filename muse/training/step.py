"""One step of training: the gradient of its micro-batches, its size, and the update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from muse.config import RunConfig
from muse.dynamics import (
    agree_on_fallbacks,
    deferred_checks,
    layers_that_fall_back,
    take_reconstruction_error,
)
from muse.errors import RunError
from muse.hardware import autocast_dtype, restore_torch_random_state, torch_random_state
from muse.layers.packing import packing_of
from muse.models import LanguageModel
from muse.models.language_model import model_device
from muse.processes.ranks import all_reduced_sum, rank, ranks
from muse.training.optim import ModelOptimizer, first_non_finite
from muse.training.parallel import ParallelLoss
from muse.training.selection import Selected, Selection, selection_of


class NotFinite(RunError):
    """A step's loss or gradient is not finite, and nothing was updated.

    Attributes:
        what: ``loss`` or ``gradient norm``.
        where: the first parameter with a bad value or gradient, or ``the activations``.
    """

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"the {what} is not finite; the first bad value is in {where}")
        self.what, self.where = what, where


class Batch(NamedTuple):
    """A micro-batch of a rank.

    Attributes:
        inputs: int64 (B, S).
        targets: likewise; those below 0 do not count.
        positions: of each token in its document, likewise, on the CPU; None where a window is one text.
        weight: of its mean loss in the mean over the step, times the number of ranks; None where that is as
            much as that of any other.
    """

    inputs: Tensor
    targets: Tensor
    positions: Tensor | None = None
    weight: float | None = None


# Of one whose windows are texts, inputs and targets will do.
Batches = Sequence[Batch | tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TakenStep:
    """What all ranks found in a step.

    Attributes:
        loss: mean over the targets that count, of all ranks.
        gradient_norm: before clipping. It is not finite where a loss scaler skipped the update.
        reconstruction_error: the largest of any flow that compares; None where none does.
        signal: the largest number of a signal that a rank was sent.
        rebuilt: whether a reversible trunk, if there is one, came back to where it began.
        selected: mean loss of the tokens that a selection kept, their share, and the share of windows that
            have one; None without selection. ``loss`` is of all tokens.
    """

    loss: float
    gradient_norm: float
    reconstruction_error: float | None
    signal: int | None
    rebuilt: bool
    selected: tuple[float, float, float] | None = None


class Loss(Protocol):
    """What a step asks of a loss, as ``ParallelLoss`` has it."""

    def __call__(self, tokens: Tensor, targets: Tensor, /) -> Tensor: ...

    def gradients_summed(self, last: bool) -> AbstractContextManager[None]: ...


class Optimizer(Protocol):
    """What a step asks of an optimiser, as ``ModelOptimizer`` has it."""

    optimizers: list[torch.optim.Optimizer]

    def attach_gradients(self) -> None: ...

    def gradient_norm(self) -> Tensor: ...

    def step(self, step: int, factor: float = 1.0) -> None: ...


AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


def training_step(config: RunConfig, model: LanguageModel) -> TrainingStep[ModelOptimizer]:
    """The step of a run; ``hardware.parallel=fsdp`` shards the parameters of the model, on its device."""
    # First, because the optimiser takes the parameters as they are sharded.
    loss = ParallelLoss(model, config.hardware.parallel)
    optimizer = ModelOptimizer(model, config.optim, config.seed)
    selection = selection_of(config, loss, model_device(model))
    return TrainingStep(model, loss, optimizer, config.optim.clip, config.stage.precision, selection)


class TrainingStep(Generic[AnyOptimizer]):
    """What every step does to a model and its optimiser, on all ranks together.

    The host waits for the device once a step, after the backward pass and before the update.

    Args:
        model: on its device.
        loss: of a micro-batch.
        optimizer: of the parameters.
        clip: largest gradient norm; 0 for none.
        precision: the stage's; of float16 the loss is scaled.
        selection: of the tokens to learn from; None for all.
    """

    def __init__(
        self,
        model: LanguageModel,
        loss: Loss,
        optimizer: AnyOptimizer,
        clip: float = 0.0,
        precision: str = "fp32",
        selection: Selection | None = None,
    ) -> None:
        self.model, self.loss, self.optimizer, self.clip = model, loss, optimizer, clip
        self.selection = selection
        self.selected: Tensor | None = None
        self.device = model_device(model)
        self.layers = layers_that_fall_back(model)
        # As all ranks know it.
        self.fallen_back = [False for _ in self.layers]
        self.cast = autocast_dtype(precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.cast == torch.float16)

    def take(self, number: int, batches: Batches, signal: int | None = None) -> TakenStep:
        """Take the gradient of the mean loss of the micro-batches, clip it and update the parameters.

        A step in which the state of a flow or of the trunk is lost, or that of the trunk was not rebuilt, is
        taken again, with that layer on checkpointing.

        Args:
            number: of the step, from 0.
            batches: of this rank.
            signal: that this rank was sent.

        Raises:
            NotFinite: the loss or a gradient is not. With a loss scaler a gradient that overflowed skips the
                update and lowers the scale, as is usual, until the scale is used up.
            RunError: the state of a flow is not finite.
        """
        random = torch_random_state() if self.layers else None
        with deferred_checks(self.model):
            taken = self.agree(self.gradients(batches, number), signal)
        if random is not None and not (taken.rebuilt and math.isfinite(taken.loss)):
            restore_torch_random_state(random)
            taken = self.agree(self.gradients(batches, number), signal)
        self.update(number, taken)
        return taken

    def gradients(self, batches: Batches, number: int = 0) -> Tensor:
        """Leave the gradient of the mean loss of the micro-batches in the parameters.

        Args:
            batches: as ``take`` has them.
            number: of the step, from 0.

        Returns:
            That loss, over the windows of this rank: a float64 scalar on the device. With a selection the
            gradient is of the tokens that it keeps, and the loss of all.
        """
        self.model.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        selected = None if self.selection is None else torch.zeros(3).to(total)
        for piece, batch in enumerate(Batch(*given) for given in batches):
            inputs, targets = (x.to(self.device, non_blocking=True) for x in (batch.inputs, batch.targets))
            found: Selected | None = None
            with self.loss.gradients_summed(last=piece + 1 == len(batches)):
                with torch.autocast(self.device.type, self.cast, enabled=self.cast is not None):
                    if self.selection is not None:
                        found = self.selection.loss(inputs, targets, number, piece)
                    loss = self._mean_loss(inputs, targets, batch.positions) if found is None else found.loss
                    loss = loss / len(batches) if batch.weight is None else loss * batch.weight
                self.scaler.scale(loss).backward()
            if found is None:
                total += loss.detach()
            else:
                assert selected is not None
                total += found.of_all / len(batches)
                selected += torch.stack((found.loss.detach(), found.share, found.windows)) / len(batches)
        self.selected = selected
        return total

    def _mean_loss(self, inputs: Tensor, targets: Tensor, positions: Tensor | None) -> Tensor:
        if positions is None:
            return self.loss(inputs, targets)
        assert isinstance(self.loss, ParallelLoss)
        return self.loss(inputs, targets, packing=packing_of(positions).to(self.device))

    def agree(self, loss: Tensor, signal: int | None = None) -> TakenStep:
        """What all ranks found in a step whose gradients are there; the host waits for it.

        Args:
            loss: of this rank, as ``gradients`` returns it.
            signal: that this rank was sent.
        """
        self.optimizer.attach_gradients()
        norm = self.optimizer.gradient_norm()
        error = take_reconstruction_error(self.model)
        failed = self.model.trunk.take_rebuild_failed() if self.model.trunk is not None else None
        # A column for each rank: its share of the loss, its error, its signal, whether more layers fell back
        # and whether the trunk was not rebuilt; then what a selection has found.
        columns = torch.zeros(
            5 if self.selected is None else 8, ranks(), dtype=torch.float64, device=self.device
        )
        columns[0, rank()] = loss / ranks()
        columns[1, rank()] = -1.0 if error is None else error
        columns[2, rank()] = signal or 0
        columns[3, rank()] = [layer.fallen_back for layer in self.layers] != self.fallen_back
        if failed is not None:
            columns[4, rank()] = failed
        if self.selected is not None:
            columns[5:, rank()] = self.selected / ranks()
        if ranks() > 1:
            columns = all_reduced_sum(columns)
        # All that the host waits for.
        found = torch.cat((columns, norm.double().expand(1, ranks()))).tolist()
        losses, errors, signals, differing, lost, *selected, norms = found
        if any(lost) and self.model.trunk is not None:
            self.model.trunk.fall_back("the inputs of its sub-layers were not rebuilt to the last bit")
        if any(differing) or any(lost):
            agree_on_fallbacks(self.model)
            self.fallen_back = [layer.fallen_back for layer in self.layers]
        return TakenStep(
            loss=math.fsum(losses),
            gradient_norm=norms[0] / self.scaler.get_scale(),
            reconstruction_error=None if max(errors) < 0 else max(errors),
            signal=int(max(signals)) or None,
            rebuilt=not any(lost),
            selected=(math.fsum(selected[0]), math.fsum(selected[1]), math.fsum(selected[2]))
            if selected
            else None,
        )

    def update(self, number: int, taken: TakenStep) -> None:
        """Clip the gradients and update the parameters; see ``take``."""
        if self.scaler.is_enabled():
            for inner in self.optimizer.optimizers:
                self.scaler.unscale_(inner)
        loss, norm = taken.loss, taken.gradient_norm
        finite = math.isfinite(loss) and math.isfinite(norm)
        overflowed = self.scaler.is_enabled() and math.isfinite(loss) and self.scaler.get_scale() > 1
        if not finite and not overflowed:
            what = "loss" if not math.isfinite(loss) else "gradient norm"
            raise NotFinite(what, first_non_finite(self.model) or "the activations")
        if finite:
            self.optimizer.step(number, min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0)
        if self.scaler.is_enabled():
            self.scaler.update()
