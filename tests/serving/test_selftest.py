"""The self-test finds what depends on company, and the engine's arithmetic does not."""

from __future__ import annotations

import pytest
import torch
from support.configs import VOCAB, small_sizes, stage_config

from muse.models import build_model
from muse.serving import decoder as decoder_module
from muse.serving.decoder import SlotDecoder
from muse.serving.selftest import settle


def decoder(stage="1", slots=9, window=100, width=None, **options):
    sizes = small_sizes(VOCAB, window, **(width or {"kv_heads": 2}))
    model = build_model(stage_config(stage, **options), sizes, VOCAB, seed=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7)
    return SlotDecoder(model, slots, window)


STAGES = [{"stage": stage} for stage in ("0", "1", "2", "3")]
MERA = [{"stage": "3", "mera": mera} for mera in ("add", "replace")]


def named(options):
    return "-".join(options.values())


@pytest.mark.parametrize("slots", [1, 2, 32])
@pytest.mark.parametrize("options", [*STAGES, *MERA, {"stage": "3a"}], ids=named)
def test_company_does_not_matter(options, slots):
    tested = decoder(slots=slots, **options)
    assert settle(tested)
    assert not tested.whole
    for slot in range(slots):
        assert all((part == 0).all() for part in tested.kept(slot, tested.window))


@pytest.mark.parametrize(
    "width",
    [
        {"d_model": 96, "heads": 4, "kv_heads": 4, "d_ff": 384},
        {"d_model": 20, "heads": 5, "kv_heads": 1, "d_ff": 13},
        {"d_model": 18, "heads": 3, "kv_heads": 3, "d_ff": 21},
    ],
    ids=lambda width: str(width["d_model"]),
)
@pytest.mark.parametrize("options", [*STAGES, *MERA], ids=named)
def test_nor_does_it_with_odd_widths(options, width):
    assert settle(decoder(slots=32, window=70, width=width, **options))


def with_rows(change):
    """Scores that ``change`` makes of how many rows there are."""

    def scores(self, state, out=None):
        normal = self._norm.of(state)
        return (normal @ self._head.t()).mul_(change(len(state)))

    return scores


def test_what_depends_on_the_number_of_rows_is_computed_with_all(monkeypatch):
    monkeypatch.setattr(SlotDecoder, "_scores", with_rows(lambda rows: 1 + 1e-6 * (rows == 4)))
    tested = decoder()
    assert settle(tested)
    assert tested.whole


def test_what_depends_on_the_others_is_found(monkeypatch):
    def scores(self, state, out=None):
        normal = self._norm.of(state)
        return normal @ self._head.t() + 1e-6 * normal.mean()

    monkeypatch.setattr(SlotDecoder, "_scores", scores)
    tested = decoder()
    assert not settle(tested)
    assert not tested.whole


def test_what_depends_on_the_others_length_is_computed_with_all(monkeypatch):
    found = decoder_module.mask_of
    monkeypatch.setattr(
        decoder_module,
        "mask_of",
        lambda positions, keys, window: (
            found(positions, keys, window) + 0.5 * torch.arange(keys) * (keys > 32)
        ),
    )
    tested = decoder()
    assert settle(tested)
    assert tested.whole
