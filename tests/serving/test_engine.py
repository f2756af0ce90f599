"""The engine: the same answers in any company, one request at a time as by hand, and how requests end."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from dataclasses import dataclass, field

import pytest
import torch
from support.configs import small_sizes, stage_config
from support.trained import make_trained
from support.waiting import PATIENCE, wait_until

import muse
from muse.config import TokenizerConfig
from muse.data import load_tokens
from muse.errors import ConfigError, RunError
from muse.generation import GREEDY, Sampling, TextStream, continuation
from muse.models import build_model
from muse.serving.engine import PIECE, Engine
from muse.serving.requests import Draining, Finished, QueueFull, Request, Token
from muse.trained import Trained

WINDOW = 160


@dataclass
class Answer:
    """What was delivered of one request."""

    tokens: list[Token] = field(default_factory=list)
    finished: Finished | None = None
    over: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event):
        assert self.finished is None, "something follows the end"
        if isinstance(event, Token):
            self.tokens.append(event)
            self.begun.set()
        else:
            self.finished = event
            self.over.set()

    def wait(self):
        assert self.over.wait(PATIENCE), "it hangs"
        return self

    @property
    def ids(self):
        return [token.id for token in self.tokens]

    @property
    def text(self):
        return "".join(token.text for token in self.tokens) + self.finished.text

    @property
    def told(self):
        """All but how long it took."""
        return self.tokens, self.finished.reason, self.finished.text


class Held(Answer):
    """Keeps the engine at its first token until it may go on."""

    def __init__(self):
        super().__init__()
        self.go = threading.Event()

    def __call__(self, event):
        super().__call__(event)
        assert self.go.wait(PATIENCE)


def ask(engine, *requests):
    answers = [Answer() for _ in requests]
    for request, answer in zip(requests, answers, strict=True):
        engine.submit(request, answer)
    return answers


def answer_of(engine, request):
    return ask(engine, request)[0].wait()


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, 250, (length,), generator=generator).tolist())


@pytest.fixture(scope="module", params=[("1", "none"), ("2", "none"), ("3", "none"), ("3", "add")])
def trained(request, tmp_path_factory):
    stage, mera = request.param
    folder, *_ = make_trained(tmp_path_factory.mktemp("run"), stage, seq_len=WINDOW, mera=mera)
    return muse.load(folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return muse.load(make_trained(tmp_path_factory.mktemp("one"), "1", seq_len=WINDOW)[0])


@pytest.fixture
def start():
    """Starts engines, and ends them."""
    engines = []

    def begin(trained, *arguments, **options):
        engines.append(Engine(trained, *arguments, **options))
        engines[-1].start()
        return engines[-1]

    yield begin
    for engine in engines:
        engine.drain(0)


SAMPLED = Sampling(temperature=1.5, top_k=0)
REQUESTS = [
    Request(prompt(1), 20, GREEDY, logprobs=3),
    Request(prompt(PIECE + 5, 1), 40, SAMPLED, seed=5, logprobs=2),
    Request(prompt(2 * PIECE, 2), 9, GREEDY, logprobs=0, echo=True),
    Request(prompt(30, 3), 70, Sampling(top_k=5, repetition_penalty=1.3), seed=1, logprobs=1),
    Request(prompt(7, 4), 50, SAMPLED, seed=2, logprobs=20),
]


@pytest.fixture(scope="module")
def alone(trained):
    """Each answer by an engine that has no other request."""
    engine = Engine(trained, 9)
    engine.start()
    assert engine.state().invariant
    found = [answer_of(engine, request).told for request in REQUESTS]
    engine.drain(0)
    return found


def test_company_slot_and_order_change_no_bit(trained, alone, start):
    engine = start(trained, 9)
    for order in (range(5), reversed(range(5)), (2, 4, 0, 3, 1)):
        others = [
            Request(prompt(1 + 13 * n, 50 + n), 5 + 7 * n, SAMPLED, None if n % 2 else n) for n in range(6)
        ]
        order, answers = list(order), {}
        for number, other in zip(order, others, strict=False):
            ask(engine, other)
            answers[number] = ask(engine, REQUESTS[number])[0]
        for number in order:
            assert answers[number].wait().told == alone[number]
    assert engine.state().nonfinite == 0


def test_neighbours_that_go_change_no_bit(trained, alone, start):
    engine = start(trained, 9)
    held = Held()
    engine.submit(Request(prompt(3, 7), 100, SAMPLED), held)
    held.begun.wait(PATIENCE)
    gone = []
    answers = []
    for request in REQUESTS:
        other = Answer()
        gone.append((engine.submit(Request(prompt(9, 8), WINDOW - 9, SAMPLED), other), other))
        answers.extend(ask(engine, request))
    held.go.set()
    for (number, other), answer in zip(gone[:3], answers, strict=False):
        assert other.begun.wait(PATIENCE)
        engine.cancel(number)
        answer.wait()
    assert [answer.wait().told for answer in answers] == alone


@pytest.mark.parametrize("stage", ["0", "1", "2", "3", "3a"])
def test_guesses_change_no_bit(stage, tmp_path, start):
    trained = muse.load(make_trained(tmp_path, stage, seq_len=WINDOW)[0])
    plain, guessing = start(trained, 4, guesses=0), start(trained, 4, guesses=7)
    requests = [Request((9, 8, 7) * n, 3 + 40 * n, GREEDY, logprobs=2) for n in (1, 2, 3)]
    wanted = [answer_of(plain, request).told for request in requests]
    assert [answer_of(guessing, request).told for request in requests] == wanted
    assert [answer.wait().told for answer in ask(guessing, *requests)] == wanted
    assert plain.state().guessed == 0
    state = guessing.state()
    # Random weights repeat themselves: what was guessed right took no step of its own.
    assert (0 < state.guessed_right <= state.guessed) == (stage != "3")
    assert state.rows == 2 * plain.state().rows
    if stage != "3":
        assert state.steps <= state.rows - state.guessed_right


def test_a_guess_that_is_no_number_harms_nobody(tmp_path, start, monkeypatch):
    trained = muse.load(make_trained(tmp_path, "1", seq_len=WINDOW, tied=False)[0])
    wanted = answer_of(start(trained, 1, guesses=0), Request(prompt(3), 60, GREEDY, logprobs=1))
    unused = next(token for token in range(250, 290) if token not in (*prompt(3), *wanted.ids))
    engine = start(poisoned(trained, unused), 1, guesses=3)
    monkeypatch.setattr(engine, "_guesses", lambda decoding: [(0, unused)])
    answer = answer_of(engine, Request(prompt(3), 60, GREEDY, logprobs=1))
    assert answer.told == wanted.told


@pytest.mark.parametrize(
    ("stage", "options"),
    [("0", {}), ("1", {}), ("2", {}), ("3", {}), ("3", {"mera": "replace"}), ("3a", {})],
    ids=lambda part: part if isinstance(part, str) else "-".join(part.values()),
)
def test_greedy_answers_are_those_of_the_model_itself(stage, options, tmp_path, start):
    trained = muse.load(make_trained(tmp_path, stage, seq_len=WINDOW, **options)[0])
    engine = start(trained, 4)
    assert engine.state().invariant
    requests = [Request(prompt(length, length), 30, GREEDY) for length in (1, 3, PIECE, PIECE + 20, 25)]
    for request, answer in zip(requests, ask(engine, *requests), strict=True):
        offline = list(continuation(trained.model, request.ids, 30, WINDOW, GREEDY))
        assert answer.wait().ids == offline
        stream = TextStream(trained.tokenizer)
        assert answer.text == "".join(map(stream.push, offline)) + stream.end()
        assert answer.finished.reason == "length"


def test_a_seed_gives_the_text_of_the_model_itself(one, start):
    engine = start(one, 4)
    request = Request(prompt(5), 40, SAMPLED, seed=3)
    offline = list(continuation(one.model, request.ids, 40, WINDOW, SAMPLED, seed=3))
    free = [Request(prompt(5), 40, SAMPLED)] * 3
    first, *others = ask(engine, request, *free)
    assert first.wait().ids == offline
    assert len({tuple(answer.wait().ids) for answer in [first, *others]}) == 4


def test_model_stored_in_bfloat16_answers_as_in_float32(tmp_path, start):
    trained = muse.load(make_trained(tmp_path, "1", seq_len=WINDOW, precision="bf16")[0])
    answer = answer_of(start(trained, 4), Request(prompt(5), 40, GREEDY))
    trained.model.float()
    assert answer.ids == list(continuation(trained.model, prompt(5), 40, WINDOW, GREEDY))


def test_scores_are_those_of_the_forward_pass(one, start):
    ids = prompt(PIECE + 9)
    request = Request(ids, 5, GREEDY, logprobs=4, echo=True)
    answer = answer_of(start(one, 4), request)
    text = [token.id for token in answer.tokens]
    assert tuple(text[: len(ids)]) == ids
    assert [token.echoed for token in answer.tokens] == [True] * len(ids) + [False] * 5
    with torch.no_grad():
        scores = one.model(torch.tensor([text]))[0].log_softmax(-1)
    first, *others = answer.tokens
    assert (first.logprob, first.likeliest) == (None, ())
    for place, token in enumerate(others):
        assert token.logprob == pytest.approx(scores[place, token.id].item(), abs=1e-4)
        best = scores[place].topk(4)
        assert [index for index, _ in token.likeliest] == best.indices.tolist()
        assert [score for _, score in token.likeliest] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert (
        answer.text
        == one.tokenizer.decode(ids)
        + "".join(token.text for token in answer.tokens[len(ids) :])
        + answer.finished.text
    )
    only = answer_of(start(one, 4), Request(ids, 0, GREEDY, logprobs=4, echo=True))
    assert only.tokens == answer.tokens[: len(ids)]
    assert only.finished.reason == "length"
    plain = answer_of(start(one, 4), Request(ids, 0, GREEDY, echo=True))
    assert plain.ids == list(ids)
    assert {token.logprob for token in plain.tokens} == {None}


def test_stops_across_tokens_end_the_text_and_the_work(one, start):
    engine = start(one, 4)
    request = Request(tuple(one.tokenizer.encode("Line 3 says")), 60, Sampling(5.0, 0), seed=2)
    whole = answer_of(engine, request)
    shown = [token.text for token in whole.tokens]
    # Of two tokens that both show something, and not of what was shown before.
    stop = next(
        stop
        for first, second in itertools.pairwise(shown[10:])
        if first and second and whole.text.index(stop := first[-1] + second[0]) >= len("".join(shown[:10]))
    )
    answer = answer_of(engine, dataclasses.replace(request, stops=("never there", stop)))
    assert answer.finished.reason == "stop"
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert 10 <= len(answer.tokens) < 60
    # What could have begun a stop, and did not, comes at the end.
    held = answer_of(engine, dataclasses.replace(request, stops=(whole.text[-1] + "never there",)))
    assert held.text == whole.text
    assert held.finished.text[-1] == whole.text[-1]


def test_characters_between_tokens_come_whole(tmp_path, start):
    run, *_ = make_trained(tmp_path, "1", seq_len=WINDOW)
    trained = muse.load(run)
    with torch.no_grad():
        trained.model.embedding.weight.zero_()
    engine = start(trained, 4)
    ids = tuple(trained.tokenizer.encode("né €"))
    answer = answer_of(engine, Request(ids, 0, GREEDY, echo=True))
    assert answer.text == "né €"
    assert "" in [token.text for token in answer.tokens]
    assert "\ufffd" not in answer.text


def test_word_tokens_are_echoed_with_their_spaces(one, start):
    words = load_tokens(one.config.data, TokenizerConfig(name="word"), 300).tokenizer
    sizes = small_sizes(words.vocab_size, WINDOW)
    engine = start(Trained(build_model(stage_config(1), sizes, words.vocab_size), words, one.config), 4)
    for text in ("Line 3", "Line 3 says\n"):
        ids = tuple(words.encode(text))
        echoed, plain = ask(engine, Request(ids, 3, GREEDY, echo=True), Request(ids, 3, GREEDY))
        assert plain.wait().text == words.decode(plain.ids)
        assert echoed.wait().text == words.decode([*ids, *plain.ids])


def test_a_cancelled_request_frees_its_slot(one, start):
    engine = start(one, 1, 1)
    held = Held()
    number = engine.submit(Request(prompt(3), 100, GREEDY), held)
    assert held.begun.wait(PATIENCE)
    waiting, never = Answer(), Answer()
    engine.submit(Request(prompt(4), 2, GREEDY), waiting)
    with pytest.raises(QueueFull) as full:
        engine.submit(Request(prompt(4), 2, GREEDY), never)
    assert 0 < full.value.retry_after <= 60
    state = engine.state()
    assert (state.running, state.waiting, state.slots) == (1, 1, 1)
    engine.cancel(number)
    steps = engine.state().steps
    held.go.set()
    assert held.wait().finished.reason == "cancelled"
    # The prompt's token, that of a step that may have been under way, and no more.
    assert len(held.tokens) <= 2
    assert waiting.wait().finished.reason == "length"
    assert len(waiting.tokens) == 2
    assert engine.state().steps <= steps + 2
    engine.cancel(number)
    engine.cancel(10**6)
    assert answer_of(engine, Request(prompt(4), 2, GREEDY)).told == waiting.told
    assert not never.tokens


def test_cancelled_while_it_waits(one, start):
    engine = start(one, 1, 2)
    held = Held()
    engine.submit(Request(prompt(3), 5, GREEDY), held)
    assert held.begun.wait(PATIENCE)
    waiting = Answer()
    engine.cancel(engine.submit(Request(prompt(4), 2, GREEDY), waiting))
    held.go.set()
    assert waiting.wait().finished.reason == "cancelled"
    assert waiting.tokens == []
    assert len(held.wait().tokens) == 5


def test_who_cannot_be_told_is_cancelled_alone(one, start):
    engine = start(one, 4)
    told = []

    def broken(event):
        told.append(event)
        raise ValueError("nobody is there")

    engine.submit(Request(prompt(3), 100, GREEDY), broken)
    assert len(answer_of(engine, Request(prompt(5), 30, GREEDY)).tokens) == 30
    wait_until(lambda: engine.state().running == 0)
    assert len(told) == 1
    assert engine.state().alive


def test_drain_lets_what_runs_end(one, start):
    engine = start(one, 2, 9)
    held = Held()
    engine.submit(Request(prompt(3), 30, GREEDY), held)
    assert held.begun.wait(PATIENCE)
    others = ask(engine, *[Request(prompt(4), 5, GREEDY)] * 4)
    draining = threading.Thread(target=engine.drain, args=(PATIENCE,))
    draining.start()
    wait_until(lambda: engine.state().draining)
    with pytest.raises(Draining):
        engine.submit(Request(prompt(3), 5, GREEDY), Answer())
    held.go.set()
    assert [len(answer.wait().tokens) for answer in [held, *others]] == [30, 5, 5, 5, 5]
    draining.join(PATIENCE)
    assert not engine.state().alive


def test_drain_ends_what_is_left_at_its_limit(one, start):
    engine = start(one, 1, 9)
    held = Held()
    engine.submit(Request(prompt(3), 100, GREEDY), held)
    assert held.begun.wait(PATIENCE)
    (waiting,) = ask(engine, Request(prompt(4), 5, GREEDY))
    draining = threading.Thread(target=engine.drain, args=(0,))
    draining.start()
    wait_until(lambda: engine.state().draining)
    held.go.set()
    assert [answer.wait().finished.reason for answer in (held, waiting)] == ["draining"] * 2
    draining.join(PATIENCE)
    assert len(held.tokens) < 100


def poisoned(trained, token):
    """A model whose logits are no numbers after one token."""
    with torch.no_grad():
        trained.model.embedding.weight[token] = float("nan")
    return trained


@pytest.mark.parametrize("stage", ["1", "3"])
def test_logits_that_are_no_numbers_end_one_request(stage, tmp_path, start):
    trained = muse.load(make_trained(tmp_path, stage, seq_len=WINDOW, tied=False)[0])
    sound = start(trained, 3)
    requests = [Request(prompt(length, 60), 30, GREEDY, logprobs=1) for length in (3, PIECE + 5, 9)]
    requests = [
        Request(tuple(token if token != 260 else 1 for token in request.ids), 30, GREEDY, logprobs=1)
        for request in requests
    ]
    wanted = [answer_of(sound, request) for request in requests]
    unused = next(token for token in range(250, 290) if all(token not in answer.ids for answer in wanted))
    engine = start(poisoned(trained, unused), 3)
    for ids in ((unused,), (*prompt(PIECE), unused), (unused, *prompt(PIECE))):
        bad = ask(engine, Request(ids, 5, GREEDY))[0]
        answers = ask(engine, *requests)
        assert bad.wait().finished.reason == "nonfinite"
        assert [answer.wait().told for answer in answers] == [answer.told for answer in wanted]
    state = engine.state()
    assert (state.nonfinite, state.alive) == (3, True)


@pytest.mark.parametrize(("stage", "mera"), [("1", "none"), ("3", "none"), ("3", "add")])
def test_a_slot_is_clean_after_what_was_no_number(stage, mera, tmp_path, start):
    """Also what a step wrote there before its logits were seen to be none."""
    trained = muse.load(make_trained(tmp_path, stage, seq_len=WINDOW, tied=False, mera=mera)[0])
    sound = start(trained, 1)
    long, short = (Request(prompt(length, 70), 12, SAMPLED, seed=1) for length in (20, 3))
    answered, wanted = answer_of(sound, long), answer_of(sound, short)
    # A token of the first answer that nothing else has.
    others = {*long.ids, *short.ids, *wanted.ids, *range(9)}
    at, token = next((at, token) for at, token in enumerate(answered.ids[:-1]) if token not in others)
    engine = start(poisoned(trained, token), 1)
    broken = answer_of(engine, long)
    assert broken.finished.reason == "nonfinite"
    assert broken.tokens == answered.tokens[: at + 1]
    assert answer_of(engine, short).told == wanted.told


def test_damaged_weights_are_told_at_the_start(one, tmp_path, start):
    trained = muse.load(make_trained(tmp_path, "1", seq_len=WINDOW)[0])
    with torch.no_grad():
        trained.model.blocks[0].ffn.up.weight[0, 0, 0] = float("inf")
    with pytest.raises(RunError, match="not finite"):
        Engine(trained, 2).start()


def test_the_end_of_the_thread_is_told_to_all(one, start, caplog):
    def fail(seconds, rows):
        raise OSError(f"secret {rows}")

    engine = start(one, 1, 9)
    engine.on_step = fail
    answers = ask(engine, *[Request(prompt(4), 5, GREEDY)] * 3)
    assert [answer.wait().finished.reason for answer in answers] == ["failed"] * 3
    wait_until(lambda: not engine.state().alive)
    with pytest.raises(Draining):
        engine.submit(Request(prompt(4), 5, GREEDY), Answer())
    engine.drain(0)
    assert "OSError" in caplog.text
    assert "secret" not in caplog.text


def test_what_it_tells_of_itself(one, start):
    steps: list[int] = []
    engine = start(one, 4)
    engine.on_step = lambda seconds, rows: steps.append(rows)
    before = engine.state()
    wait_until(lambda: engine.state().heartbeat > before.heartbeat)
    assert (before.alive, before.draining, before.running, before.waiting) == (True, False, 0, 0)
    answers = ask(engine, Request(prompt(4), 5, GREEDY), Request(prompt(PIECE), 9, GREEDY))
    times = [answer.wait().finished for answer in answers]
    state = engine.state()
    assert (state.prompt_tokens, state.generated_tokens) == (4 + PIECE, 14)
    # The first token of each is the prompt's.
    assert (state.rows, state.steps) == (12, len(steps))
    assert sum(steps) == 12
    assert all(min(end.queue, end.prefill, end.decode) >= 0 for end in times)


def test_no_tokenizer_is_one_sentence(one):
    with pytest.raises(ConfigError, match="has no tokenizer"):
        Engine(one._replace(tokenizer=None))
