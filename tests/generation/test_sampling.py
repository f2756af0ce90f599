import math

import pytest
import torch

from muse.errors import ConfigError, RunError
from muse.generation import GREEDY, Sampling, next_token

LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.5, 0.0, 1.9, -4.0])


def drawn(sampling, logits=LOGITS, seen=(), count=4000):
    generator = torch.Generator().manual_seed(0)
    tokens = [next_token(logits, sampling, seen, generator) for _ in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_come_as_often_as_their_probability_says(temperature):
    wanted = (LOGITS / temperature).softmax(0)
    found = drawn(Sampling(temperature, top_k=0))
    assert ((found - wanted).abs() < 5 * (wanted * (1 - wanted) / 4000).sqrt() + 1e-6).all()


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 3}, {1, 5, 3}),
        ({"top_k": 100}, set(range(7))),
        ({"top_k": 0, "min_p": 0.5}, {1, 5, 3}),
        # The likeliest three have 0.26, 0.25 and 0.21.
        ({"top_k": 0, "top_p": 0.2}, {1}),
        ({"top_k": 0, "top_p": 0.6}, {1, 5, 3}),
        ({"top_k": 2, "top_p": 0.9, "min_p": 0.1}, {1, 5}),
    ],
)
def test_only_allowed_tokens_come_and_all_of_them(options, allowed):
    found = drawn(Sampling(2.0, **options))
    assert set(found.nonzero().flatten().tolist()) == allowed
    probabilities = LOGITS.div(2.0).softmax(0)
    chosen = sorted(allowed)
    wanted = probabilities[chosen] / probabilities[chosen].sum()
    assert torch.allclose(found[chosen], wanted, atol=0.05)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1e-6, top_k=0), Sampling(5.0, top_k=1)])
def test_one_candidate_is_the_likeliest_token(sampling):
    assert drawn(sampling, count=20)[1] == 1


def test_what_was_there_is_less_likely_by_the_penalty():
    penalised = LOGITS.clone()
    penalised[[1, 2]] = torch.tensor([2.0 / 1.5, -1.0 * 1.5])
    found = drawn(Sampling(1.0, top_k=0, repetition_penalty=1.5), seen=[1, 2, 1])
    assert torch.equal(found, drawn(Sampling(1.0, top_k=0), penalised))
    assert next_token(LOGITS, Sampling(0.0, repetition_penalty=3.0), [1], torch.Generator()) == 5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_an_error(bad):
    logits = LOGITS.clone()
    logits[4] = bad
    with pytest.raises(RunError, match="not finite"):
        next_token(logits, GREEDY, [], torch.Generator())


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0}, {"temperature": math.inf}, {"temperature": math.nan}, {"top_k": -1},
        {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 1.0}, {"min_p": -0.1}, {"repetition_penalty": 0.0},
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_named(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name}=.* must be"):
        Sampling(**options)
