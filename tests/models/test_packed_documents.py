"""Documents side by side in windows: a model computes for each what it computes for it alone."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from support.configs import VOCAB, small_sizes, stage_config
from torch import Tensor

from muse.layers.packing import packing_of
from muse.models import LanguageModel, build_model

# Of each window the documents.
SIZES = [[20, 3, 1, 6], [30], [1, 1, 14, 14]]
LENGTH = 30
CASES: dict[str, dict[str, Any]] = {
    "stage 0": {"number": "0"},
    **{f"stage 1, {score}": {"number": "1", "score": score} for score in ("real", "magnitude", "phase")},
    "stage 2": {"number": "2", "gradient": "backprop"},
    "stage 3": {"number": "3", "gradient": "backprop"},
    "stage 3, both": {"number": "3", "gradient": "backprop", "koopman": "add", "koopman_every": 1},
    "dialectic loop": {"number": "3", "gradient": "backprop", "dialectic": "mlp", "dialectic_candidates": 4},
    "loops": {"number": "3", "gradient": "backprop", "loops": 2},
    "recomputed blocks": {"number": "3", "gradient": "backprop", "recompute": "block"},
}


def build(case: str) -> LanguageModel:
    model = build_model(stage_config(**CASES[case]), small_sizes(seq_len=LENGTH), VOCAB).double()
    with torch.no_grad():
        # Off their start, at which eigenvalues of all operators are alike.
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def windows() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and targets, of which some do not count, and positions."""
    tokens, targets = torch.randint(VOCAB, (2, len(SIZES), LENGTH))
    targets[2, 16:] = -1
    positions = torch.stack([torch.cat([torch.arange(size) for size in row]) for row in SIZES])
    return tokens, targets, positions


def documents(x: Tensor) -> list[Tensor]:
    """The documents, (1, tokens) each, in the order of the windows."""
    return [part for row, sizes in zip(x, SIZES, strict=True) for part in row[None].split(sizes, 1)]


@pytest.mark.parametrize("case", CASES)
def test_a_document_has_the_logits_that_it_has_alone(case):
    model, (tokens, _, positions) = build(case).eval(), windows()
    with torch.no_grad():
        packed = model._logits(model.features(tokens, packing_of(positions)))
        alone = torch.cat([model(part) for part in documents(tokens)], 1).view_as(packed)
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_documents_alone(case):
    model, (tokens, targets, positions) = build(case), windows()
    loss = model.loss(tokens, targets, packing=packing_of(positions))
    loss.backward()
    packed = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    pairs = zip(documents(tokens), documents(targets), strict=True)
    alone = sum(model.loss(*pair, reduction="sum") for pair in pairs) / (targets >= 0).sum()
    alone.backward()
    torch.testing.assert_close(loss, alone)
    for found, known in zip(packed, model.parameters(), strict=True):
        torch.testing.assert_close(found, known.grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_another_document_changes_no_bit(case, precision):
    stage = stage_config(**CASES[case], precision=precision)
    model, (tokens, _, positions) = build_model(stage, small_sizes(seq_len=LENGTH), VOCAB), windows()
    packing = packing_of(positions)
    bounds = list(pairwise(accumulate(SIZES[0], initial=0)))
    with torch.no_grad():
        before = model.features(tokens, packing)
        for start, stop in bounds:
            other = tokens.clone()
            other[0, start:stop] = (tokens[0, start:stop] + 1) % VOCAB
            changed = (model.features(other, packing) != before).any(-1)
            assert changed[0, start:stop].all()
            assert int(changed.sum()) == stop - start


@pytest.mark.parametrize("number", ["0", "1", "2", "3"])
def test_a_reversible_trunk_keeps_documents_apart(number):
    stage = stage_config(number, trunk="reversible")
    model, (tokens, targets, positions) = build_model(stage, small_sizes(seq_len=LENGTH), VOCAB), windows()
    packing = packing_of(positions)
    # Its backward pass raises where sub-layers do not give the same a second time.
    model.loss(tokens, targets, packing=packing).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        packed = model.features(tokens, packing)
        alone = torch.cat([model.features(part) for part in documents(tokens)], 1).view_as(packed)
    torch.testing.assert_close(packed, alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("number", ["0", "1", "2", "3"])
def test_one_document_a_window_is_the_window(number):
    stage = stage_config(number)
    model, (tokens, _, _) = build_model(stage, small_sizes(seq_len=LENGTH), VOCAB).double(), windows()
    with torch.no_grad():
        packed = model.features(tokens, packing_of(torch.arange(LENGTH).expand(3, -1)))
        torch.testing.assert_close(packed, model.features(tokens), rtol=1e-6, atol=1e-7)
