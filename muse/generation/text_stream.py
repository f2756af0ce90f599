"""Text as its tokens come."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from muse.data import Tokenizer

# What ends a line where words are tokens.
LINE = "\n"


class TextStream:
    """Joins tokens to text that can be shown at once.

    A character whose bytes are not all there is held back, and so is what may be the beginning of a stop.

    Args:
        tokenizer: of the tokens.
        stops: texts that end it; they are not shown.
        begins: whether no text is before it on its line: words have a space between them.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), begins: bool = True) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._begins = begins
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is sure with one more token; ``stopped`` is set where a stop came."""
        return self._released(self._text_of(token))

    def end(self) -> str:
        """What is still held back when no token follows."""
        text = self._released(self._bytes.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + ("" if self.stopped else held)

    def _text_of(self, token: int) -> str:
        if not self._tokenizer.of_words:
            return self._bytes.decode(self._tokenizer.bytes_of(token))
        word = self._tokenizer.decode([token])
        text = word if self._begins or word == LINE else f" {word}"
        self._begins = word == LINE
        return text

    def _released(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        held = max(
            (
                length
                for stop in self._stops
                for length in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:length])
            ),
            default=0,
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
