"""What mixers of tokens keep of the requests in slots: memory that is laid out once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from muse.layers.mera import READ

# Keys that attention reads are a multiple of it: sums over zeros behind the last one then change no bit.
TILE = 32


@dataclass
class Pass:
    """Tokens that go through the network together: of ``count`` sequences ``length`` each.

    Attributes:
        slots: of the sequences, neighbours or any.
        count: of them; one that is there more than once has its tokens in turn.
        length: tokens of each.
        starts: tokens that each has already; -1 for what is no sequence.
        positions: of the tokens, int64 (count * length,).
        places: of their keys and values, each head's, among the rows of ``KeysAndValues``; (tokens * heads,).
        mask: 0 where a token sees a key, else -inf; float32 (count, 1, length, keys).
        turns: e^{i n omega} of their positions, complex64 (count * length, 1, channels of a head); None
            where attention has no rotary positions.
        live: whether a sequence is one, bool (count, 1); others are there for the number of rows, and what
            they leave behind is never read.
    """

    slots: slice | Tensor
    count: int
    length: int
    starts: Sequence[int]
    positions: Tensor
    places: Tensor
    mask: Tensor
    turns: Tensor | None
    live: Tensor

    @property
    def keys(self) -> int:
        """That attention reads."""
        return self.mask.shape[-1]


class Kept(Protocol):
    """What one mixer keeps of all slots."""

    def of(self, slot: int, length: int) -> list[Tensor]:
        """Of the sequence of a slot, which has so many tokens; views of the memory."""


def places_of(slots: Tensor, positions: Tensor, heads: int, window: int) -> Tensor:
    """Where tokens (tokens,) have keys and values, (tokens * 2 heads,) rows of ``KeysAndValues``."""
    every = torch.arange(2 * heads, device=slots.device)
    return ((slots[:, None] * (2 * heads) + every) * window + positions[:, None]).flatten()


class KeysAndValues:
    """Of one attention.

    Args:
        slots: sequences.
        window: tokens of each, a multiple of TILE.
        heads: of keys, and as many of values.
        width: real features of a head.
        device: of the memory.
    """

    def __init__(self, slots: int, window: int, heads: int, width: int, device: torch.device) -> None:
        self.heads = heads
        # A slot more, where rows write that are no sequence.
        self.memory = torch.zeros(slots + 1, 2 * heads, window, width, device=device)
        self._rows = self.memory.view(-1, width)

    def write(self, new: Tensor, tokens: Pass) -> None:
        """Add keys and values (tokens, 2 heads, width)."""
        self._rows.index_copy_(0, tokens.places, new.reshape(-1, new.shape[-1]))

    def read(self, tokens: Pass) -> tuple[Tensor, Tensor]:
        """All keys and values that the mask of a pass has a column for, each (count, heads, keys, width)."""
        seen = self.memory[:, :, : tokens.keys][tokens.slots]
        return seen[:, : self.heads], seen[:, self.heads :]

    def of(self, slot: int, length: int) -> list[Tensor]:
        return [self.memory[slot, :, :length]]

    def take_back(self, slot: int, start: int, stop: int) -> None:
        """Forget the tokens of a sequence from one on."""
        self.memory[slot, :, start:stop].zero_()


class Observables:
    """Of one Koopman operator.

    Args:
        slots: sequences.
        channels: complex observables.
        taps: tokens before that its convolution sees.
        device: of the memory.
    """

    def __init__(self, slots: int, channels: int, taps: int, device: torch.device) -> None:
        self.state = torch.zeros(slots, channels, dtype=torch.complex64, device=device)
        # Of the last tokens, [re | im].
        self.recent = torch.zeros(slots, taps, 2 * channels, device=device)

    def write(self, tokens: Pass, state: Tensor, recent: Tensor) -> None:
        """Take what is after a pass, of sequences that are."""
        self.state[tokens.slots] = torch.where(tokens.live, state, self.state[tokens.slots])
        live = tokens.live.unsqueeze(-1)
        self.recent[tokens.slots] = torch.where(live, recent, self.recent[tokens.slots])

    def of(self, slot: int, length: int) -> list[Tensor]:
        return [self.state[slot], self.recent[slot]]


class Trees:
    """Of one MERA router.

    Args:
        slots: sequences.
        levels: of nodes.
        channels: complex ones of a node.
        device: of the memory.
    """

    def __init__(self, slots: int, levels: int, channels: int, device: torch.device) -> None:
        # Nodes [re | im]: of each level the last ones, the newest first.
        self.recent = torch.zeros(slots, levels, READ, 2 * channels, device=device)
        # And the first of a pair that no node of the next level holds, as disentanglers leave it.
        self.first = torch.zeros(slots, levels, 2 * channels, device=device)

    def of(self, slot: int, length: int) -> list[Tensor]:
        return [self.recent[slot], self.first[slot]]
