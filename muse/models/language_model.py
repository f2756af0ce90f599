"""The language model of every stage: embedding, blocks, norm, head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kernels.products import linear
from muse.layers.koopman import noted_shares, prediction_loss
from muse.layers.packing import Packing
from muse.layers.recompute import recomputed_call
from muse.models.dialectic import Antithesis
from muse.models.loss import linear_cross_entropy, linear_losses
from muse.models.trunk import ReversibleTrunk, through

# Of a model, its features (B, S, E), tokens and targets (B, S): indices (kept,) into the flattened tokens.
Select: TypeAlias = Callable[["LanguageModel", Tensor, Tensor, Tensor], Tensor]


class LanguageModel(nn.Module):
    """embedding -> blocks -> norm -> read-out -> head.

    Args:
        embedding: maps tokens (B, S) to states.
        blocks: each maps states to states and lets no token see a later one.
        norm: final norm.
        read_out: maps normalised states to real features (B, S, E).
        head: maps features to logits; None shares the weight of the embedding.
    """

    def __init__(
        self,
        embedding: nn.Module,
        blocks: list[nn.Module],
        norm: nn.Module,
        read_out: Callable[[Tensor], Tensor],
        head: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.read_out = read_out
        self.head = head
        # Carries the state through the blocks; None for residual sums.
        self.trunk: ReversibleTrunk | None = None
        # Blocks of which the first one's input alone is kept, and which the backward pass computes again;
        # 0 for none. A trunk keeps none.
        self.recompute = 0
        # How often the state goes through all blocks. The embedding is added before each time but the first.
        self.loops = 1
        # What is said against the head's distribution; None for nothing.
        self.antithesis: Antithesis | None = None
        # Weight of the auxiliary loss of Koopman operators; 0 for none.
        self.koopman_prediction = 0.0

    def features(self, tokens: Tensor, packing: Packing | None = None) -> Tensor:
        """Real features (B, S, E) before the head; of packed documents, each as if it were alone."""
        return self.read_out(self.norm(self._through_loops(self.embedding(tokens), packing=packing)))

    def _through_loops(
        self, embedded: Tensor, caches: Sequence[Any] | None = None, packing: Packing | None = None
    ) -> Tensor:
        """The state after all blocks; each takes a cache for every loop, if there are any."""
        if self.trunk is not None:
            return self.trunk(embedded, self.blocks, caches, packing)
        state, count = embedded, len(self.blocks)
        for loop in range(self.loops):
            if loop:
                state = state + embedded
            own = None if caches is None else caches[loop * count : (loop + 1) * count]
            state = self._through_blocks(state, own, packing)
        return state

    def _through_blocks(self, state: Tensor, caches: Sequence[Any] | None, packing: Packing | None) -> Tensor:
        if not self.recompute or not torch.is_grad_enabled():
            return through(state, self.blocks, caches, packing)
        for start in range(0, len(self.blocks), self.recompute):
            own = self.blocks[start : start + self.recompute]
            state = recomputed_call(through, state, own, None, packing)
        return state

    def compile_features(self) -> None:
        """Compile everything before the head; names in the state dict stay as they are."""
        if self.trunk is not None:
            # What a reversible backward pass does cannot be traced.
            for block in self.blocks:
                for sublayer in block.sublayers():  # type: ignore[operator]
                    sublayer.map.compile()
            return
        self.features = torch.compile(self.features)  # type: ignore[method-assign]

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, E) or planar (V, 2, E / 2), and bias (V,), of the head."""
        if self.head is not None:
            return self.head.weight, self.head.bias
        weight = self.embedding.weight
        assert isinstance(weight, Tensor)
        return weight, None

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, S, V) of tokens (B, S). Training uses ``loss``, which never holds them all."""
        return self._logits(self.features(tokens))

    def next_logits(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) of the token that follows ``tokens`` (B, S)."""
        return self._logits(self.features(tokens)[:, -1])

    def new_caches(self, longest: int) -> list[Any] | None:
        """For each block and loop a cache without tokens; None where blocks take none, with mixer=none.

        Args:
            longest: tokens that a cache of stage 3a has room for; others may have any number.
        """
        blocks: list[Any] = self.loops * list(self.blocks)
        if not all(hasattr(block, "new_cache") for block in blocks):
            return None
        return [block.new_cache(longest) for block in blocks]

    @torch.no_grad()
    def continue_logits(self, tokens: Tensor, caches: list[Any]) -> Tensor:
        """Logits (B, S, V) of tokens (B, S) that follow those in ``caches``, which they are added to."""
        return self.logits_of(self._through_loops(self.embedding(tokens, caches[0].length), caches))

    def logits_of(self, state: Tensor) -> Tensor:
        """Logits (B, S, V) of states after a block, the last one or another."""
        return self._logits(self.read_out(self.norm(state)))

    def _logits(self, features: Tensor) -> Tensor:
        weight, bias = self.head_parameters()
        matrix = weight.flatten(1)
        logits = linear(features, matrix, bias)
        return logits if self.antithesis is None else self.antithesis(features, logits, matrix)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        reduction: str = "mean",
        select: Select | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Cross-entropy in nats of ``targets`` (B, S) given ``tokens`` (B, S); targets of -1 do not count.

        Args:
            tokens, targets: int64.
            reduction: ``mean`` or ``sum``.
            select: which of the tokens count; None for all.
            packing: of documents that know nothing of each other; of stages 0 to 3.

        An auxiliary loss of Koopman operators adds to the gradient, and not to the value.
        """
        auxiliary = None
        if self.koopman_prediction and torch.is_grad_enabled():
            with noted_shares(self) as noted:
                features = self.features(tokens, packing)
            auxiliary = prediction_loss(noted)
        else:
            features = self.features(tokens, packing)
        if select is not None:
            kept = select(self, features, tokens, targets)
            features, targets = (x.flatten(0, 1)[kept][None] for x in (features, targets))
        loss = self.loss_of(features, targets, reduction)
        if auxiliary is not None:
            loss = loss + self.koopman_prediction * (auxiliary - auxiliary.detach())
        return loss

    def loss_of(self, features: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats of ``targets`` (B, S) given ``features`` (B, S, E)."""
        weight, bias = self.head_parameters()
        flat, wanted = features.flatten(0, 1), targets.flatten()
        return linear_cross_entropy(flat, weight, wanted, bias, reduction, self.antithesis)

    def token_losses(
        self, features: Tensor, targets: Tensor, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Cross-entropy of each token and, if asked for, entropy of its distribution, (B, S) each."""
        weight, bias = self.head_parameters()
        losses, entropies = linear_losses(features.flatten(0, 1), weight, targets.flatten(), bias, entropy)
        shape = targets.shape
        return losses.view(shape), None if entropies is None else entropies.view(shape)


def count_parameters(model: nn.Module) -> int:
    """Number of real numbers the model trains; a complex parameter counts twice, a shared one once."""
    return sum(parameter.numel() for parameter in model.parameters())


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's parameters."""
    return next(model.parameters()).device
