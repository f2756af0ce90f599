"""Entropic selection: the tokens of a micro-batch that a step learns from.

A score says how much a token surprises; the step's loss is the mean cross-entropy of the share of tokens with
the highest scores, and no other has a gradient of its own:

- ``high``: the loss -log p(v) of the target. Selective backpropagation (Jiang et al., "Accelerating Deep
  Learning by Focusing on the Biggest Losers", 2019), with a fixed share in place of a probability.
- ``reducible``: that loss minus a trained reference model's (Mindermann et al., "Prioritized Training on
  Points that are Learnable, Worth Learning, and Not Yet Learnt", 2022; of tokens: Lin et al., "Rho-1", 2024).
- ``entropy``: the entropy of the model's own distribution, which knows no target.
- ``random``: uniform numbers, the control that any other score must beat.

The blocks compute every token, since later ones look at it. The head computes every token's loss without
gradients, then once more, and with gradients, that of the kept ones: 1 + 3 s forward passes of the head at a
share of s, where all tokens take 3. ``reducible`` takes a forward pass of the reference, too.

Each rank selects among its own windows of each micro-batch. So the kept tokens, unlike a step on all of them,
depend on how many ranks and micro-batches share its windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from muse.config import OptimConfig, RunConfig
from muse.data import Tokenizer
from muse.errors import ConfigError
from muse.hardware import autocast_dtype
from muse.models import LanguageModel
from muse.processes.ranks import rank
from muse.runs.checkpoints import find_weights, stored_vocabulary
from muse.trained import load, tokenizer_for, trained_options
from muse.training.parallel import ParallelLoss


@dataclass(frozen=True)
class Reference:
    """A trained model whose losses say what can be learned.

    Attributes:
        model: in evaluation mode, without gradients.
        cast: dtype of its autocast, as it was trained; None for that of its parameters.
    """

    model: LanguageModel
    cast: torch.dtype | None

    @torch.no_grad()
    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy (B, S) in nats of ``targets`` (B, S) given ``tokens`` (B, S)."""
        device = tokens.device.type
        with torch.autocast(device, self.cast, enabled=self.cast is not None):
            return self.model.token_losses(self.model.features(tokens), targets)[0]


class Selected(NamedTuple):
    """The loss of a micro-batch; scalars on the device.

    Attributes:
        loss: mean over the kept tokens, which has a gradient.
        of_all: mean over all tokens, as it is without selection.
        share: of the tokens, kept.
        windows: share of the windows that keep a token.
    """

    loss: Tensor
    of_all: Tensor
    share: Tensor
    windows: Tensor


class Selection:
    """The selection of a run; what it keeps is a function of the weights, the step and the micro-batch.

    Args:
        options: of the optimiser.
        seed: of the random score.
        loss_of: the mean loss of a micro-batch.
        reference: of the reducible loss.
    """

    def __init__(
        self, options: OptimConfig, seed: int, loss_of: ParallelLoss, reference: Reference | None = None
    ) -> None:
        self.options, self.seed, self.loss_of, self.reference = options, seed, loss_of, reference

    def loss(self, tokens: Tensor, targets: Tensor, step: int, piece: int) -> Selected:
        """Select among the tokens of a micro-batch.

        Args:
            tokens: int64 (B, S).
            targets: likewise; those below 0 do not count.
            step: from 0.
            piece: the micro-batch in it, from 0.
        """
        if step < self.options.selection_warmup or self.options.selection_share == 1:
            loss = self.loss_of(tokens, targets)
            one = torch.ones_like(loss.detach())
            return Selected(loss, loss.detach(), one, one)
        choice = Choice(self, step * self.options.accumulation + piece)
        loss = self.loss_of(tokens, targets, choice)
        return Selected(loss, choice.of_all, choice.share, choice.windows)


class Choice:
    """The kept tokens of a micro-batch; notes what else ``Selected`` tells, once it has been called.

    Args:
        selection: of the run.
        number: of the micro-batch.
    """

    of_all: Tensor
    share: Tensor
    windows: Tensor

    def __init__(self, selection: Selection, number: int) -> None:
        self.selection, self.number = selection, number

    @torch.no_grad()
    def __call__(self, model: LanguageModel, features: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        """Indices of them in the flattened micro-batch, ascending (kept,)."""
        options = self.selection.options
        losses, entropies = model.token_losses(features, targets, entropy=options.selection == "entropy")
        scores = losses
        if options.selection == "reducible":
            assert self.selection.reference is not None
            scores = losses - self.selection.reference.losses(tokens, targets)
        elif options.selection == "random":
            # No other draw, as of dropout, depends on these, and every rank has its own.
            seed = self.selection.seed * 1_000_003 + self.number * 1_000_000_007 + rank() * 7_919
            scores = torch.rand(targets.shape, generator=torch.Generator().manual_seed(seed)).to(losses)
        elif entropies is not None:
            scores = entropies
        counted = targets >= 0
        kept = highest(
            scores.masked_fill(~counted, -torch.inf), options.selection_share, options.selection_guard
        )
        self.of_all = losses.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)
        self.share = losses.new_tensor(len(kept) / targets.numel())
        touched = losses.new_zeros(len(targets))
        touched[kept // targets.shape[1]] = 1
        self.windows = touched.mean()
        return kept


def highest(scores: Tensor, share: float, guard: float) -> Tensor:
    """Indices of the tokens with the highest scores, ascending, int64 (round(share B S),).

    Of equal scores the earlier token's wins, so the result is the same everywhere.

    Args:
        scores: (B, S).
        share: of all tokens.
        guard: part of its even share, and at least one token, that every window keeps, if the
            share has as many; 0 for none.
    """
    windows, length = scores.shape
    order = scores.sort(dim=1, descending=True, stable=True).indices
    kept = max(1, round(share * windows * length))
    first = torch.zeros_like(scores, dtype=torch.uint8)
    if guard:
        first.scatter_(1, order[:, : max(1, int(guard * share * length))], 1)
    # Stable sorts, the minor key first.
    by_score = scores.flatten().sort(descending=True, stable=True).indices
    by_guard = first.flatten()[by_score].sort(descending=True, stable=True).indices
    return by_score[by_guard[:kept]].sort().values


def selection_of(config: RunConfig, loss: ParallelLoss, device: torch.device) -> Selection | None:
    """The selection of a run, with its reference on the device of the model; None for ``selection=none``.

    Raises:
        ConfigError: the reference is no trained model.
    """
    if config.optim.selection == "none":
        return None
    reference = None
    if config.train.reference is not None:
        found = load(config.train.reference, device=device)
        found.model.requires_grad_(False)
        reference = Reference(found.model, autocast_dtype(found.config.stage.precision))
    return Selection(config.optim, config.seed, loss, reference)


def check_reference(config: RunConfig, tokenizer: Tokenizer | None) -> None:
    """See that the reference reads the tokens of the run, in windows as long as the run's.

    Raises:
        ConfigError: it does not, or is no trained model.
    """
    if config.train.reference is None:
        return
    place = Path(config.train.reference)
    options = trained_options(place)
    weights = find_weights(place)
    size = stored_vocabulary(weights) if weights is not None else None
    if size is None:
        raise ConfigError(f"train.reference={place} has no checkpoint yet; give a run that has one")
    own = tokenizer_for(place, options, size)
    if own is None or tokenizer is None or own.to_json() != tokenizer.to_json():
        raise ConfigError(
            f"train.reference={place} has another tokenizer than this run, so that their losses are of other "
            "tokens; give a run of the same text and tokenizer, or begin with train.init"
        )
    if options.model.seq_len < config.model.seq_len:
        raise ConfigError(
            f"train.reference={place} was trained on windows of {options.model.seq_len} tokens, fewer than "
            f"model.seq_len={config.model.seq_len}"
        )
