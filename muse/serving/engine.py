"""Continuous batching over the slots of a static cache, in one thread that owns the model."""

from __future__ import annotations

import atexit
import itertools
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from muse.errors import ConfigError
from muse.serving.decoder import SlotDecoder
from muse.serving.requests import Draining, Event, QueueFull, Request
from muse.serving.selftest import settle
from muse.serving.work import Work
from muse.trained import Trained

log = logging.getLogger(__name__)

# Tokens of a prompt that are read together, from its start on, whatever else there is to do.
PIECE = 64
# Tokens of prompts that are read between two steps, about; answers under way wait for them.
READ = 512
# Seconds between two signs of life of an engine without work.
IDLE = 0.5
# Requests of late that throughput is taken of, and bounds of what is told of it, in seconds.
RECENT = 64
SOONEST, LATEST = 0.1, 60.0
# Seconds that a step may take when all else has ended.
STEP = 5.0


@dataclass
class EngineState:
    """What ``/metrics`` and the line in a terminal read; a copy, made under no lock.

    Attributes:
        running: requests in slots.
        waiting: in the queue.
        slots: there are.
        heartbeat: ``time.monotonic()`` of the last step, or of the last look at an empty queue.
        alive: whether the engine's thread runs.
        draining: whether requests are refused.
        invariant: whether the self-test found answers equal to the last bit in any company.
        steps: taken.
        rows: decoded tokens over all steps.
        guessed: tokens that steps were given before they were known.
        guessed_right: those of them that were decoded.
        prompt_tokens: read.
        generated_tokens: made.
        nonfinite: requests that ended by a logit that is no number.
    """

    running: int
    waiting: int
    slots: int
    heartbeat: float
    alive: bool
    draining: bool
    invariant: bool
    steps: int
    rows: int
    guessed: int
    guessed_right: int
    prompt_tokens: int
    generated_tokens: int
    nonfinite: int


class Engine:
    """Answers requests; every method may be called from any thread.

    A prompt is read in pieces that depend on it alone, and then one step decodes a token of every request
    that has a slot. Requests are in the first slots, so that a step has few more rows than there are
    requests.

    Where a greedy request's text repeats itself, a step has rows for tokens that may come next. Each is
    computed as if it were known, and counts where it is what the model says, so a guess changes no bit.

    Args:
        trained: model, tokenizer and options.
        slots: requests decoded at a time.
        queue: requests that may wait.
        guesses: tokens that a step guesses, at most; it has no more rows than one beyond them, then, so that
            guesses end where many requests are decoded. 0 for none.

    Attributes:
        on_step: told of each step the seconds that it took and its rows, in the engine's thread; set before
            the first request.

    Raises:
        ConfigError: the model has no tokenizer, or is of a kind that cannot be served.
    """

    def __init__(self, trained: Trained, slots: int = 32, queue: int = 256, guesses: int = 3) -> None:
        if trained.tokenizer is None:
            raise ConfigError("the model has no tokenizer, without which there is no text to serve")
        self._tokenizer, self._window = trained.tokenizer, trained.config.model.seq_len
        self._decoder = SlotDecoder(trained.model, slots, self._window)
        self._slots, self._queue = slots, queue
        # A step of one request has three to spare.
        self._most_rows = min(guesses + 1, self._decoder.rows) if self._decoder.takes_back else 0
        self.on_step: Callable[[float, int], None] = lambda seconds, rows: None
        self._numbers = itertools.count()
        # Held to change what is waiting, running, cancelled or draining.
        self._changed = threading.Condition()
        self._waiting: deque[Work] = deque()
        # In the order of their slots.
        self._running: list[Work] = []
        self._cancelled: set[int] = set()
        self._deadline: float | None = None
        self._ends: deque[float] = deque(maxlen=RECENT)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._over = False
        self._heartbeat = time.monotonic()
        self._invariant = False
        self._guessed = self._guessed_right = 0
        self._steps = self._rows = self._prompt_tokens = self._generated_tokens = self._nonfinite = 0

    def start(self) -> None:
        """Start the thread, warm up and run the self-test; returns when requests can come.

        Raises:
            RunError: the self-test found logits that are no numbers.
        """
        # A thread that is cut off in the middle of a product takes the process with it.
        atexit.register(self.drain, 0)
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> int:
        """Ask for an answer; its number. ``deliver`` is called in the engine's thread and must not wait.

        Raises:
            QueueFull, Draining: it is not taken.
        """
        assert request.ids, "no prompt"
        assert len(request.ids) + request.max_tokens <= self._window, "beyond the window"
        assert all(0 <= token < self._decoder.vocabulary for token in request.ids), "no token"
        work = Work(next(self._numbers), request, deliver, self._tokenizer)
        with self._changed:
            if self._over or self._deadline is not None:
                raise Draining
            if len(self._waiting) + len(self._running) >= self._slots + self._queue:
                raise QueueFull(self._retry_after())
            self._waiting.append(work)
            self._changed.notify_all()
        return work.number

    def cancel(self, number: int) -> None:
        """End a request: its slot is free in the next step. One that has ended is left alone."""
        with self._changed:
            self._cancelled.add(number)
            self._changed.notify_all()

    def state(self) -> EngineState:
        """What it does now."""
        return EngineState(
            running=len(self._running),
            waiting=len(self._waiting),
            slots=self._slots,
            heartbeat=self._heartbeat,
            alive=self._thread.is_alive() and not self._over,
            draining=self._deadline is not None,
            invariant=self._invariant,
            steps=self._steps,
            rows=self._rows,
            guessed=self._guessed,
            guessed_right=self._guessed_right,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            nonfinite=self._nonfinite,
        )

    def drain(self, seconds: float) -> None:
        """Take no more requests, end those that run, within a limit; what is left ends as ``draining``."""
        with self._changed:
            self._deadline = time.monotonic() + seconds
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(seconds + STEP)

    def _retry_after(self) -> float:
        ends = list(self._ends)
        each = (time.monotonic() - ends[0]) / len(ends) if ends else 1.0
        return min(LATEST, max(SOONEST, each))

    def _run(self) -> None:
        # Counts for this thread alone. More would sum in an order of their own.
        torch.set_num_threads(1)
        reason = "failed"
        try:
            with torch.inference_mode():
                self._invariant = settle(self._decoder)
                self._started.set()
                while self._wait_for_work():
                    self._take_requests()
                    self._read_prompts()
                    self._step()
            reason = "draining"
        except Exception as error:  # noqa: BLE001 - all that wait must hear of it
            self._tell_of(error)
        finally:
            with self._changed:
                self._over = True
                left = [*self._running, *self._waiting]
                self._running, self._waiting = [], deque()
            for work in left:
                work.finish(reason)
            self._started.set()
            atexit.unregister(self.drain)

    def _tell_of(self, error: Exception) -> None:
        if not self._started.is_set():
            self._error = error
            return
        where = traceback.extract_tb(error.__traceback__)[-1]
        # Not the message, which could have a prompt in it.
        log.error("the engine ended: %s in %s, line %s", type(error).__name__, where.filename, where.lineno)

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do; whether there ever will be."""
        with self._changed:
            while True:
                self._heartbeat = time.monotonic()
                some = bool(self._waiting or self._running)
                if self._deadline is not None and (not some or self._heartbeat >= self._deadline):
                    return False
                if some or self._cancelled:
                    return True
                self._changed.wait(IDLE)

    def _take_requests(self) -> None:
        """Leave out what was cancelled, and give free slots to what waits."""
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
            ended = [work for work in self._waiting if work.number in cancelled]
            for work in ended:
                self._waiting.remove(work)
        for work in ended:
            work.finish("cancelled")
        self._release(
            {
                slot: "cancelled"
                for slot, work in enumerate(self._running)
                if work.deaf or work.number in cancelled
            }
        )
        with self._changed:
            while self._waiting and len(self._running) < self._slots:
                work = self._waiting.popleft()
                work.admitted = time.monotonic()
                self._running.append(work)

    def _release(self, reasons: dict[int, str]) -> None:
        """End the requests in slots; those behind them move up."""
        for slot in sorted(reasons, reverse=True):
            work, last = self._running[slot], len(self._running) - 1
            # One more, of a step whose token was none.
            self._decoder.clear(slot, work.kept + 1)
            with self._changed:
                behind = self._running.pop()
                if slot != last:
                    self._running[slot] = behind
            if slot != last:
                self._decoder.move(last, slot, behind.kept)
            self._ends.append(time.monotonic())
            work.finish(reasons[slot])

    def _read_prompts(self) -> None:
        left, ended = READ, {}
        for slot, work in sorted(enumerate(self._running), key=lambda pair: pair[1].number):
            while not work.decoding and left > 0:
                tokens = work.request.ids[work.read : work.read + PIECE]
                logits = self._decoder.read(slot, work.read, tokens, work.scores_prompt).cpu()
                self._heartbeat = time.monotonic()
                self._prompt_tokens += len(tokens)
                left -= len(tokens)
                if not logits.isfinite().all():
                    work.read += len(tokens)
                    ended[slot] = "nonfinite"
                    break
                work.take_prompt(tokens, logits)
                if work.decoding and (reason := self._answer(work, logits[-1], int(logits[-1].argmax()))):
                    ended[slot] = reason
        self._finish(ended)

    def _step(self) -> None:
        """Decode a token of every request whose prompt is read."""
        decoding = [work.decoding for work in self._running]
        if not any(decoding):
            return
        began = time.perf_counter()
        lengths = [work.kept if work.decoding else -1 for work in self._running]
        tokens = [work.seen[-1] for work in self._running]
        guesses = self._guesses(decoding)
        slots = list(range(len(tokens)))
        # Of each slot its row, and those of what is guessed to come next.
        rows = [[slot] for slot in slots]
        for slot, guess in guesses:
            lengths.append(lengths[slot] + len(rows[slot]))
            rows[slot].append(len(tokens))
            tokens.append(guess)
            slots.append(slot)
        logits = self._decoder.step(tokens, lengths, slots if guesses else None).cpu()
        if guesses and not logits.isfinite().all():
            # Behind a mask, too, what is no number spreads, here from a guess.
            for own in rows:
                self._decoder.take_back(slots[own[0]], lengths[own[0]] + 1, lengths[own[-1]] + 1)
            guesses, count = [], len(rows)
            rows, tokens, lengths = [[slot] for slot in range(count)], tokens[:count], lengths[:count]
            logits = self._decoder.step(tokens, lengths).cpu()
        # One pass: a sum of finite logits is finite.
        finite, likeliest = logits.sum(1).isfinite().tolist(), logits.numpy().argmax(1).tolist()
        ended, decoded = {}, 0
        for slot, work in enumerate(self._running):
            if not decoding[slot]:
                continue
            reason = None
            for number, row in enumerate(rows[slot]):
                if number and (reason is not None or work.seen[-1] != tokens[row]):
                    break
                reason = self._answer(work, logits[row], likeliest[row]) if finite[row] else "nonfinite"
                decoded += 1
                self._guessed_right += number > 0
            if len(rows[slot]) > 1:
                self._decoder.take_back(slot, work.kept, lengths[rows[slot][-1]] + 1)
            if reason is not None:
                ended[slot] = reason
        self._steps += 1
        self._rows += decoded
        self._guessed += len(guesses)
        self.on_step(time.perf_counter() - began, decoded)
        self._finish(ended)

    def _guesses(self, decoding: list[bool]) -> list[tuple[int, int]]:
        """Slots and tokens that may come next there, in turn, for the rows that are free."""
        free = self._most_rows - len(decoding)
        if free <= 0:
            return []
        each = {
            slot: work.guesses.next(min(free, work.left - 1))
            for slot, work in enumerate(self._running)
            if decoding[slot] and work.likeliest
        }
        turns = itertools.zip_longest(*([(slot, token) for token in found] for slot, found in each.items()))
        return [guess for turn in turns for guess in turn if guess is not None][:free]

    def _answer(self, work: Work, logits: Tensor, likeliest: int) -> str | None:
        made = work.made
        reason = work.take(logits, likeliest)
        self._generated_tokens += work.made - made
        return reason

    def _finish(self, ended: dict[int, str]) -> None:
        self._nonfinite += sum(reason == "nonfinite" for reason in ended.values())
        self._release(ended)
