"""Which source of a mix each training window is of: by weight, evenly, and without any state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from muse.data.packing import PackedText

# Shares are whole multiples of 1 / SCALE, so that no place is rounded, however far the training is.
SCALE = 1 << 40


@dataclass(frozen=True, eq=False)
class Mix:
    """The tokens of several sources, of which a training takes windows by weight.

    The first source has places in the endless row of windows that lie as evenly as whole ones can, the second
    one likewise among those that are left, and so on. Of any consecutive windows a source therefore has its
    share, but for less than the number of the other sources.

    Attributes:
        names: of the sources, as messages tell them.
        tokens: of each, integers of shape (n,), or those packed.
        weights: of each, above 0.
    """

    names: tuple[str, ...]
    tokens: tuple[np.ndarray | PackedText, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        """Tokens of all sources."""
        return sum(map(len, self.tokens))

    def source_of(self, window: int, seed: int) -> tuple[int, int]:
        """The number of the source that a window is of, and that of the window among its own."""
        before = self.windows_of(window, seed)
        after = self.windows_of(window + 1, seed)
        source = next(number for number, count in enumerate(after) if count > before[number])
        return source, before[source]

    def windows_of(self, windows: int, seed: int) -> list[int]:
        """How many of the first ``windows`` are of each source."""
        counts = []
        for share, phase in zip(self._shares, _phases(len(self.weights), seed), strict=True):
            counts.append((windows * share + phase) // SCALE)
            windows -= counts[-1]
        return counts

    @cached_property
    def _shares(self) -> list[int]:
        """Of the windows that the sources before it leave, the part of each one, in units of 1 / SCALE."""
        left = [sum(self.weights[number:]) for number in range(len(self.weights))]
        return [round(SCALE * weight / rest) for weight, rest in zip(self.weights, left, strict=True)]


@lru_cache(maxsize=8)
def _phases(sources: int, seed: int) -> list[int]:
    """How far each source is from its first place."""
    return [int(phase) for phase in np.random.default_rng(seed).integers(SCALE, size=sources)]
