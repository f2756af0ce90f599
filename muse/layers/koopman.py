"""A linear operator that moves observables of the tokens: a causal mixer whose state does not grow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.complex_scan import complex_scan
from kernels.planar import multiply, upcast
from kernels.products import linear
from muse.layers.activation import SplitGELU
from muse.layers.linear import ComplexLinear
from muse.layers.packing import Packing
from muse.layers.prediction import shares_of
from muse.processes.ranks import whole

# Griffin's factor between the gate of a decay and its exponent.
SHARPNESS = 8.0
# Half-lives at the start, in tokens.
SHORTEST, LONGEST = 1.0, 256.0
TAPS = 4


@dataclass
class KoopmanState:
    """What one operator knows of the tokens that it has seen.

    Attributes:
        observables: g, planar (B, 2, K) in float32; None before the first token.
        recent: u of the last TAPS - 1 tokens before the convolution, planar (B, TAPS - 1, 2, K).
        length: tokens seen.
    """

    observables: Tensor | None = None
    recent: Tensor | None = None
    length: int = 0


def half_lives(model: nn.Module) -> dict[str, float]:
    """Quantiles of the half-lives of every operator of a model, in tokens, where the gate r is 1/2.

    As ``koopman/blocks_0_mixer/half_life_p50``, and p10 and p90: the operator's name without its dots. Where
    parameters are sharded every rank must ask.
    """
    metrics = {}
    for name, operator in operators_of(model).items():
        lives = math.log(0.5) / operator.eigenvalues()[0].detach()
        for percent in (10, 50, 90):
            key = f"koopman/{name.replace('.', '_')}/half_life_p{percent}"
            metrics[key] = lives.quantile(percent / 100).item()
    return metrics


def operators_of(model: nn.Module) -> dict[str, KoopmanOperator]:
    """Every operator of a model by its name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, KoopmanOperator)}


@contextmanager
def noted_shares(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Around calls of a model: what ``shares_of`` finds in each call of every operator, by its name."""
    operators = operators_of(model)
    noted: dict[str, list[Tensor]] = {name: [] for name in operators}
    for name, operator in operators.items():
        operator.noted = noted[name]
    try:
        yield noted
    finally:
        for operator in operators.values():
            operator.noted = None


def prediction_loss(noted: dict[str, list[Tensor]]) -> Tensor | None:
    """The auxiliary loss of ``muse.layers.prediction``, mean over calls; None where there was none."""
    calls = [shares for own in noted.values() for shares in own]
    return (1 - torch.stack(calls)).sum(1).mean() if calls else None


@contextmanager
def watched_predictions(model: nn.Module, watched: bool) -> Iterator[dict[str, float]]:
    """Around an evaluation: how much operators predict, means over its batches, those of this rank.

    Yields:
        A dict, filled when the block ends, empty where it is not ``watched``: for each operator as in
        ``half_lives`` ``koopman/<operator>/predictable_share`` and ``distinct_share``.
    """
    metrics: dict[str, float] = {}
    if not watched:
        yield metrics
        return
    with noted_shares(model) as noted:
        yield metrics
    for name, calls in noted.items():
        if calls:
            predictable, distinct = torch.stack(calls).mean(0).tolist()
            metrics[f"koopman/{name.replace('.', '_')}/predictable_share"] = predictable
            metrics[f"koopman/{name.replace('.', '_')}/distinct_share"] = distinct


class KoopmanOperator(nn.Module):
    """Observables with a linear evolution, in place of attention.

    Of normalised states z_t it takes observables u_t = conv(W_in z)_t, a causal convolution of 4 real taps a
    channel, and lets them evolve by complex eigenvalues,

        g_t = lambda_t g_(t-1) + sqrt(1 - |lambda_t|^2) u_t
        lambda_t = exp(-8 r_t softplus(nu) + i theta)        r_t = sigmoid(W_r z_t + b_r)
        y_t = W_out(g_t GELU(c_t))                           c_t = W_c z_t, GELU on each plane

    with a complex product in the last line. Without input, n tokens multiply g by lambda^n. The operator is
    Koopman's in that it moves observables of a state linearly (Koopman 1931; Brunton et al. 2022), the
    recurrence is a gated linear one (De et al., "Griffin", 2024) with the complex eigenvalues of Orvieto et
    al. (2023). At ``observables`` = ``d_model`` it has as many parameters as ComplexAttention, and K (TAPS +
    3) more.

    Args:
        d_model: complex channels D.
        observables: complex channels K of the state.
        init: initialisation of the complex maps.
        gain: factor on the initial output map.
        angles: whether there is a theta; without it is 0, and eigenvalues are real.
        selective: whether r_t depends on the token; without it is 1/2.
    """

    def __init__(
        self,
        d_model: int,
        observables: int,
        init: str = "glorot",
        gain: float = 1.0,
        angles: bool = True,
        selective: bool = True,
    ) -> None:
        super().__init__()
        self.observables = observables
        # Two maps in one product, initialised as maps of K channels each.
        apart = math.sqrt((d_model + 2 * observables) / (d_model + observables)) if init == "glorot" else 1.0
        self.projection = ComplexLinear(d_model, 2 * observables, bias=False, init=init, gain=apart)
        self.taps = nn.Parameter(torch.zeros(observables, TAPS))
        self.rate = nn.Linear(2 * d_model, observables) if selective else None
        self.nu = nn.Parameter(torch.empty(observables))
        if angles:
            self.theta = nn.Parameter(torch.empty(observables))
        else:
            self.register_buffer("theta", torch.zeros(observables), persistent=False)
        self.activation = SplitGELU()
        self.output = ComplexLinear(observables, d_model, bias=False, init=init, gain=gain)
        # Where ``noted_shares`` wants those of each call.
        self.noted: list[Tensor] | None = None
        with torch.no_grad():
            self.taps[:, -1] = 1
            if self.rate is not None:
                nn.init.zeros_(self.rate.bias)
            half_lives = torch.logspace(math.log10(SHORTEST), math.log10(LONGEST), observables)
            # At the start r is about 1/2.
            self.nu.copy_(torch.expm1(2 * math.log(2) / (SHARPNESS * half_lives)).log())
            if angles:
                self.theta.uniform_(-math.pi, math.pi)

    def new_cache(self, longest: int) -> KoopmanState:
        """A state that has seen no token; it is as large after any number of them."""
        return KoopmanState()

    def log_decay(self, z: Tensor) -> Tensor:
        """log |lambda| of planar z (B, S, 2, D): (B, S, K), at least in float32."""
        if self.rate is None:
            return (0.5 * _fastest(self.nu)).expand(*z.shape[:2], -1)
        rate = linear(z.flatten(-2), self.rate.weight, self.rate.bias)
        return _fastest(self.nu) * torch.sigmoid(upcast(rate))

    def forward(self, z: Tensor, cache: KoopmanState | None = None, packing: Packing | None = None) -> Tensor:
        """Map planar (B, S, 2, D) to planar (B, S, 2, D).

        Args:
            z: states.
            cache: of the tokens before z, which takes in those of z. Decode without gradients.
            packing: of documents that know nothing of each other, without a cache.

        Raises:
            ValueError: a cache of packed documents.
        """
        u, gate = self.projection(z).chunk(2, dim=-1)
        log_decay, before = self.log_decay(z), None if cache is None else cache.observables
        if packing is None:
            heard = self._convolved(u, cache)
        elif cache is not None:
            raise ValueError("packed documents have no cache")
        else:
            heard, log_decay = self._begun_anew(u, log_decay, packing.positions)
        g, after = complex_scan(heard, log_decay, self.theta, before)
        if self.noted is not None and (shares := shares_of(g, u)) is not None:
            self.noted.append(shares)
        if cache is not None:
            cache.observables = after
            cache.length += z.shape[1]
        return self.output(multiply(g, self.activation(gate)))

    def eigenvalues(self, rate: float = 0.5) -> tuple[Tensor, Tensor]:
        """log |lambda| and theta, each (K,), where the gate r is ``rate`` for all channels.

        Where parameters are sharded every rank must ask.
        """
        return rate * _fastest(whole(self.nu)), upcast(whole(self.theta))

    def evolve(self, observables: Tensor, steps: int, rate: float = 0.5) -> Tensor:
        """Observables (B, 2, K) after so many tokens without input: one product with lambda^steps."""
        decay, theta = self.eigenvalues(rate)
        turn = steps * theta.double()
        power = (steps * decay).exp() * torch.stack((turn.cos(), turn.sin())).to(decay)
        return multiply(power, observables)

    def _begun_anew(self, u: Tensor, log_decay: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What a scan takes of documents, so that each is as if nothing came before it."""
        high, taps = upcast(u), upcast(self.taps)
        heard = high * taps[:, -1]
        for back in range(1, TAPS):
            earlier = F.pad(high, (0, 0, 0, 0, back, 0))[:, : u.shape[1]]
            unknown = (positions < back)[..., None, None]
            heard = heard + earlier.masked_fill(unknown, 0) * taps[:, -1 - back]
        # A scan that forgets takes the whole input, and a first token that has nothing to forget its share.
        first = (positions == 0)[..., None]
        power = -torch.expm1(2 * log_decay)
        share = power.clamp(min=torch.finfo(power.dtype).tiny).sqrt()
        heard = torch.where(first, share, 1.0).unsqueeze(-2) * heard
        return heard.to(u.dtype), log_decay.masked_fill(first, -math.inf)

    def _convolved(self, u: Tensor, cache: KoopmanState | None) -> Tensor:
        recent = None if cache is None else cache.recent
        if recent is None:
            recent = u.new_zeros(u.shape[0], TAPS - 1, *u.shape[2:])
        padded = torch.cat((recent, u), 1)
        if cache is not None:
            # A view would keep all tokens of a prefill alive.
            cache.recent = padded[:, -(TAPS - 1) :].clone()
        weight = self.taps.repeat(2, 1).unsqueeze(1).to(u.dtype)
        out = F.conv1d(padded.flatten(-2).transpose(1, 2), weight, groups=weight.shape[0])
        return out.transpose(1, 2).unflatten(-1, (2, -1))


def _fastest(nu: Tensor) -> Tensor:
    """log |lambda| where the gate r is 1."""
    return -SHARPNESS * F.softplus(upcast(nu))
