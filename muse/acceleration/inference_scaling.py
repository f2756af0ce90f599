"""Greedy decoding that guesses several tokens from the text so far and checks them in one pass.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023), with n-grams of the text
itself as the draft ("prompt lookup").
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from muse.errors import ConfigError
from muse.models import LanguageModel
from muse.models.language_model import model_device
from muse.models.transformer import Past

# Tokens in a pass. Every pass has the same shape, so that a token's logits are the same bits whether it was
# guessed or not.
PASS = 8
# Lengths of the n-grams whose last continuation is guessed.
ORDERS = (1, 2, 3)


@torch.no_grad()
def greedy_decode(model: LanguageModel, prompt: list[int], tokens: int) -> list[int]:
    """The likeliest continuation of ``prompt`` by ``tokens`` tokens, one a pass, with kept keys and values.

    Args:
        model: of stage 3a, in evaluation mode.
        prompt: token ids, at least one.

    Returns:
        Prompt and continuation.
    """
    ids = list(prompt)
    if not tokens:
        return ids
    device = model_device(model)
    pasts = model.new_caches(len(prompt) + tokens)
    assert pasts is not None
    logits = model.continue_logits(torch.tensor([ids], device=device), pasts)[0, -1]
    for _ in range(tokens - 1):
        ids.append(int(logits.argmax()))
        logits = model.continue_logits(torch.tensor([ids[-1:]], device=device), pasts)[0, -1]
    return [*ids, int(logits.argmax())]


@dataclass
class Acceptance:
    """How guesses of one order have fared.

    Attributes:
        passes: passes in which they were checked.
        accepted: tokens accepted in them.
    """

    passes: int = 0
    accepted: int = 0

    @property
    def mean(self) -> float:
        """Tokens accepted in a pass."""
        return self.accepted / self.passes if self.passes else 0.0


@dataclass
class InferenceScalingEngine:
    """Decodes greedily with up to ``PASS`` tokens a pass; the tokens are those of one at a time.

    What followed the n-gram of one to three tokens that the text ends with is guessed to follow again. The
    model checks the guesses in one pass, the first wrong one is replaced by the model's own token, what
    follows it is thrown away. In the first ``warmup`` passes the orders take turns; afterwards the one with
    the most accepted tokens a pass comes first.

    Attributes:
        warmup: passes in which all orders are tried.
        statistics: by order.
        passes: passes made, over all texts.
        decoded: tokens decoded, over all texts.
    """

    warmup: int = 100
    statistics: dict[int, Acceptance] = field(default_factory=lambda: {n: Acceptance() for n in ORDERS})
    passes: int = 0
    decoded: int = 0

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ConfigError(f"stack.speculation_warmup={self.warmup} is too small; it must be at least 0")

    @torch.no_grad()
    def decode(
        self, model: LanguageModel, prompt: list[int], tokens: int, speculate: bool = True
    ) -> list[int]:
        """As ``greedy_decode``; without ``speculate`` in the same passes, but with nothing guessed."""
        ids, wanted = list(prompt), len(prompt) + tokens
        device = model_device(model)
        pasts = model.new_caches(wanted + PASS)
        assert pasts is not None
        for start in range(0, len(ids) - 1, PASS):
            chunk = ids[start : min(start + PASS, len(ids) - 1)]
            _logits_of(model, chunk, pasts, device)
            _forget(pasts, start + len(chunk))
        while len(ids) < wanted:
            order, guess = self._guess(ids) if speculate else (0, [])
            best = _logits_of(model, [ids[-1], *guess], pasts, device).argmax(-1).tolist()
            right = 0
            while right < len(guess) and guess[right] == best[right]:
                right += 1
            ids += best[: right + 1]
            _forget(pasts, len(ids) - 1)
            self.passes += 1
            self.decoded += right + 1
            if order:
                self.statistics[order].passes += 1
                self.statistics[order].accepted += right
        # The last pass may go beyond what was asked for.
        self.decoded -= len(ids) - wanted
        return ids[:wanted]

    def _guess(self, ids: list[int]) -> tuple[int, list[int]]:
        """The order used and up to PASS - 1 tokens; (0, []) where no n-gram was seen before."""
        if self.passes < self.warmup:
            turn = self.passes % len(ORDERS)
            orders = ORDERS[turn:] + ORDERS[:turn]
        else:
            orders = tuple(sorted(ORDERS, key=lambda n: -self.statistics[n].mean))
        for order in orders:
            guess = _continuation(ids, order)
            if guess:
                return order, guess
        return 0, []


def _continuation(ids: list[int], order: int) -> list[int]:
    """PASS - 1 tokens after the last earlier occurrence of the last ``order`` tokens; [] without one."""
    last = ids[-order:]
    for start in range(len(ids) - order - 1, -1, -1):
        if ids[start : start + order] == last:
            text = list(ids)
            # What follows may run into the guess itself: a loop goes on.
            for position in range(start + order, start + order + PASS - 1):
                text.append(text[position])
            return text[len(ids) :]
    return []


def _logits_of(model: LanguageModel, tokens: list[int], pasts: list[Past], device: torch.device) -> Tensor:
    """Logits (n, V) of n <= PASS tokens, from a pass of PASS; the rest is padding."""
    padded = tokens + [0] * (PASS - len(tokens))
    return model.continue_logits(torch.tensor([padded], device=device), pasts)[0, : len(tokens)]


def _forget(pasts: list[Past], length: int) -> None:
    """Keep the first ``length`` tokens; later ones are written over."""
    for past in pasts:
        past.length = length
