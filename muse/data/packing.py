"""Documents side by side in windows: which pieces of them, found from the ends of text alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Tokens in which ends of text are looked for at once.
LOOKED_AT = 1 << 22
# Pieces that are packed among themselves, so that what is in memory beside the plan has a bound.
PACKED_AT_ONCE = 1 << 16


@dataclass(frozen=True, eq=False)
class PackedText:
    """Tokens, and the windows that their documents fill: every token is the target of one place.

    A document is predicted from the end of text before it, and its own end is its last target. What is longer
    than a window is cut into full ones and a rest. Windows are filled by best fit, the longest pieces first,
    and have no order among them.

    Attributes:
        tokens: integers of shape (n,), documents that each end with ``end``.
        end: id of the end of text.
        seq_len: places of a window.
        starts: the first target of each piece, a place in ``tokens``; int64 (pieces,), window after window.
        lengths: targets of each piece; int32 (pieces,).
        bounds: the first piece of each window, and their number; int64 (windows + 1,).
    """

    tokens: np.ndarray
    end: int
    seq_len: int
    starts: np.ndarray
    lengths: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        """Tokens."""
        return len(self.tokens)

    @property
    def windows(self) -> int:
        """Windows that hold all of them."""
        return len(self.bounds) - 1

    def filled(self, window: int) -> int:
        """Targets in a window; its other places are padding."""
        return int(self.lengths[self.bounds[window] : self.bounds[window + 1]].sum())

    def window(self, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, targets and positions of a window, int64 (seq_len,).

        Positions begin at 0 with each piece, and with the padding, whose targets are -1.
        """
        inputs = np.full(self.seq_len, self.end, dtype=np.int64)
        targets = np.full(self.seq_len, -1, dtype=np.int64)
        positions = np.arange(self.seq_len)
        place = 0
        for piece in range(self.bounds[window], self.bounds[window + 1]):
            start, length = int(self.starts[piece]), int(self.lengths[piece])
            targets[place : place + length] = self.tokens[start : start + length]
            # Before the first token there is no end of text, but as if there were.
            known = start == 0
            before = self.tokens[start - 1 + known : start - 1 + length]
            inputs[place + known : place + length] = before
            positions[place:] -= positions[place]
            place += length
        if place < self.seq_len:
            positions[place:] -= positions[place]
        return inputs, targets, positions


def pack(tokens: np.ndarray, end: int, seq_len: int) -> PackedText:
    """Pack the documents of a text.

    Args:
        tokens: integers of shape (n,).
        end: id of the end of text; after the last one there may be a document without.
        seq_len: places of a window.
    """
    starts, lengths = _pieces(_document_ends(tokens, end), seq_len)
    full = lengths == seq_len
    window = np.empty(len(starts), dtype=np.int64)
    windows = int(full.sum())
    window[full] = np.arange(windows)
    rests = np.flatnonzero(~full)
    for first in range(0, len(rests), PACKED_AT_ONCE):
        own = rests[first : first + PACKED_AT_ONCE]
        own = own[np.argsort(-lengths[own], kind="stable")]
        placed = best_fit(lengths[own].tolist(), seq_len)
        window[own] = windows + np.array(placed)
        windows += max(placed) + 1
    order = np.argsort(window, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(window, minlength=windows))])
    return PackedText(tokens, end, seq_len, starts[order], lengths[order].astype(np.int32), bounds)


def best_fit(lengths: list[int], size: int) -> list[int]:
    """The number of a bin for each length, in turn: the fullest one that has room, or else a new one.

    Args:
        lengths: between 1 and ``size``.
        size: of a bin.
    """
    with_room: list[list[int]] = [[] for _ in range(size)]
    # Bit r is set where a bin has room for r.
    rooms, bins, placed = 0, 0, []
    for length in lengths:
        larger = rooms >> length
        if larger:
            room = length + (larger & -larger).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen, bins = size, bins, bins + 1
        left = room - length
        if left:
            with_room[left].append(chosen)
            rooms |= 1 << left
        placed.append(chosen)
    return placed


def _document_ends(tokens: np.ndarray, end: int) -> np.ndarray:
    """The place after each document, int64 (documents,)."""
    found = [
        first + 1 + np.flatnonzero(tokens[first : first + LOOKED_AT] == end)
        for first in range(0, len(tokens), LOOKED_AT)
    ]
    if not found or not len(found[-1]) or found[-1][-1] < len(tokens):
        found.append(np.array([len(tokens)]))
    return np.concatenate(found).astype(np.int64)


def _pieces(ends: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Where pieces of at most ``seq_len`` tokens start, and their lengths, int64 (pieces,) each."""
    begins = np.concatenate([[0], ends[:-1]])
    counts = -(-(ends - begins) // seq_len)
    document = np.repeat(np.arange(len(ends)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = begins[document] + number * seq_len
    return starts, np.minimum(seq_len, ends[document] - starts)
