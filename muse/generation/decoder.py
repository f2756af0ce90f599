"""A model that reads a text token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from muse.generation.entropy_exit import EntropyExit, check_exits, exit_logits
from muse.models import LanguageModel
from muse.models.language_model import model_device


class Decoder:
    """Keeps keys and values of the tokens it has read, so that a token costs one step of the model.

    A model sees ``seq_len`` tokens. Where one more comes the window slides: the older half is forgotten, and
    the other half is read again, since what a token makes of its past is in its keys and values. Models
    without caches read the whole window each time.

    Args:
        model: in evaluation mode.
        seq_len: tokens that it sees.
        exits: where a token may leave out the last blocks; None for nowhere. What is read at once, a prompt
            or a window that slid, passes all blocks.

    Raises:
        ConfigError: the blocks of the model cannot be left out.
    """

    def __init__(self, model: LanguageModel, seq_len: int, exits: EntropyExit | None = None) -> None:
        if exits is not None:
            check_exits(model, exits)
        self._model, self._seq_len, self._exits = model, seq_len, exits
        self._window: list[int] = []
        self._begin()

    def _begin(self) -> None:
        self._caches = self._model.new_caches(self._seq_len)
        self._missing: list[list[Tensor]] = [[] for _ in self._caches or ()]

    @torch.no_grad()
    def read(self, tokens: Sequence[int]) -> Tensor:
        """Logits (V,), float32 on the CPU, of what follows all tokens read.

        Args:
            tokens: that come next, at least one.
        """
        self._window += tokens
        new = list(tokens)
        if len(self._window) > self._seq_len:
            # Of a long prompt all that it can see; of a text that grows half as much.
            kept = self._seq_len if len(tokens) > 1 else max(1, self._seq_len // 2)
            self._window = new = self._window[-kept:]
            self._begin()
        device = model_device(self._model)
        if self._caches is None:
            logits = self._model.next_logits(torch.tensor([self._window], device=device))[0]
        elif self._exits is None:
            logits = self._model.continue_logits(torch.tensor([new], device=device), self._caches)[0, -1]
        else:
            given = torch.tensor([new], device=device), self._caches, self._missing, self._exits
            logits = exit_logits(self._model, *given)[0, -1]
        return logits.float().cpu()
