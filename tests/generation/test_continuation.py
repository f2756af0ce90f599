from __future__ import annotations

import pytest
import torch
from support.configs import SEQ_LEN, VOCAB, small_sizes, stage_config

from muse.generation import GREEDY, Decoder, Sampling, continuation
from muse.models import LanguageModel, build_model

STAGES = ["0", "1", "2", "3", "3a"]


def model(stage: str = "1", **options) -> LanguageModel:
    sizes = small_sizes(VOCAB, kv_heads=2)
    built = build_model(stage_config(stage, **options), sizes, VOCAB, seed=3)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(1.7)
    return built.eval()


def drawn(net, prompt, tokens, sampling=None, seed=0):
    return list(continuation(net, prompt, tokens, SEQ_LEN, sampling or Sampling(), seed))


def window_of(prompt, following):
    """What is seen of a text: half of a window that would be too long is forgotten."""
    seen = prompt[-SEQ_LEN:]
    for token in following:
        seen = [*seen, token]
        if len(seen) > SEQ_LEN:
            seen = seen[-(SEQ_LEN // 2) :]
    return seen


def test_tokens_are_decided_by_the_seed_alone():
    net = model(dropout=0.5).train()
    state = torch.get_rng_state()
    first, again, other = (drawn(net, [1, 2], 30, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    torch.manual_seed(99)
    assert first == again == drawn(net, [1, 2], 30, seed=0)
    assert first != other


@pytest.mark.parametrize("tokens", [0, 1, 3 * SEQ_LEN])
def test_as_many_tokens_come_as_are_asked_for(tokens):
    assert len(drawn(model(), list(range(5)), tokens)) == tokens


def test_of_a_prompt_only_the_last_seq_len_tokens_count():
    net = model()
    ends = [drawn(net, [first] * 5 + list(range(1, SEQ_LEN + 1)), 10) for first in (3, 4)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("length", [1, 3, SEQ_LEN, SEQ_LEN + 4])
def test_the_likeliest_token_is_that_of_a_full_pass(stage, length):
    net = model(stage)
    prompt = [(7 * n) % VOCAB for n in range(length)]
    found = drawn(net, prompt, 2 * SEQ_LEN, GREEDY)
    with torch.no_grad():
        for count, token in enumerate(found):
            logits = net(torch.tensor([window_of(prompt, found[:count])]))[0, -1]
            # Passes of other lengths round differently, so that two tokens may change places.
            assert logits[token] > logits.max() - 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_a_token_costs_one_step_but_where_the_window_slides(stage):
    net, sizes = model(stage), []
    net.embedding.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[1]))
    drawn(net, [1, 2, 3], 2 * SEQ_LEN)
    half = SEQ_LEN // 2
    one_window = [half] + [1] * (SEQ_LEN - half)
    assert sizes == ([3] + [1] * (SEQ_LEN - 3) + 3 * one_window)[: 2 * SEQ_LEN]


def test_a_model_without_caches_reads_its_window_each_time():
    net, sizes = model(mixer="none"), []
    net.embedding.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[1]))
    drawn(net, [1, 2, 3], 4)
    assert sizes == [3, 4, 5, 6]


def test_the_window_slides_with_the_first_token_that_has_no_room():
    net, sizes = model(), []
    net.embedding.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[1]))
    decoder = Decoder(net, SEQ_LEN)
    decoder.read(list(range(SEQ_LEN)))
    decoder.read([1])
    assert sizes == [SEQ_LEN, SEQ_LEN // 2]
