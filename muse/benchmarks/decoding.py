"""Greedy decoding of the same texts, one token at a time and with guesses, in turns."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

from muse.acceleration import InferenceScalingEngine, greedy_decode
from muse.acceleration.training import StackTraining
from muse.models import LanguageModel
from muse.models.language_model import model_device

# Tokens that a text begins with.
PROMPT = 16


def measure_decoding(
    training: StackTraining, engine: InferenceScalingEngine, prompt: list[int], tokens: int
) -> dict[str, Any]:
    """Decode the same texts one token at a time and with guesses, in turns.

    Returns:
        ``decode_plain`` and ``decode_speculative`` in tokens per second (medians), ``decode_ratio`` and
        ``tokens_per_pass``; of ``decode_texts`` the ``decode_texts_equal`` whose tokens are those of
        ``greedy_decode``, and ``decode_equal``, whether all are. Passes of one and of eight tokens round
        differently, so two tokens may change places whose logits are the same but for that:
        ``decode_gap`` is the largest difference of their logits where texts part, as a fraction of the
        largest logit, None where none do; ``decode_equal_unguessed``: whether all texts are those of the same
        passes with nothing guessed, which round alike.
    """
    model = training.model.eval()
    valid = training.data.valid
    starts = range(0, min(8 * PROMPT, len(valid) - PROMPT), PROMPT)
    prompts = [prompt, *(valid[start : start + PROMPT].tolist() for start in starts[1:])]
    plain_times, times, equal, unguessed, gaps = [], [], [], [], []
    passes, decoded = engine.passes, engine.decoded
    checked = InferenceScalingEngine()
    with training.execution.eager(model):
        greedy_decode(model, prompt, tokens)
        for text in prompts:
            start = time.perf_counter()
            plain = greedy_decode(model, text, tokens)
            plain_times.append(time.perf_counter() - start)
            start = time.perf_counter()
            guessed = engine.decode(model, text, tokens)
            times.append(time.perf_counter() - start)
            unguessed.append(guessed == checked.decode(model, text, tokens, speculate=False))
            equal.append(guessed == plain)
            if guessed != plain:
                gaps.append(_gap(model, plain, guessed))
    model.train()
    return {
        "decode_plain": tokens / median(plain_times),
        "decode_speculative": tokens / median(times),
        "decode_ratio": median(p / t for p, t in zip(plain_times, times, strict=True)),
        "decode_texts": len(equal),
        "decode_texts_equal": sum(equal),
        "decode_equal": all(equal),
        "decode_gap": max(gaps, default=None),
        "decode_equal_unguessed": all(unguessed),
        "tokens_per_pass": (engine.decoded - decoded) / max(1, engine.passes - passes),
    }


@torch.no_grad()
def _gap(model: LanguageModel, plain: list[int], other: list[int]) -> float:
    """Between the logits of the first tokens that differ, as a fraction of the largest."""
    at = next(i for i, (a, b) in enumerate(zip(plain, other, strict=True)) if a != b)
    logits = model.next_logits(torch.tensor([plain[:at]], device=model_device(model)))[0]
    return ((logits[plain[at]] - logits[other[at]]).abs() / logits.abs().max()).item()
