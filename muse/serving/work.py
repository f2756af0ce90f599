"""One request on its way through the engine: how far it is, and the events that come of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from muse.data import Tokenizer
from muse.generation import TextStream, next_token
from muse.generation.text_stream import LINE
from muse.serving.guesses import Guesses
from muse.serving.requests import Event, Finished, Request, Token


class Work:
    """A request, and its answer so far; the engine's thread alone changes it.

    Args:
        number: of the request.
        request: that is answered.
        deliver: takes the events.
        tokenizer: of the model.
    """

    def __init__(
        self, number: int, request: Request, deliver: Callable[[Event], None], tokenizer: Tokenizer
    ) -> None:
        self.number, self.request = number, request
        # Tokens of the prompt that are read, and all of them with those that were made.
        self.read, self.seen = 0, list(request.ids)
        # Whether ``deliver`` has failed.
        self.deaf = False
        self.submitted = time.monotonic()
        self.admitted: float | None = None
        self.answered: float | None = None
        self.guesses = Guesses(self.seen)
        self._deliver, self._tokenizer = deliver, tokenizer
        self._generator = torch.Generator()
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed)
        self._echo = TextStream(tokenizer)
        # Words have a space before them where something is.
        begins = not request.echo or tokenizer.decode(request.ids[-1:]) == LINE
        self._text = TextStream(tokenizer, request.stops, begins)

    @property
    def made(self) -> int:
        """Tokens of the answer."""
        return len(self.seen) - len(self.request.ids)

    @property
    def left(self) -> int:
        """Tokens that it may still have."""
        return self.request.max_tokens - self.made

    @property
    def decoding(self) -> bool:
        """Whether its prompt is read."""
        return self.read == len(self.request.ids)

    @property
    def kept(self) -> int:
        """Tokens that its slot has something of: all but the last one made."""
        return self.read + max(0, self.made - 1)

    @property
    def scores_prompt(self) -> bool:
        """Whether logits are needed of every position of the prompt."""
        return self.request.echo and self.request.logprobs is not None

    @property
    def likeliest(self) -> bool:
        """Whether the largest logit is the next token."""
        return self.request.sampling.temperature == 0 and self.request.sampling.repetition_penalty == 1

    def take_prompt(self, tokens: Sequence[int], logits: Tensor) -> None:
        """Note a piece of the prompt as read, and tell it where it is echoed.

        Args:
            tokens: of the piece.
            logits: of every position of it (tokens, V) if the prompt is scored.
        """
        ids, start = self.request.ids, self.read
        self.read += len(tokens)
        if not self.request.echo:
            return
        if start == 0:
            self._tell_echoed(0, None)
        # Of the tokens that follow those of the piece, as far as they are of the prompt.
        for place in range(start + 1, min(self.read + 1, len(ids))):
            self._tell_echoed(place, logits[place - 1 - start] if self.scores_prompt else None)

    def take(self, logits: Tensor, likeliest: int) -> str | None:
        """Add a token to the answer; how it ends, where it does.

        Args:
            logits: (V,), finite, on the CPU.
            likeliest: the first of the largest.
        """
        request = self.request
        if request.max_tokens == 0:
            return "length"
        token = (
            likeliest if self.likeliest else next_token(logits, request.sampling, self.seen, self._generator)
        )
        self.seen.append(token)
        if self.answered is None:
            self.answered = time.monotonic()
        self._tell(Token(token, self._text.push(token), *self._scored(token, logits)))
        if self._text.stopped:
            return "stop"
        return "length" if self.made == request.max_tokens else None

    def finish(self, reason: str) -> None:
        """Say that nothing follows."""
        now = time.monotonic()
        admitted = now if self.admitted is None else self.admitted
        answered = now if self.answered is None else self.answered
        text = self._text.end()
        times = admitted - self.submitted, answered - admitted, now - answered
        self._tell(Finished(reason, text, *times))

    def _tell_echoed(self, place: int, logits: Tensor | None) -> None:
        token = self.request.ids[place]
        text = self._echo.push(token)
        if place == len(self.request.ids) - 1:
            text += self._echo.end()
        scored = (None, ()) if logits is None else self._scored(token, logits)
        self._tell(Token(token, text, *scored, echoed=True))

    def _scored(self, token: int, logits: Tensor) -> tuple[float | None, tuple[tuple[int, float], ...]]:
        count = self.request.logprobs
        if count is None:
            return None, ()
        scores = logits.log_softmax(0)
        best = scores.topk(min(count, len(scores)))
        likeliest = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return scores[token].item(), likeliest

    def _tell(self, event: Event) -> None:
        if self.deaf:
            return
        try:
            self._deliver(event)
        except Exception:  # noqa: BLE001 - whoever asked is not there to be told
            self.deaf = True
