"""What may come next in a text that repeats itself: what followed its last tokens before."""

from __future__ import annotations

from collections.abc import Sequence

# Tokens that are looked for, the most first.
LONGEST = 2


class Guesses:
    """Of one text.

    Args:
        seen: its tokens, to which others are only added.
    """

    def __init__(self, seen: Sequence[int]) -> None:
        self._seen = seen
        # Where what followed some tokens begins, at their last time but the end of the text.
        self._after: dict[tuple[int, ...], int] = {}
        self._noted = 0

    def next(self, count: int) -> list[int]:
        """So many tokens, or none; they repeat what followed, where that is shorter."""
        seen = self._seen
        for place in range(self._noted, len(seen)):
            for length in range(1, min(LONGEST, place) + 1):
                self._after[tuple(seen[place - length : place])] = place
        self._noted = len(seen)
        for length in range(min(LONGEST, len(seen)), 0, -1):
            begin = self._after.get(tuple(seen[-length:]))
            if begin is not None:
                again = seen[begin:]
                return [again[number % len(again)] for number in range(count)]
        return []
