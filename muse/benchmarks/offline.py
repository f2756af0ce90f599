"""What a model answers without a server, and prompts for both."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from muse.benchmarks.load import Answered
from muse.benchmarks.load_figures import OK, load_figures
from muse.data import Tokenizer
from muse.errors import RunError
from muse.generation import GREEDY, continuation
from muse.models.language_model import model_device
from muse.trained import Trained


def texts_of(tokenizer: Tokenizer, count: int, tokens: int, seed: int) -> list[str]:
    """Random texts of exactly so many tokens each.

    Raises:
        RunError: the tokenizer has none.
    """
    generator = random.Random(seed)
    readable = [index for index in range(tokenizer.vocab_size) if _is_text(tokenizer.bytes_of(index))]
    texts: list[str] = []
    for _ in range(100 * count if readable else 0):
        drawn = tokenizer.encode(tokenizer.decode(generator.choices(readable, k=2 * tokens)))
        text = tokenizer.decode(drawn[:tokens])
        if len(tokenizer.encode(text)) == tokens:
            texts.append(text)
        if len(texts) == count:
            return texts
    raise RunError(f"the tokenizer of the model makes no texts of {tokens} tokens")


def _is_text(raw: bytes) -> bool:
    try:
        return bool(raw.decode("utf-8").strip())
    except UnicodeDecodeError:
        return False


@dataclass
class Offline:
    """Greedy decoding by the model itself, one prompt at a time.

    Attributes:
        answers: ids that follow each prompt.
        figures: throughput and times, as of a load.
    """

    answers: list[list[int]]
    figures: dict[str, float | None]


def decode_offline(trained: Trained, prompts: Sequence[Sequence[int]], tokens: int) -> Offline:
    """Decode without a server."""
    model, _, config = trained
    answers, answered = [], []
    # The first one again: it has warmed up.
    for prompt in (prompts[0], *prompts):
        began, times, answer = time.perf_counter(), [], []
        for token in continuation(model, prompt, tokens, config.model.seq_len, GREEDY):
            answer.append(token)
            times.append(time.perf_counter())
        answers.append(answer)
        answered.append(Answered(began, began, times[-1], OK, tuple(times)))
    return Offline(answers[1:], load_figures([answered[1:]], streamed=True))


def gap_of(trained: Trained, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Between offline logits of the first tokens that differ, as a share of the largest; 0 where none do."""
    pairs = enumerate(itertools.zip_longest(ours, theirs))
    at = next((place for place, (one, other) in pairs if one != other), None)
    if at is None:
        return 0.0
    if at >= min(len(ours), len(theirs)):
        return float("inf")
    ids = torch.tensor([[*prompt, *ours[:at]]], device=model_device(trained.model))
    with torch.no_grad():
        logits = trained.model.next_logits(ids)[0].float()
    return ((logits[ours[at]] - logits[theirs[at]]).abs() / logits.abs().max()).item()
