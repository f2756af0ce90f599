from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support.acceleration import VOCAB, build

from muse.acceleration import InferenceScalingEngine, greedy_decode
from muse.acceleration.inference_scaling import ORDERS, PASS, Acceptance
from muse.errors import ConfigError

SIZES = {
    "small": {},
    "odd": {"d_model": 36, "heads": 3, "d_ff": 50},
    "one layer": {"d_model": 64, "layers": 1, "heads": 2},
    "bf16": {"precision": "bf16"},
}
PROMPTS = (1, 7, 8, 9, 17)


def prompt(length, vocab=VOCAB):
    return torch.randint(vocab, (length,)).tolist()


def follower(following):
    """A model whose token after ``t`` is ``following[t]``, whatever came before."""
    model = build(d_model=64, layers=2)
    table = F.normalize(torch.randn(VOCAB, 64), dim=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.norm.weight.fill_(1)
        model.embedding.weight.copy_(10 * table)
        # The likeliest token is the one whose row is what the last token is embedded as.
        for token, then in following.items():
            model.head.weight[then] += table[token]
    return model


def cycle(length):
    """What follows each token in a walk through the first ``length``, over and over; others repeat."""
    return {t: (t + 1) % length if t < length else t for t in range(VOCAB)}


def walk(start, following, length):
    ids = [start]
    while len(ids) < length:
        ids.append(following[ids[-1]])
    return ids


def learned(text):
    """A small model trained to continue ``text``, repeated, until it does."""
    model, long = build(), torch.tensor(text * 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(1000):
        # What comes before a whole text does not tell what follows.
        if torch.equal(model(long[None, :48])[0, len(text) - 1 :].argmax(-1), long[len(text) : 49]):
            return model.eval()
        windows = torch.stack([long[i : i + 49] for i in torch.randint(len(text), (8,)).tolist()])
        optimizer.zero_grad()
        model.loss(windows[:, :-1], windows[:, 1:]).backward()
        optimizer.step()
    raise AssertionError("the model did not learn the text")


def by_full_passes(model, ids, tokens):
    ids = list(ids)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids


# ---- The tokens


@pytest.mark.parametrize(("length", "tokens"), [(1, 30), (7, 1), (8, 30), (9, 5), (17, 30)])
def test_greedy_decoding_is_that_of_full_passes(length, tokens):
    model, ids = build().double().eval(), prompt(length)
    expected = by_full_passes(model, ids, tokens)
    assert greedy_decode(model, ids, tokens) == expected
    for speculate in (False, True):
        assert InferenceScalingEngine().decode(model, ids, tokens, speculate) == expected


@pytest.mark.parametrize(
    ("size", "length", "tokens"),
    [
        *(("small", length, 40) for length in PROMPTS),
        ("small", 9, 1),
        ("odd", 8, 5),
        ("odd", 9, 40),
        ("one layer", 7, 40),
        ("one layer", 1, 5),
        ("bf16", 17, 40),
        ("bf16", 8, 1),
    ],
)
def test_guesses_do_not_change_the_tokens(size, length, tokens):
    model, ids = build(**SIZES[size]).eval(), prompt(length)
    given = list(ids)
    plain = InferenceScalingEngine().decode(model, ids, tokens, speculate=False)
    assert len(plain) == length + tokens
    assert plain[:length] == given
    for warmup in (0, 5):
        assert InferenceScalingEngine(warmup).decode(model, ids, tokens) == plain
    assert ids == given


def test_guesses_do_not_change_the_tokens_of_an_undecided_model():
    """All logits but a few digits alike: the smallest difference between two passes would show."""
    accepted = 0
    for seed in range(20):
        model, ids = build(seed).eval(), prompt(9, vocab=3)
        with torch.no_grad():
            # Only rounding tells a token from its neighbours.
            model.head.weight.copy_(model.head.weight[:1] * (1 + 2e-7 * torch.randn(VOCAB, 1)))
            model.head.bias.zero_()
        plain = InferenceScalingEngine().decode(model, ids, 40, speculate=False)
        engine = InferenceScalingEngine()
        assert engine.decode(model, ids, 40) == plain
        accepted += sum(s.accepted for s in engine.statistics.values())
    assert accepted > 100


@pytest.mark.parametrize(("size", "count"), [("small", 2), *((size, 1) for size in SIZES)])
def test_logits_are_the_same_bits_in_any_place_of_a_pass(size, count):
    torch.set_num_threads(count)
    model, ids = build(**SIZES[size]).eval(), torch.tensor([prompt(5 + PASS)])
    together = model.new_caches(40)
    model.continue_logits(ids[:, :5], together)
    expected = model.continue_logits(ids[:, 5:], together)[0]
    alone = model.new_caches(40)
    model.continue_logits(ids[:, :5], alone)
    for i in range(PASS):
        padded = torch.zeros(1, PASS, dtype=torch.int64)
        padded[0, 0] = ids[0, 5 + i]
        for past in alone:
            past.length = 5 + i
        assert torch.equal(model.continue_logits(padded, alone)[0, 0], expected[i])


@pytest.mark.parametrize(("period", "warmup"), [(1, 0), (2, 5), (3, 100), (7, 0), (8, 5), (11, 100), (11, 0)])
def test_loops_are_decoded_in_few_passes(period, warmup):
    following = cycle(period)
    model, engine = follower(following), InferenceScalingEngine(warmup)
    expected = walk(0, following, 1 + 80)
    assert greedy_decode(model, [0], 80) == expected
    assert InferenceScalingEngine().decode(model, [0], 80, speculate=False) == expected
    assert engine.decode(model, [0], 80) == expected
    assert engine.decoded == 80
    # One token a pass up to the first repetition of three tokens, eight from then on.
    assert engine.passes <= period + 3 + math.ceil(80 / PASS)


def test_a_learned_repetition_is_decoded_in_few_passes():
    text = [5, 17, 5, 30, 2, 17, 60]
    model, engine = learned(text), InferenceScalingEngine(warmup=9)
    expected = InferenceScalingEngine().decode(model, text, 80, speculate=False)
    assert engine.decode(model, text, 80) == expected
    assert expected[:24] == (4 * text)[:24]
    assert engine.decoded / engine.passes > 2


def test_wrong_guesses_cost_no_token():
    """The prompt says that 1 is followed by 2; the model says 3."""
    following = {t: t + 1 for t in range(VOCAB - 1)} | {1: 3, VOCAB - 1: 0}
    model, engine = follower(following), InferenceScalingEngine()
    ids = [1, 2, 2, 7, 1, 2, 2, 1]
    assert engine.decode(model, ids, 30) == ids[:-1] + walk(1, following, 31)
    assert engine.statistics[1].passes > 0
    assert sum(s.accepted for s in engine.statistics.values()) < engine.passes


def test_the_latest_occurrence_is_guessed_from():
    model, engine = follower(cycle(8)), InferenceScalingEngine(warmup=0)
    engine.decode(model, [1, 50, 60, 1, 2, 3, 40, 1], 1)
    assert engine.statistics[1] == Acceptance(1, 2)


@pytest.mark.parametrize("decode", [greedy_decode, InferenceScalingEngine().decode])
def test_no_token_is_decoded_where_none_is_asked_for(decode):
    assert decode(build().eval(), [1, 2, 3], 0) == [1, 2, 3]


# ---- The statistics


def test_passes_and_tokens_are_counted():
    engine, asked = InferenceScalingEngine(warmup=12), 0
    for seed in range(6):
        model, ids = build(seed).eval(), prompt(9)
        before = engine.passes, engine.decoded, sum(s.accepted for s in engine.statistics.values())
        sizes = []
        model.embedding.register_forward_hook(lambda _, given, __, sizes=sizes: sizes.append(given[0].shape))
        engine.decode(model, ids, 20 + seed)
        asked += 20 + seed
        after = engine.passes, engine.decoded, sum(s.accepted for s in engine.statistics.values())
        passes, decoded, accepted = (b - a for a, b in zip(before, after, strict=True))
        assert decoded == 20 + seed
        # One token a pass is the model's own; the last pass may be cut short.
        assert 0 <= passes + accepted - decoded < PASS
        # Another pass is made for each eight tokens of the prompt but its last.
        assert sizes == (1 + passes) * [(1, PASS)]
    assert engine.decoded == asked
    used = sum(s.passes for s in engine.statistics.values())
    assert 0 < used <= engine.passes
    for acceptance in engine.statistics.values():
        assert 0 <= acceptance.accepted <= (PASS - 1) * acceptance.passes
        if acceptance.passes:
            assert acceptance.mean == acceptance.accepted / acceptance.passes
    assert Acceptance().mean == 0


def test_a_pass_without_guesses_decodes_one_token():
    engine = InferenceScalingEngine()
    engine.decode(build().eval(), prompt(9), 25, speculate=False)
    assert (engine.passes, engine.decoded) == (25, 25)
    assert all(s == Acceptance() for s in engine.statistics.values())


def test_orders_take_turns_in_the_warmup():
    engine = InferenceScalingEngine(warmup=60)
    model = follower(cycle(4))
    while engine.passes < 60:
        engine.decode(model, walk(0, cycle(4), 12), 8)
    assert [engine.statistics[n].passes for n in ORDERS] == [20, 20, 20]


@pytest.mark.parametrize("best", ORDERS)
def test_the_best_order_is_used_after_the_warmup(best):
    engine = InferenceScalingEngine(warmup=30)
    for order in ORDERS:
        # Neither the order used most nor that with the most tokens, but that with the most a pass.
        engine.statistics[order] = Acceptance(10, 60) if order == best else Acceptance(100, 300)
    engine.passes = 30
    engine.decode(follower(cycle(4)), walk(0, cycle(4), 12), 24)
    used = {order: engine.statistics[order].passes for order in ORDERS}
    assert used == {order: 13 if order == best else 100 for order in ORDERS}


def test_another_order_stands_in_where_the_best_has_no_guess():
    engine = InferenceScalingEngine(warmup=0)
    engine.statistics[3] = Acceptance(1, 7)
    following = cycle(20) | {33: 5}
    # Only the last token was seen before, not the last two.
    engine.decode(follower(following), [5, 6, 7, 8, 33, 5], 1)
    assert engine.statistics[1] == Acceptance(1, 3)
    assert (engine.statistics[2].passes, engine.statistics[3].passes) == (0, 1)


def test_the_order_that_was_best_is_found():
    """What follows 5 depends on the token before it, so that guesses by one token are often wrong."""
    text = [17, 5, 30, 5, 41, 5, 9, 5]
    model, engine = learned(text), InferenceScalingEngine(warmup=30)
    ids = 2 * text
    while engine.passes < 30:
        assert engine.decode(model, ids, 16)[len(ids) :] == ids
    assert engine.statistics[1].mean < min(engine.statistics[n].mean for n in (2, 3))
    before = copy.deepcopy(engine.statistics)
    engine.decode(model, ids, 16)
    assert engine.statistics[1] == before[1]
    assert engine.statistics != before


def test_without_a_warmup_the_first_order_comes_first():
    engine = InferenceScalingEngine(warmup=0)
    engine.decode(follower(cycle(4)), walk(0, cycle(4), 12), 8)
    assert engine.statistics[1] == Acceptance(1, PASS - 1)
    assert engine.passes == 1


def test_engines_do_not_share_statistics():
    first, second = InferenceScalingEngine(), InferenceScalingEngine()
    first.decode(follower(cycle(4)), walk(0, cycle(4), 12), 8)
    assert first.passes > 0
    assert second == InferenceScalingEngine()


def test_a_negative_warmup_is_refused():
    with pytest.raises(ConfigError, match="speculation_warmup=-1"):
        InferenceScalingEngine(-1)


# ---- What is not changed


@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_the_random_state_are_not_changed(training):
    model = build().train(training)
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    ids = list(range(9))
    for _ in range(2):
        InferenceScalingEngine().decode(model, ids, 10)
        greedy_decode(model, ids, 10)
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()
