"""Stage 3a in training: the step of every training, with the loss and the optimiser of the stack."""

from __future__ import annotations

import itertools
import math
import time
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from muse.acceleration.execution import Execution
from muse.acceleration.semantic_compressor import SemanticCompressor
from muse.config import BenchConfig
from muse.data import TokenData, training_batch
from muse.errors import RunError
from muse.hardware import synchronize
from muse.models import LanguageModel
from muse.models.language_model import model_device
from muse.training.optim import first_non_finite
from muse.training.step import NotFinite, TrainingStep


class ExecutedLoss:
    """The loss of a micro-batch as an execution computes it.

    Attributes:
        calls: when each call began, and its loss.
    """

    def __init__(
        self, model: LanguageModel, execution: Execution, compressor: SemanticCompressor | None
    ) -> None:
        self.model, self.execution, self.saving = model, execution, compressor or nullcontext()
        self.calls: list[tuple[float, Tensor]] = []

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        synchronize(inputs.device)
        began = time.perf_counter()
        loss = self.execution.training_loss(self.model, inputs, targets, saving=self.saving)
        self.calls.append((began, loss.detach()))
        return loss

    def gradients_summed(self, last: bool) -> AbstractContextManager[None]:
        """There are no other ranks."""
        return nullcontext()


class ClippedAdamW:
    """AdamW as an execution builds it, and torch's own clipping.

    Attributes:
        norms: of the whole gradient before clipping, of each update.
        gradient_range: smallest and largest norm of a single parameter's gradient so far.
    """

    def __init__(self, model: LanguageModel, optimizer: torch.optim.AdamW, clip: float) -> None:
        self.parameters, self.optimizer, self.clip = list(model.parameters()), optimizer, clip or math.inf
        self.optimizers: list[torch.optim.Optimizer] = [optimizer]
        self.norms: list[float] = []
        self.gradient_range = (math.inf, 0.0)

    def attach_gradients(self) -> None:
        """They are where AdamW looks for them."""

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of all gradients, which the next step clips by; a scalar tensor."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.parts = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
        self.norm = torch.linalg.vector_norm(self.parts)
        return self.norm

    def step(self, step: int, factor: float = 1.0) -> None:
        """Clip the gradients and update the parameters."""
        smallest, largest = self.gradient_range
        self.gradient_range = (min(smallest, self.parts.min().item()), max(largest, self.parts.max().item()))
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip, self.norm)
        self.norms.append(self.norm.item())
        self.optimizer.step()

    def state_tensors(self) -> list[Tensor]:
        """AdamW's moments."""
        states = self.optimizer.state.values()
        return [value for state in states for key, value in state.items() if key != "step"]


def batch_of(config: BenchConfig, data: TokenData, number: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a batch of the training, int64 (benchmark.batch_size, model.seq_len)."""
    assert config.benchmark.batch_size is not None
    return training_batch(data.train, number, config.benchmark.batch_size, config.model.seq_len, config.seed)


class StackTraining:
    """A stage-3a model in training, each update from the mean loss of several batches.

    Args:
        config: ``benchmark.batch_size`` windows of ``model.seq_len`` are a batch, and ``optim`` is of AdamW.
        data: tokenised splits.
        model: on its device.
        execution: of a step.
        compressed: whether activations are held in eight bits.

    Attributes:
        losses: of the batches so far.
        seconds: that each of them took, and the update after it, if there was one.
    """

    def __init__(
        self,
        config: BenchConfig,
        data: TokenData,
        model: LanguageModel,
        execution: Execution,
        compressed: bool = False,
    ) -> None:
        execution.apply(model)
        self.config, self.data, self.model, self.execution = config, data, model, execution
        self.compressor = SemanticCompressor(config.stack.ratio) if compressed else None
        self.loss = ExecutedLoss(model, execution, self.compressor)
        adamw = execution.build_optimizer(model, config.optim)
        self.optimizer = ClippedAdamW(model, adamw, config.optim.clip)
        # The execution has the precision of products, and this optimiser clips.
        self.step = TrainingStep(model, self.loss, self.optimizer)
        self.device = model_device(model)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def gradients(self, numbers: range) -> None:
        """Leave the gradient of the mean loss of these batches in the parameters.

        Raises:
            RunError: a loss is not finite.
        """
        began = time.perf_counter()
        mean = self.step.gradients([batch_of(self.config, self.data, number) for number in numbers])
        self.taken = self.step.agree(mean)
        starts, losses = zip(*self.loss.calls, strict=True)
        self.loss.calls.clear()
        self.losses += [loss.item() for loss in losses]
        synchronize(self.device)
        times = (began, *starts[1:], time.perf_counter())
        self.seconds += [end - start for start, end in itertools.pairwise(times)]
        for number, loss in zip(numbers, self.losses[-len(numbers) :], strict=True):
            if not math.isfinite(loss):
                raise _not_finite(number, first_non_finite(self.model) or "the activations")

    def update(self) -> None:
        """Update the parameters from their gradients.

        Raises:
            RunError: a gradient is not finite.
        """
        began = time.perf_counter()
        try:
            self.step.update(len(self.optimizer.norms), self.taken)
        except NotFinite as bad:
            raise _not_finite(len(self.losses) - 1, bad.where) from None
        synchronize(self.device)
        self.seconds[-1] += time.perf_counter() - began

    def take(self, numbers: range) -> None:
        """Update the parameters from these batches."""
        self.gradients(numbers)
        self.update()


def _not_finite(number: int, where: str) -> RunError:
    return RunError(
        f"the loss or gradient is not finite in batch {number + 1}; the first bad value is in {where}; "
        "a lower optim.lr or stack.level=1 may help"
    )
