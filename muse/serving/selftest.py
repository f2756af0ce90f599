"""Whether a sequence has the same logits, to the last bit, in any company and any slot: tried, not assumed.

Libraries choose how they sum by the shapes of all that they are given. With a number of rows and keys that
only has to be a multiple of a few, what one sequence gets does not depend on the others for those that are
known; where it does, all steps have as many rows and keys as there can be.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from muse.errors import RunError
from muse.serving.decoder import ROWS, SlotDecoder
from muse.serving.slots import TILE

# Tokens of a prompt that is read in two slots.
PROMPT = 40
# Of a step; few, since one of the others may be what makes a model's logits no numbers.
TOKENS = 8
# Sizes of companies, about.
COMPANIES = 8


@torch.inference_mode()
def settle(decoder: SlotDecoder) -> bool:
    """Choose the fewest rows and keys with which company does not matter; False where it always does.

    All slots must be free, and are.

    Raises:
        RunError: logits are not finite.
    """
    found = False
    for whole in (False, True):
        decoder.whole = whole
        found = _same_in_any_company(decoder)
        for slot in range(decoder.slots):
            decoder.clear(slot, decoder.window)
        if found:
            break
    decoder.whole = decoder.whole and found
    return found


def _same_in_any_company(decoder: SlotDecoder) -> bool:
    # Fewer keys than others have, and many.
    lengths = {0, min(TILE // 2, decoder.window - 1), _half(decoder), decoder.window - 1}
    return _reads_alike(decoder) and all(_decodes_alike(decoder, length) for length in sorted(lengths))


def _reads_alike(decoder: SlotDecoder) -> bool:
    tokens = [place % _tokens(decoder) for place in range(min(PROMPT, decoder.window))]
    found = []
    for slot in {0, decoder.slots - 1}:
        logits = _finite(decoder.read(slot, 0, tokens))
        found.append([logits, *(part.clone() for part in decoder.kept(slot, len(tokens)))])
    return all(torch.equal(a, b) for a, b in zip(found[0], found[-1], strict=True))


def _decodes_alike(decoder: SlotDecoder, length: int) -> bool:
    generator = torch.Generator(decoder.device).manual_seed(length)
    template = [
        torch.empty_like(part).normal_(generator=generator) for part in decoder.kept(0, decoder.window)
    ]

    def decoded(slot: int, tokens: list[int], lengths: list[int]) -> list[Tensor]:
        for part, noise in zip(decoder.kept(slot, decoder.window), template, strict=True):
            part.copy_(noise)
        tokens[slot], lengths[slot] = 1 % _tokens(decoder), length
        logits = _finite(decoder.step(tokens, lengths)[slot]).clone()
        return [logits, *(part.clone() for part in decoder.kept(slot, length + 1))]

    alone = decoded(0, [0], [0])
    return _guesses_alike(decoder, length, template) and all(
        torch.equal(a, b)
        for slot, tokens, lengths in _companies(decoder)
        for a, b in zip(alone, decoded(slot, tokens, lengths), strict=True)
    )


def _guesses_alike(decoder: SlotDecoder, length: int, template: list[Tensor]) -> bool:
    """Whether tokens of one sequence have the same logits in one step as in a step for each."""
    count = min(ROWS, decoder.window - length)
    if not decoder.takes_back or count == 1:
        return True
    tokens, lengths = [place % _tokens(decoder) for place in range(count)], range(length, length + count)

    def begun() -> None:
        for part, noise in zip(decoder.kept(0, decoder.window), template, strict=True):
            part.copy_(noise)

    begun()
    apart = [
        decoder.step([token], [before])[0].clone() for token, before in zip(tokens, lengths, strict=True)
    ]
    begun()
    return torch.equal(torch.stack(apart), decoder.step(tokens, lengths, [0] * count))


def _companies(decoder: SlotDecoder) -> Iterator[tuple[int, list[int], list[int]]]:
    """Slots among others, and tokens and lengths of all."""
    slots, longest = decoder.slots, decoder.window - 1
    counts = {2, 5, *range(ROWS, slots, max(ROWS, slots // COMPANIES)), slots - 1, slots}
    for count in sorted(count for count in counts if 1 < count <= slots):
        for slot in sorted({0, count // 2, count - 1}):
            tokens = [place % _tokens(decoder) for place in range(count)]
            yield slot, tokens, [(-1, 0, _half(decoder), longest)[place % 4] for place in range(count)]


def _half(decoder: SlotDecoder) -> int:
    """Tokens, about half of the window, of which the next one ends nodes of all levels of a tree."""
    return max(0, (1 << (decoder.window - 1).bit_length() >> 1) - 2)


def _tokens(decoder: SlotDecoder) -> int:
    return min(TOKENS, decoder.vocabulary)


def _finite(logits: Tensor) -> Tensor:
    if not logits.isfinite().all():
        raise RunError("the model's logits are not finite, so it cannot be served; its weights are damaged")
    return logits
