"""A trained model that reads prompts in pieces, and decodes the sequences of all slots in one step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse.errors import ConfigError
from muse.layers import ComplexEmbedding, rotary_table
from muse.models.complex import RealPart, SeedBlock
from muse.models.language_model import LanguageModel, model_device
from muse.models.real import RealEmbedding
from muse.models.transformer import TransformerBlock, TransformerEmbedding, sinusoids
from muse.serving.maps import Attention, FeedForward, Map, Norm, maps_of, mask_of, norm_of
from muse.serving.slots import TILE, Kept, KeysAndValues, Pass, places_of

# Rows of a step are a multiple of it: products of fewer than four rows are computed by other code.
ROWS = 4


@dataclass
class Sublayer:
    """What is added to the state in one place: the sum of maps of what a norm gives."""

    norm: Norm
    maps: list[Map]


class SlotDecoder:
    """The arithmetic of a model, and memory for sequences in slots.

    A sequence is ``read`` from its start, in pieces, and then goes on by ``step``. All is computed in
    float32: weights in half precision are exact in it, and what is rounded less differs less from what was
    trained. Where a step leaves out a sequence its slot is as it was.

    Rows of products and sequences of attention do not see each other, but libraries choose how they sum by
    the shape of all of them: see ``muse.serving.selftest``.

    Args:
        model: in evaluation mode.
        slots: sequences at a time.
        window: tokens that each may have.

    Raises:
        ConfigError: the model has a part that is not known here.
    """

    def __init__(self, model: LanguageModel, slots: int, window: int) -> None:
        self.device = model_device(model)
        self.slots, self.window = slots, window
        # Whether a step has as many rows, and attention reads as many keys, however few are needed.
        self.whole = False
        # Rows beyond the slots have no memory of their own.
        self._room = slots + -slots % ROWS
        self._longest = window + -window % TILE
        self._embedding = _embedding_of(model, self._longest)
        self._trunk = model.trunk
        self._seeds: list[nn.Module] = []
        self._layers: list[Sublayer] = []
        for block in model.blocks:
            if isinstance(block, SeedBlock):
                self._seeds.append(copy.deepcopy(block).float())
            else:
                self._layers += _sublayers_of(block)
        self._norm = norm_of(model.norm)
        weight, bias = model.head_parameters()
        head = weight.detach().double().flatten(1)
        if isinstance(model.read_out, RealPart):
            head = torch.cat((head, torch.zeros_like(head)), 1)
        self._head = self._norm.folded(head).float().contiguous()
        self._argue = _argument_of(model, self._norm)
        self._bias = None if bias is None else bias.detach().float()
        self._logits = torch.empty(self._room, len(head), device=self.device)
        attentions = [part for layer in self._layers for part in layer.maps if isinstance(part, Attention)]
        # All attentions of a model have as many heads of one width, and see as many tokens.
        self._kv_heads = attentions[0].kv_heads if attentions else 0
        self._attended = attentions[0].window if attentions else None
        self._turns = None
        if attentions and not isinstance(model.embedding, TransformerEmbedding):
            self._turns = _turns(attentions[0].width // 2, self._longest, self.device)
        # For each loop, layer and map.
        self._kept = [
            [[part.new_kept(self._room, self._longest) for part in layer.maps] for layer in self._layers]
            for _ in range(model.loops)
        ]

    @property
    def vocabulary(self) -> int:
        """Tokens that there are."""
        return len(self._head)

    def read(self, slot: int, start: int, tokens: Sequence[int], every: bool = False) -> Tensor:
        """Logits (1, V), or (tokens, V) of ``every`` position, of what follows tokens of a sequence.

        Args:
            slot: of the sequence.
            start: tokens that it has already.
            tokens: that come next.
        """
        count = len(tokens)
        assert 0 < count <= self.window - start, "the sequence is longer than the window"
        positions = torch.arange(start, start + count, device=self.device)
        mask = mask_of(positions, self._keys(start + count), self._attended)[None, None]
        places = self._places(torch.full_like(positions, slot), positions)
        live = torch.ones(1, 1, dtype=torch.bool, device=self.device)
        own = slice(slot, slot + 1)
        given = Pass(own, 1, count, [start], positions, places, mask, self._turned(positions), live)
        state = self._through(torch.tensor(tokens, device=self.device), positions, given)
        return self._scores(state if every else state[-1:])

    def step(
        self, tokens: Sequence[int], lengths: Sequence[int], slots: Sequence[int] | None = None
    ) -> Tensor:
        """Logits (tokens, V) of what follows one more token of sequences.

        They are overwritten by the next step. Where tokens can be taken back, a sequence may have several.

        Args:
            tokens: one for each sequence, or more in turn.
            lengths: tokens that it has before each; -1 leaves a slot as it is, and its logits mean nothing.
            slots: of the sequences; by default the first ones.
        """
        count = len(tokens)
        rows = self._room if self.whole else count + -count % ROWS
        assert rows <= self._room, "there are not so many rows"
        assert max(lengths) < self.window, "the sequence is longer than the window"
        starts = [*lengths, *[-1] * (rows - count)]
        given = torch.tensor(starts, device=self.device)
        positions, live = given.clamp(min=0), given >= 0
        own: slice | Tensor = slice(0, rows)
        row = torch.arange(rows, device=self.device)
        if slots is not None:
            own = row = torch.tensor([*slots, *[0] * (rows - count)], device=self.device)
        # What is no sequence writes where nothing is read.
        places = self._places(row.masked_fill(~live, self._room), positions)
        mask = mask_of(positions, self._keys(max(lengths) + 1), self._attended).view(rows, 1, 1, -1)
        passed = Pass(own, rows, 1, starts, positions, places, mask, self._turned(positions), live[:, None])
        ids = torch.tensor([*tokens, *[0] * (rows - count)], device=self.device)
        state = self._through(ids, positions, passed)
        return self._scores(state, self._logits[:rows])[:count]

    @property
    def rows(self) -> int:
        """Tokens that a step may have, at most."""
        return self._room

    @property
    def takes_back(self) -> bool:
        """Whether tokens can be taken back: all that is kept of them is apart for each."""
        return all(isinstance(kept, KeysAndValues) for kept in self._memories())

    def take_back(self, slot: int, start: int, stop: int) -> None:
        """Have no more than ``start`` tokens in a slot that has ``stop``."""
        for kept in self._memories():
            assert isinstance(kept, KeysAndValues)
            kept.take_back(slot, start, stop)

    def clear(self, slot: int, length: int) -> None:
        """Forget the sequence of a slot, of so many tokens: behind a mask, too, what is no number spreads."""
        for part in self.kept(slot, length):
            part.zero_()

    def move(self, source: int, target: int, length: int) -> None:
        """Have a sequence of so many tokens in another slot."""
        for there, here in zip(self.kept(target, length), self.kept(source, length), strict=True):
            there.copy_(here)
        self.clear(source, length)

    def kept(self, slot: int, length: int) -> list[Tensor]:
        """All that is kept of the sequence of a slot, which has so many tokens; views of the memory."""
        return [part for kept in self._memories() for part in kept.of(slot, length)]

    def _memories(self) -> Iterator[Kept]:
        return (kept for loop in self._kept for layer in loop for kept in layer if kept is not None)

    def _places(self, slots: Tensor, positions: Tensor) -> Tensor:
        return places_of(slots, positions, self._kv_heads, self._longest)

    def _keys(self, length: int) -> int:
        return self._longest if self.whole else length + -length % TILE

    def _turned(self, positions: Tensor) -> Tensor | None:
        return None if self._turns is None else self._turns[positions]

    def _through(self, tokens: Tensor, positions: Tensor, given: Pass) -> Tensor:
        """States of tokens after all layers."""
        state = self._embedding(tokens, positions)
        if self._trunk is not None:
            momentum = torch.zeros_like(state)
            schedule = zip(self._trunk.kicks, self._trunk.drifts, strict=True)
            for layer, kept, (kick, drift) in zip(self._layers, self._kept[0], schedule, strict=True):
                _add(layer, momentum, state, given, kept, kick)
                state.add_(momentum, alpha=drift)
            return state
        embedded = state.clone() if len(self._kept) > 1 else state
        for loop, memories in enumerate(self._kept):
            if loop:
                state = state + embedded
            for seed in self._seeds:
                state = seed(state.unflatten(1, (2, -1))).flatten(1)
            for layer, kept in zip(self._layers, memories, strict=True):
                _add(layer, state, state, given, kept, 1.0)
        return state

    def _scores(self, state: Tensor, out: Tensor | None = None) -> Tensor:
        normal = self._norm.of(state)
        if out is None:
            logits = F.linear(normal, self._head, self._bias)
        else:
            # Memory of its own would be asked of the system each time.
            logits = torch.mm(normal, self._head.t(), out=out)
            if self._bias is not None:
                logits.add_(self._bias)
        return logits if self._argue is None else self._argue(normal, logits)


def _add(
    layer: Sublayer, into: Tensor, state: Tensor, given: Pass, kept: Sequence[Kept | None], factor: float
) -> None:
    normal = layer.norm.of(state)
    for part, own in zip(layer.maps, kept, strict=True):
        part.add(into, normal, given, own, factor)


def _sublayers_of(block: nn.Module) -> list[Sublayer]:
    if isinstance(block, TransformerBlock):
        attention, forward = norm_of(block.attention_norm), norm_of(block.ffn_norm)
        return [
            Sublayer(attention, maps_of(block.attention, attention)),
            Sublayer(forward, [FeedForward.of_real(block.up, block.down, "gelu", forward)]),
        ]
    if not hasattr(block, "sublayers"):
        raise ConfigError(f"a model of {type(block).__name__} cannot be served")
    layers = []
    parts: list[Any] = block.sublayers()  # type: ignore[operator]
    for part in parts:
        norm = norm_of(part.norm)
        layers.append(Sublayer(norm, maps_of(part.map, norm)))
    return layers


def _argument_of(model: LanguageModel, norm: Norm) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Logits of the synthesis, of normalised rows and logits of the thesis; None without an antithesis."""
    if model.antithesis is None:
        return None
    antithesis, read_out = copy.deepcopy(model.antithesis).float(), model.read_out
    matrix = model.head_parameters()[0].detach().float().flatten(1)
    return lambda normal, logits: antithesis(
        read_out(norm.applied(normal).unflatten(1, (2, -1))), logits, matrix
    )


def _embedding_of(model: LanguageModel, longest: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Rows of tokens at positions."""
    embedding = model.embedding
    assert isinstance(embedding.weight, Tensor)
    weight = embedding.weight.detach().float().flatten(1)
    if isinstance(embedding, TransformerEmbedding):
        features = weight.shape[1]
        places = sinusoids(torch.arange(longest, device=weight.device), features)
        return lambda tokens, positions: (
            F.embedding(tokens, weight).mul_(features**0.5).add_(places[positions])
        )
    if not isinstance(embedding, RealEmbedding | ComplexEmbedding):
        raise ConfigError(f"a model with {type(embedding).__name__} cannot be served")
    factor = 1 / embedding.rms
    if isinstance(embedding, ComplexEmbedding) and embedding.phase is not None:
        phase = embedding.phase.detach().float()
        turns = torch.polar(torch.ones_like(phase), phase)

        def turned(tokens: Tensor, positions: Tensor) -> Tensor:
            re, im = F.embedding(tokens, weight).mul_(factor).chunk(2, 1)
            z = torch.complex(re, im) * turns[positions]
            return torch.cat((z.real, z.imag), 1)

        return turned
    return lambda tokens, positions: F.embedding(tokens, weight).mul_(factor)


def _turns(channels: int, positions: int, device: torch.device) -> Tensor:
    """e^{i n omega} of each position n, complex64 (positions, 1, channels)."""
    planes = rotary_table(torch.arange(positions, device=device), channels)
    return torch.view_as_complex(planes.transpose(1, 2).contiguous()).unsqueeze(1)
