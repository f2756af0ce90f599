"""The dialectic loop of stage 3: the head's distribution, what speaks against it, and what comes of both.

Thesis is the head's distribution p. Antithesis is an energy E(x, v) of the state x and a token v, for the k
likeliest tokens C, its candidates. Synthesis is

    p'(v) = p(v) exp(-E(x, v)) / Z for v in C,  p(v) / Z for all others,
    Z = 1 + sum_C p(v) (exp(-E(x, v)) - 1):

a likelihood as exact as the head's, since its logits are those of the head minus E. Energies are 0 at the
start, and the synthesis is then the thesis. What is learned beyond a head is an energy-based correction as in
Deng et al., "Residual Energy-Based Models for Text Generation" (2020), there of whole texts and with a Z that
has to be estimated, here token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.planar import upcast
from kernels.products import linear
from kernels.symplectic.plain import phi_of
from muse.processes.ranks import all_reduced_sum, whole

# Hidden units of the antithesis.
UNITS = 64
# Without it the first gradients are so large that clipping takes those of all else for it.
SCALE = UNITS**-0.5
# Numbers of candidates' weights that are held at a time.
BLOCK_ELEMENTS = 2**22
# Of the square of a token's weights, which may be small.
TINY = 1e-12


class Antithesis(nn.Module):
    """E(x, v) = r . f(a) / sqrt(u), a = A x + B e_v + C m + b of u units.

    e_v is a token's weights in the head, at a root mean square of 1. m is the mean of B e_v over the
    candidates by their probabilities in the thesis, in a second round by those in the synthesis of the first,
    and so on, with the same weights: the energies of the last round count. f is GELU (``mlp``); with
    ``hamiltonian`` a = (q, p) is the candidate's own state and E its energy, a potential r . phi(q), whose
    force is an MLP as in stage 2, and r . p^2 / 2, r the inverse masses. r is 0 at the start.

    Args:
        kind: ``mlp`` or ``hamiltonian``.
        features: E, of the head.
        candidates: k; all tokens where there are no more.
        rounds: how often the energies are worked out.
    """

    def __init__(self, kind: str, features: int, candidates: int, rounds: int = 1) -> None:
        super().__init__()
        self.kind, self.candidates, self.rounds = kind, candidates, rounds
        # What ``watched_contradiction`` sums of the losses: those times divergences, and their own.
        self.sums: Tensor | None = None
        self.state_weight = nn.Parameter(torch.empty(UNITS, features).normal_(std=features**-0.5))
        self.token_weight = nn.Parameter(torch.empty(UNITS, features).normal_(std=features**-0.5))
        self.mean_weight = nn.Parameter(torch.empty(UNITS, UNITS).normal_(std=UNITS**-0.5))
        self.bias = nn.Parameter(torch.zeros(UNITS))
        self.readout = nn.Parameter(torch.zeros(UNITS))

    def weights(self) -> tuple[Tensor, ...]:
        """The parameters, in the order in which ``energies`` takes them."""
        return tuple(self.parameters())

    def unreached(self) -> tuple[Tensor, ...]:
        """The parameters that no gradient reaches as long as the read-out is 0; none after that."""
        return () if self.readout.any() else tuple(w for w in self.weights() if w is not self.readout)

    def energies(self, x: Tensor, thesis: Tensor, rows: Tensor, *weights: Tensor) -> Tensor:
        """Energies (N, k), at least float32.

        Args:
            x: features (N, E).
            thesis: the candidates' logits (N, k).
            rows: their weights in the head (N, k, E).
            weights: as ``weights`` has them, in the dtype of x.
        """
        state, token, mean, bias, readout = weights
        long = upcast(rows)
        unit = long * torch.rsqrt(long.square().mean(-1, keepdim=True) + TINY)
        seen = upcast(linear(unit.to(x.dtype), token))
        thesis, bias, readout = upcast(thesis), upcast(bias), upcast(readout)
        own = upcast(linear(x, state)) + bias
        energies = torch.zeros_like(thesis)
        for _ in range(self.rounds):
            share = torch.softmax(thesis - energies, -1)
            expected = (share[..., None] * seen).sum(-2)
            total = own + upcast(linear(expected.to(x.dtype), mean))
            energies = (self._value(seen + total[:, None]) * readout).sum(-1) * SCALE
        return energies

    def _value(self, a: Tensor) -> Tensor:
        if self.kind == "mlp":
            return F.gelu(a)
        q, p = a.chunk(2, -1)
        return torch.cat((phi_of(q, "gelu_integral"), p.square() / 2), -1)

    def likeliest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, k) and tokens (N, k) of the candidates, of all logits (N, V)."""
        thesis, candidates = logits.topk(min(self.candidates, logits.shape[-1]), -1)
        return thesis, candidates

    def forward(self, features: Tensor, logits: Tensor, matrix: Tensor) -> Tensor:
        """Logits of the synthesis (..., V), at least float32.

        Args:
            features: (..., E).
            logits: of the thesis, (..., V).
            matrix: of the head, (V, E).
        """
        flat = logits.flatten(0, -2)
        thesis, candidates = self.likeliest(flat)
        weights = (weight.to(features.dtype) for weight in self.weights())
        rows = F.embedding(candidates, matrix)
        energies = self.energies(features.flatten(0, -2), thesis, rows, *weights)
        synthesis = upcast(thesis) - energies
        return upcast(flat).scatter(-1, candidates, synthesis).view(logits.shape)


@dataclass(frozen=True)
class Argument:
    """A thesis in the loss, chunk by chunk.

    Attributes:
        antithesis: what is said against it.
        matrix: the head's, (V, E).
        weights: of the antithesis, in the dtype of the features.
        gradients: of ``weights``, at least float32, which ``losses_`` adds to; None without gradients.
        matrix_gradient: (V, E), likewise; None where the matrix needs none.
    """

    antithesis: Antithesis
    matrix: Tensor
    weights: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...] | None = None
    matrix_gradient: Tensor | None = None

    def losses_(
        self,
        x: Tensor,
        logits: Tensor,
        targets: Tensor,
        counted: Tensor,
        softmax_gradient_: Callable[[Tensor, Tensor, bool], Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Losses (N,) of the synthesis, and what its energies add to the gradient of x.

        Args:
            x: features (N, E).
            logits: of the thesis, (N, V); replaced by the gradient of those of the synthesis.
            targets: (N,), none of them negative.
            counted: (N,), whether a target counts.
            softmax_gradient_: does the same for the thesis; its last argument says whether there are
                gradients.
        """
        losses = torch.empty(x.shape[0], dtype=upcast(logits[:1]).dtype, device=x.device)
        own = torch.empty_like(x) if self.gradients is not None else None
        step = max(1, BLOCK_ELEMENTS // (self.antithesis.candidates * x.shape[1]))
        for start in range(0, x.shape[0], step):
            rows = slice(start, start + step)
            part = (x[rows], logits[rows], targets[rows], counted[rows])
            losses[rows], slope = self._block_losses_(*part, softmax_gradient_)
            if own is not None and slope is not None:
                own[rows] = slope
        return losses, own

    def _block_losses_(
        self,
        x: Tensor,
        logits: Tensor,
        targets: Tensor,
        counted: Tensor,
        softmax_gradient_: Callable[[Tensor, Tensor, bool], Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        differentiated = self.gradients is not None
        thesis, candidates = self.antithesis.likeliest(logits)
        leaves = [x, thesis, F.embedding(candidates, self.matrix), *self.weights]
        leaves = [leaf.detach().requires_grad_(differentiated) for leaf in leaves]
        with torch.set_grad_enabled(differentiated):
            energies = self.antithesis.energies(*leaves)
        energy = energies.detach()
        chosen = upcast(logits.gather(1, targets[:, None]))
        losses = softmax_gradient_(logits, targets, differentiated)[:, None]
        log_sum = losses + chosen
        log_share = upcast(thesis) - log_sum
        growth = log_growth(log_share, energy)
        is_target = candidates == targets[:, None]
        against = (energy * is_target).sum(-1, keepdim=True)
        losses = losses + against + growth
        if self.antithesis.sums is not None:
            divergence = (log_share.exp() * energy).sum(-1, keepdim=True) + growth
            weight = losses.double() * counted[:, None]
            self.antithesis.sums.add_(torch.stack(((weight * divergence).sum(), weight.sum())))
        if self.gradients is None:
            return losses[:, 0], None
        synthesis = (log_share - energy - growth).exp()
        every = torch.arange(len(x), device=x.device)[:, None]
        logits *= (-growth).exp()
        logits[every, candidates] = synthesis.to(logits.dtype)
        logits[every, targets[:, None]] = (torch.expm1(-losses)).to(logits.dtype)
        slopes = (is_target.to(energy.dtype) - synthesis) * counted[:, None]
        of_x, of_thesis, of_rows, *of_weights = torch.autograd.grad(energies, leaves, slopes)
        # Candidates of a token differ.
        logits[every, candidates] += of_thesis
        if self.matrix_gradient is not None:
            size = len(self.matrix)
            self.matrix_gradient.add_(
                torch.ops.aten.embedding_dense_backward(of_rows, candidates, size, -1, False)
            )
        for total, gradient in zip(self.gradients, of_weights, strict=True):
            total.add_(gradient)
        return losses[:, 0], of_x


def log_growth(log_share: Tensor, energies: Tensor) -> Tensor:
    """log Z (N, 1) of candidates' log p and energies, both (N, k); 0 to the last bit where energies are 0."""
    change = (log_share.exp() * torch.expm1(-energies)).sum(-1, keepdim=True)
    # Far from 1 as a sum of what is no candidate and what is: neither overflows.
    others = torch.log1p(-log_share.exp().sum(-1, keepdim=True).clamp(max=1))
    far = torch.logaddexp(others, torch.logsumexp(log_share - energies, -1, keepdim=True))
    return torch.where(change.abs() < 0.5, torch.log1p(change.clamp(-0.5, 0.5)), far)


@contextmanager
def watched_contradiction(antithesis: Antithesis | None) -> Iterator[dict[str, float]]:
    """Around an evaluation: how far the synthesis is from the thesis. All ranks must take part.

    Yields:
        A dict, filled when the block ends, empty without an antithesis: ``dialectic/contradiction``, the mean
        of KL(thesis || synthesis) in nats over the tokens, each weighted by its loss, and
        ``dialectic/grad_norm``, the norm of the antithesis' gradients that the last step has left, where
        there are any.
    """
    metrics: dict[str, float] = {}
    if antithesis is None:
        yield metrics
        return
    antithesis.sums = torch.zeros(2, dtype=torch.float64, device=antithesis.bias.device)
    try:
        yield metrics
        weighted, weight = all_reduced_sum(antithesis.sums).tolist()
    finally:
        antithesis.sums = None
    metrics["dialectic/contradiction"] = weighted / weight if weight else math.nan
    norm = gradient_norm(antithesis)
    if norm is not None:
        metrics["dialectic/grad_norm"] = norm


def gradient_norm(antithesis: Antithesis) -> float | None:
    """Norm of the gradients of all weights; None where there are none. All ranks must ask."""
    gradients = [whole(weight.grad) for weight in antithesis.parameters() if weight.grad is not None]
    if not gradients:
        return None
    return math.sqrt(math.fsum(gradient.float().square().sum().item() for gradient in gradients))
