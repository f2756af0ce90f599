"""Documents in windows: each token once an epoch, from its own document alone, and by the window's number."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from muse.data import (
    Mix,
    PackedText,
    document_batch,
    document_targets,
    end_of_training_text,
    pack,
    packing,
)
from muse.data.packing import best_fit

END, SEQ_LEN = 0, 16


def text(sizes: list[int], ended: bool = True) -> np.ndarray:
    """Documents of so many tokens, their ends included, in which no token but the end comes twice."""
    tokens = np.arange(1, sum(sizes) + 1, dtype=np.uint16)
    tokens[np.cumsum(sizes) - 1] = END
    return tokens if ended else tokens[:-1]


def documents_of(tokens: np.ndarray) -> list[list[int]]:
    """Documents with the end of text before and after each."""
    documents, own = [], [END]
    for token in tokens.tolist():
        own.append(token)
        if token == END:
            documents.append(own)
            own = [END]
    return documents + [own] * (len(own) > 1)


def some_sizes(count: int, longest: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, longest, count).tolist()


TEXTS = {
    "short": text(some_sizes(200, 15)),
    "long": text(some_sizes(20, 100)),
    "mixed": text([1, 1, 16, 17, 32, 33, 3, *some_sizes(100, 40)]),
    "without an end": text([5, 30, 7], ended=False),
    "a single one": text([900]),
    "a single token": np.array([3], dtype=np.uint16),
    "ends alone": np.zeros(40, dtype=np.uint16),
}


def windows_of(packed: PackedText) -> list[tuple[list[int], ...]]:
    return [tuple(part.tolist() for part in packed.window(number)) for number in range(packed.windows)]


def pieces_of(inputs: list[int], targets: list[int], positions: list[int]) -> list[list[int]]:
    """What each piece of a window reads and then predicts last; the padding has none."""
    starts = [place for place, position in enumerate(positions) if position == 0]
    pieces = []
    for start, stop in zip(starts, [*starts[1:], len(positions)], strict=True):
        assert positions[start:stop] == list(range(stop - start))
        if targets[start] < 0:
            assert set(targets[start:stop]) == {-1}
            assert stop == len(positions)
            continue
        assert inputs[start + 1 : stop] == targets[start : stop - 1]
        pieces.append([*inputs[start:stop], targets[stop - 1]])
    return pieces


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("at_once", [7, 1 << 16])
def test_every_token_is_predicted_once_and_after_its_own_document(name, at_once, monkeypatch):
    monkeypatch.setattr(packing, "PACKED_AT_ONCE", at_once)
    monkeypatch.setattr(packing, "LOOKED_AT", 13)
    tokens = TEXTS[name]
    packed = pack(tokens, END, SEQ_LEN)
    found = Counter(tuple(piece) for window in windows_of(packed) for piece in pieces_of(*window))
    wanted = Counter(
        tuple(document[start : start + SEQ_LEN + 1])
        for document in documents_of(tokens)
        for start in range(0, len(document) - 1, SEQ_LEN)
    )
    assert found == wanted
    assert sum(packed.filled(number) for number in range(packed.windows)) == len(tokens) == len(packed)
    assert all(
        packed.filled(number) == sum(target >= 0 for target in window[1])
        for number, window in enumerate(windows_of(packed))
    )


@pytest.mark.parametrize("seed", range(5))
def test_little_is_left_empty(seed):
    packed = pack(text(some_sizes(3000, 12, seed)), END, SEQ_LEN)
    assert packed.windows * SEQ_LEN < 1.01 * len(packed) + SEQ_LEN
    # Two that are at most half full would be one.
    assert sum(packed.filled(number) <= SEQ_LEN // 2 for number in range(packed.windows)) <= 1


def test_the_fullest_bin_that_has_room_is_taken():
    generator = np.random.default_rng(0)
    for _ in range(20):
        lengths, size = generator.integers(1, 11, 60).tolist(), 10
        rooms: list[int] = []
        for length, chosen in zip(lengths, best_fit(lengths, size), strict=True):
            least = min((room for room in rooms if room >= length), default=None)
            if least is None:
                assert chosen == len(rooms)
                rooms.append(size)
            else:
                assert rooms[chosen] == least
            rooms[chosen] -= length


def test_what_is_packed_at_once_has_a_bound(monkeypatch):
    monkeypatch.setattr(packing, "PACKED_AT_ONCE", 50)
    asked: list[int] = []
    monkeypatch.setattr(
        packing, "best_fit", lambda lengths, size: asked.append(len(lengths)) or best_fit(lengths, size)
    )
    packed = pack(TEXTS["short"], END, SEQ_LEN)
    assert asked == [50] * 4
    assert packed.windows * SEQ_LEN < 1.1 * len(packed)


def seen(batches: list[tuple[torch.Tensor, ...]]) -> Counter[int]:
    targets = torch.cat([targets.flatten() for _, targets, _ in batches])
    return Counter(targets[targets >= 0].tolist())


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_an_epoch_has_every_token_once_and_the_next_one_another_order(batch_size):
    packed = pack(TEXTS["mixed"], END, SEQ_LEN)
    epochs, windows = 3, packed.windows
    rows = [
        document_batch(packed, step, batch_size, seed=1) for step in range(-(-epochs * windows // batch_size))
    ]
    inputs, targets, positions = (torch.cat(part)[: epochs * windows] for part in zip(*rows, strict=True))
    orders = targets.view(epochs, windows, SEQ_LEN)
    for epoch in range(epochs):
        own = slice(epoch * windows, (epoch + 1) * windows)
        assert seen([(inputs[own], targets[own], positions[own])]) == Counter(TEXTS["mixed"].tolist())
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[1], orders[2])


def test_a_batch_depends_on_nothing_but_its_number_and_is_cut_into_any_parts():
    packed, other = pack(TEXTS["mixed"], END, SEQ_LEN), pack(TEXTS["mixed"].copy(), END, SEQ_LEN)
    for step in (40, 0, 7):
        whole = document_batch(packed, step, 12, seed=4)
        parts = [document_batch(other, 3 * step + part, 4, seed=4) for part in range(3)]
        for one, cut in zip(whole, zip(*parts, strict=True), strict=True):
            assert (one.dtype, one.is_contiguous()) == (torch.int64, True)
            assert torch.equal(one, torch.cat(cut))
        assert document_targets(packed, 12 * step, 12 * step + 12, seed=4) == (whole[1] >= 0).sum()
    assert not torch.equal(whole[1], document_batch(packed, step, 12, seed=5)[1])


def test_each_source_of_a_mix_has_epochs_of_its_own_and_its_share_of_windows():
    texts = TEXTS["mixed"], TEXTS["short"] + np.uint16(5000) * (TEXTS["short"] != END)
    packed = tuple(pack(tokens, END, SEQ_LEN) for tokens in texts)
    mix = Mix(("a", "b"), packed, (0.7, 0.3))
    assert len(mix) == sum(map(len, texts))
    batches = [document_batch(mix, step, 10, seed=2) for step in range(40)]
    targets = torch.cat([targets for _, targets, _ in batches])
    of_other = (targets >= 5000).any(1)
    assert abs(int(of_other.sum()) - 120) <= 1
    for rows, tokens, own in zip((targets[~of_other], targets[of_other]), texts, packed, strict=True):
        epoch = rows[: own.windows]
        # Windows that hold ends alone look alike.
        assert Counter(epoch[epoch > 0].tolist()) == Counter(tokens[tokens > 0].tolist())
    steps, name = end_of_training_text(mix, 10, SEQ_LEN, 2, 1000) or (0, "")
    number = mix.names.index(name)
    assert mix.windows_of(steps * 10, 2)[number] <= packed[number].windows
    assert mix.windows_of((steps + 1) * 10, 2)[number] > packed[number].windows


def test_a_single_text_ends_with_its_epoch():
    packed = pack(TEXTS["mixed"], END, SEQ_LEN)
    assert end_of_training_text(packed, 4, SEQ_LEN, 0, 10_000) == (packed.windows // 4, "the training split")
