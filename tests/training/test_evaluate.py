from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from support.configs import SEQ_LEN, VOCAB, small_sizes, stage_config, token_data
from support.runs import read_json, same

from muse.data import Counts
from muse.files import write_json
from muse.models import LanguageModel, build_model
from muse.training.evaluate import evaluate, perplexity


def model(number: int = 1, precision: str = "fp32", dropout: float = 0.0) -> LanguageModel:
    sizes = small_sizes(layers=1)
    return build_model(stage_config(number, precision, dropout=dropout), sizes, VOCAB)


def losses_by_hand(net: LanguageModel, tokens: np.ndarray, stride: int) -> dict[int, float]:
    """-log p in float64 of every token but the first, by its place, one window at a time."""
    net = net.double().eval()
    values = torch.from_numpy(tokens.astype(np.int64))
    losses: dict[int, float] = {}
    for start in range(0, len(values) - 1, stride):
        window = values[start : start + SEQ_LEN + 1]
        with torch.no_grad():
            log_probability = net(window[None, :-1])[0].log_softmax(-1)
        for place, target in enumerate(window[1:].tolist()):
            # A token is predicted by the first window that reaches it.
            losses.setdefault(start + place + 1, -float(log_probability[place, target]))
    return losses


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("stride", [None, 1, 3, SEQ_LEN])
@pytest.mark.parametrize("size", [2, SEQ_LEN, SEQ_LEN + 1, SEQ_LEN + 2, 45])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_loss_is_the_mean_over_every_token_once(number, stride, size, batch_size):
    tokens = token_data(valid_tokens=size).valid
    result = evaluate(model(number), tokens, None, SEQ_LEN, batch_size, stride)
    expected = losses_by_hand(model(number), tokens, stride or SEQ_LEN)
    assert sorted(expected) == list(range(1, size))
    assert result.tokens == size - 1
    assert result.loss == pytest.approx(sum(expected.values()) / (size - 1), rel=1e-5)
    assert result.ppl == math.exp(result.loss)


@pytest.mark.parametrize("limit", [1, 5, SEQ_LEN, 20, 1000])
def test_a_limit_evaluates_windows_of_the_whole_split(limit):
    data = token_data()
    result = evaluate(model(), data.valid, data.counts["valid"], SEQ_LEN, 4, limit=limit)
    losses = losses_by_hand(model(), data.valid, SEQ_LEN)
    every = -(-(len(data.valid) - 1) // SEQ_LEN)
    count = min(every, -(-limit // SEQ_LEN))
    starts = [(2 * part + 1) * every // (2 * count) * SEQ_LEN for part in range(count)]
    expected = [
        losses[at] for start in starts for at in range(start + 1, start + SEQ_LEN + 1) if at in losses
    ]
    assert result.tokens == len(expected)
    assert result.loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    # Words and bytes are counted for the whole split only.
    assert (result.word_ppl is None) == (result.bits_per_byte is None) == (count < every)
    assert result.word_ppl_reason == ("only a part of the split was evaluated" if count < every else None)


def test_a_part_of_a_split_that_changes_on_the_way_stands_for_all_of_it():
    """One half is what the model knows, the other is not; the first tokens are of one half alone."""
    half = 40 * SEQ_LEN
    generator = np.random.default_rng(0)
    tokens = np.concatenate((np.full(half, 3), generator.integers(VOCAB, size=half + 1))).astype(np.uint16)
    net = model()
    with torch.no_grad():
        # The head is the embedding: after a 3 it says 3.
        net.embedding.weight[3] *= 100
    whole, part = (evaluate(net, tokens, None, SEQ_LEN, 4, limit=limit).loss for limit in (0, 16 * SEQ_LEN))
    first = evaluate(net, tokens[: 16 * SEQ_LEN + 1], None, SEQ_LEN, 4).loss
    assert part == pytest.approx(whole, rel=0.2)
    assert abs(first - whole) > 3 * abs(part - whole)


def test_every_unit_tells_the_same_total():
    data = token_data()
    counts = data.counts["valid"]
    result = evaluate(model(), data.valid, counts, SEQ_LEN, 4)
    total = result.loss * result.tokens
    assert math.log(result.ppl) * result.tokens == pytest.approx(total, rel=1e-12)
    assert math.log(result.word_ppl) * counts.words == pytest.approx(total, rel=1e-12)
    assert result.bits_per_byte * counts.bytes * math.log(2) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize(
    "counts", [None, Counts(61, None, None), Counts(61, 0, 0)], ids=["none", "not counted", "empty"]
)
def test_without_words_there_is_only_a_perplexity_per_token(counts):
    result = evaluate(model(), token_data().valid, counts, SEQ_LEN, 4)
    assert result.word_ppl is None
    assert result.word_ppl_reason == "the words were not counted"
    assert result.bits_per_byte is None
    assert math.isfinite(result.ppl)


@pytest.mark.parametrize("size", [40, 41])
def test_words_of_more_than_40_bytes_are_none(size):
    result = evaluate(model(), token_data().valid, Counts(61, 5, 5 * size), SEQ_LEN, 4)
    assert result.bits_per_byte is not None
    if size == 40:
        assert result.word_ppl is not None
        assert result.word_ppl_reason is None
    else:
        assert result.word_ppl is None
        assert result.word_ppl_reason == "words of 41 bytes on average are none"


def test_a_perplexity_too_large_for_a_float_is_infinite_and_null_in_json(tmp_path):
    assert perplexity(0.0) == 1.0
    assert perplexity(2.0) == math.exp(2.0)
    assert perplexity(math.inf) == math.inf
    assert perplexity(1e6) == math.inf
    data = token_data()
    # One word for all of it: the perplexity per word overflows, that per token does not.
    net = model()
    with torch.no_grad():
        net.embedding.weight *= 100
    result = evaluate(net, data.valid, Counts(61, 1, 1), SEQ_LEN, 4)
    assert result.word_ppl is None
    assert result.word_ppl_reason == "it is too large for a float"
    write_json(tmp_path / "result.json", dataclasses.asdict(result))
    written = read_json(tmp_path / "result.json")
    assert written["word_ppl"] is None
    assert written["loss"] == result.loss
    assert "Infinity" not in (tmp_path / "result.json").read_text()


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_leaves_no_trace(training):
    net = model(dropout=0.5).train(training)
    before = same(net.state_dict(), model(dropout=0.5).state_dict())
    state = torch.get_rng_state()
    first = evaluate(net, token_data().valid, None, SEQ_LEN, 4)
    assert net.training is training
    assert torch.equal(torch.get_rng_state(), state)
    assert before
    assert same(net.state_dict(), model(dropout=0.5).state_dict())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert first == evaluate(net, token_data().valid, None, SEQ_LEN, 4)
    # Dropout is off.
    assert first.loss == evaluate(model(), token_data().valid, None, SEQ_LEN, 4).loss


def test_training_mode_comes_back_after_an_error():
    net = model().train()
    with pytest.raises(IndexError):
        evaluate(net, np.full(20, VOCAB + 5, np.uint16), None, SEQ_LEN, 4)
    assert net.training


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast_evaluates_in_half_precision(precision):
    tokens = token_data().valid
    full = evaluate(model(), tokens, None, SEQ_LEN, 4).loss
    half = evaluate(model(), tokens, None, SEQ_LEN, 4, precision=precision).loss
    assert half != full
    assert half == pytest.approx(full, rel=0.02)
