"""The tokens that a model goes on with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from muse.generation.decoder import Decoder
from muse.generation.entropy_exit import EntropyExit
from muse.generation.sampling import Sampling, next_token
from muse.models import LanguageModel


def continuation(
    model: LanguageModel,
    prompt: Sequence[int],
    tokens: int,
    seq_len: int,
    sampling: Sampling,
    seed: int = 0,
    exits: EntropyExit | None = None,
) -> Iterator[int]:
    """Yield ``tokens`` token ids that follow ``prompt``, each as soon as it is drawn.

    Args:
        prompt: token ids to start from, at least one.
        seq_len: tokens of context that the model sees, see ``Decoder``.
        sampling: how a token is drawn.
        seed: seed of the draw; PyTorch's own generator is not touched.
        exits: where a token may leave out the last blocks; None for nowhere.

    Raises:
        ConfigError: the blocks of the model cannot be left out.
        RunError: a logit is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    seen, new = list(prompt), list(prompt)
    training = model.training
    model.eval()
    try:
        decoder = Decoder(model, seq_len, exits)
        for _ in range(tokens):
            new = [next_token(decoder.read(new), sampling, seen, generator)]
            seen += new
            yield new[0]
    finally:
        model.train(training)
