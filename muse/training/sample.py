"""Text sampled from a model."""

from __future__ import annotations

import torch

from muse.data import Tokenizer
from muse.models import LanguageModel
from muse.models.language_model import model_device


@torch.no_grad()
def sample_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: list[int],
    tokens: int,
    seq_len: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """Continue ``prompt`` by ``tokens`` tokens and decode the whole.

    Where the model takes a cache, a token costs one step, until there are ``seq_len`` of them: a window that
    slides gives every token another past, so that the keys and values of all change.

    Args:
        prompt: token ids to start from, at least one.
        seq_len: tokens of context that the model sees.
        temperature: divides the logits.
        top_k: only the so many likeliest tokens are drawn from.
        seed: seed of the draw; PyTorch's own generator is not touched.
    """
    device = model_device(model)
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.eval()
    ids = list(prompt)
    caches = model.new_caches()
    try:
        for _ in range(tokens):
            if caches is not None and len(ids) <= seq_len:
                new = torch.tensor([ids[caches[0].length :]], device=device)
                logits = model.continue_logits(new, caches)[0, -1]
            else:
                logits = model.next_logits(torch.tensor([ids[-seq_len:]], device=device))[0]
            logits = logits.float().cpu() / temperature
            best = logits.topk(min(top_k, logits.numel()))
            choice = torch.multinomial(best.values.softmax(-1), 1, generator=generator)
            ids.append(int(best.indices[choice]))
    finally:
        model.train(training)
    return tokenizer.decode(ids)
