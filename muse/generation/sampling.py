"""The next token, drawn from a model's logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muse.errors import ConfigError, RunError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. What is allowed is the intersection of ``top_k``, ``top_p`` and ``min_p``.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only the so many likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together have this probability (nucleus sampling, Holtzman et
            al. 2020); 1 for all.
        min_p: only tokens with at least this share of the likeliest one's probability (Nguyen et al. 2024).
        repetition_penalty: divides positive logits of tokens that were there, and multiplies negative ones
            (Keskar et al. 2019); 1 for none.
    """

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed, bounds in (
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
        ):
            if not allowed:
                raise ConfigError(f"{name}={getattr(self, name):g} is not allowed; it must be {bounds}")


GREEDY = Sampling(temperature=0.0)


def next_token(logits: Tensor, sampling: Sampling, seen: Sequence[int], generator: torch.Generator) -> int:
    """Draw a token.

    Args:
        logits: float32 (V,).
        sampling: how.
        seen: tokens that were there, for the penalty.
        generator: of the draw.

    Raises:
        RunError: a logit is not finite.
    """
    if not logits.isfinite().all():
        raise RunError("the model's logits are not finite, so there is no next token")
    if sampling.repetition_penalty != 1 and seen:
        there = torch.tensor(sorted(set(seen)))
        of_seen = logits[there]
        penalty = sampling.repetition_penalty
        logits = logits.index_copy(0, there, torch.where(of_seen > 0, of_seen / penalty, of_seen * penalty))
    if sampling.temperature == 0:
        return int(logits.argmax())
    # Likeliest first.
    best = logits.topk(min(sampling.top_k or logits.numel(), logits.numel()))
    # Less the largest one, for a temperature near 0.
    probabilities = ((best.values - best.values[0]) / sampling.temperature).softmax(0)
    allowed = probabilities >= sampling.min_p * probabilities[0]
    # Those before which the others have less than top_p; the first one always.
    allowed &= probabilities.cumsum(0) - probabilities < sampling.top_p
    choice = torch.multinomial(probabilities * allowed, 1, generator=generator)
    return int(best.indices[choice])
