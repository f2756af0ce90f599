from __future__ import annotations

import pytest
import torch
from support.configs import SEQ_LEN, small_sizes, stage_config

from muse.config import TokenizerConfig
from muse.data import Corpus, Tokenizer, build_tokenizer
from muse.models import LanguageModel, build_model
from muse.training.sample import sample_text

TEXT = "the cat sat on a mat and then it was gone again so we went home\n"


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    return build_tokenizer(TokenizerConfig(name="word"), Corpus([TEXT], [TEXT], [TEXT]), tmp_path)


def model(tokenizer: Tokenizer, dropout: float = 0.0, stage: int = 1) -> LanguageModel:
    sizes = small_sizes(tokenizer.vocab_size, layers=1)
    return build_model(stage_config(stage, dropout=dropout), sizes, tokenizer.vocab_size)


def test_a_sample_is_decided_by_its_seed_alone(tokenizer):
    net = model(tokenizer, dropout=0.5).train()
    state = torch.get_rng_state()
    texts = [sample_text(net, tokenizer, [1, 2], 30, SEQ_LEN, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    torch.manual_seed(99)
    assert texts[0] == texts[1] == sample_text(net, tokenizer, [1, 2], 30, SEQ_LEN, seed=0)
    assert texts[0] != texts[2]


@pytest.mark.parametrize("tokens", [0, 1, 3 * SEQ_LEN])
def test_a_sample_goes_on_from_the_prompt(tokenizer, tokens):
    prompt = tokenizer.encode("the cat sat on a mat and then it was gone")
    text = sample_text(model(tokenizer), tokenizer, prompt, tokens, SEQ_LEN)
    assert text.startswith(tokenizer.decode(prompt))
    assert len(tokenizer.encode(text)) == len(prompt) + tokens


def test_only_the_last_seq_len_tokens_count(tokenizer):
    net = model(tokenizer)
    endings = []
    for first in (3, 4):
        prompt = [first] * 5 + list(range(1, SEQ_LEN + 1))
        text = sample_text(net, tokenizer, prompt, 10, SEQ_LEN)
        endings.append(tokenizer.encode(text)[-10:])
    assert endings[0] == endings[1]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_one_candidate_is_the_likeliest_token(tokenizer, stage):
    net = model(tokenizer, stage=stage).eval()
    ids = [1, 2, 3]
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(net(torch.tensor([ids[-SEQ_LEN:]]))[0, -1].argmax()))
    for seed in (0, 1):
        assert sample_text(net, tokenizer, ids[:3], 12, SEQ_LEN, top_k=1, seed=seed) == tokenizer.decode(ids)
    cold = sample_text(net, tokenizer, ids[:3], 12, SEQ_LEN, temperature=1e-4, seed=2)
    assert cold == tokenizer.decode(ids)


def test_tokens_of_the_past_are_kept_while_the_window_does_not_slide(tokenizer):
    net = model(tokenizer)
    sizes = []

    def forward(module, inputs):
        sizes.append(inputs[0].shape[1])

    net.embedding.register_forward_pre_hook(forward)
    sample_text(net, tokenizer, [1, 2, 3], SEQ_LEN, SEQ_LEN)
    assert sizes == [3] + [1] * (SEQ_LEN - 3) + [SEQ_LEN] * 2


def test_the_likeliest_tokens_only_are_drawn(tokenizer):
    net = model(tokenizer).eval()
    with torch.no_grad():
        allowed = set(net(torch.tensor([[5]]))[0, -1].topk(3).indices.tolist())
    drawn = set()
    for seed in range(40):
        text = sample_text(net, tokenizer, [5], 1, SEQ_LEN, temperature=10.0, top_k=3, seed=seed)
        drawn.add(tokenizer.encode(text)[-1])
    assert drawn == allowed
