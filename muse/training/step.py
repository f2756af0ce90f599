"""One step of training: the gradient of its micro-batches, its size, and the update."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from muse.config import HardwareConfig, OptimConfig
from muse.errors import RunError
from muse.hardware import autocast_dtype
from muse.models import LanguageModel
from muse.models.language_model import model_device
from muse.training.optim import ModelOptimizer, first_non_finite, gradient_norm
from muse.training.parallel import ParallelLoss


class NotFinite(RunError):
    """A step's loss or gradient is not finite, and nothing was updated.

    Attributes:
        what: ``loss`` or ``gradient norm``.
        where: the first parameter with a bad value or gradient, or ``the activations``.
    """

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"the {what} is not finite; the first bad value is in {where}")
        self.what, self.where = what, where


class TrainingStep:
    """What every step does to a model and its optimiser, on all ranks together.

    A step is ``gradients`` and then ``update``; between them ranks may agree on its loss.

    Args:
        model: on its device. ``hardware.parallel=fsdp`` shards its parameters.
        optim: the optimiser, and where gradients are clipped.
        hardware: how ranks share the model.
        precision: the stage's; of float16 the loss is scaled.
        seed: of the optimiser's rounding.
    """

    def __init__(
        self, model: LanguageModel, optim: OptimConfig, hardware: HardwareConfig, precision: str, seed: int
    ) -> None:
        self.model, self.clip = model, optim.clip
        self.device = model_device(model)
        self.loss = ParallelLoss(model, hardware.parallel)
        self.optimizer = ModelOptimizer(model, optim, seed)
        self.cast = autocast_dtype(precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.cast == torch.float16)

    def gradients(self, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
        """Leave the gradient of the mean loss of the micro-batches in the parameters.

        Args:
            batches: inputs and targets of this rank, int64 (B, S) each.

        Returns:
            That loss, over the windows of this rank.
        """
        self.model.zero_grad(set_to_none=True)
        total = 0.0
        for number, (inputs, targets) in enumerate(batches, 1):
            with self.loss.gradients_summed(last=number == len(batches)):
                with torch.autocast(self.device.type, self.cast, enabled=self.cast is not None):
                    loss = self.loss(inputs.to(self.device), targets.to(self.device)) / len(batches)
                self.scaler.scale(loss).backward()
            total += loss.item()
        return total

    def update(self, number: int, loss: float) -> float:
        """Clip the gradients, update the parameters and return the norm before clipping.

        Args:
            number: of the step, from 0.
            loss: of all ranks.

        Raises:
            NotFinite: the loss or a gradient is not. With a loss scaler a gradient that overflowed skips the
                step and lowers the scale, as is usual, until the scale is used up.
        """
        self.optimizer.attach_gradients()
        if self.scaler.is_enabled():
            for inner in self.optimizer.optimizers:
                self.scaler.unscale_(inner)
        norm = gradient_norm(self.model).item()
        finite = math.isfinite(loss) and math.isfinite(norm)
        overflowed = self.scaler.is_enabled() and math.isfinite(loss) and self.scaler.get_scale() > 1
        if not finite and not overflowed:
            what = "loss" if not math.isfinite(loss) else "gradient norm"
            raise NotFinite(what, first_non_finite(self.model) or "the activations")
        if finite:
            self.optimizer.step(number, min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0)
        if self.scaler.is_enabled():
            self.scaler.update()
        return norm
