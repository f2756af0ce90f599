"""What a selection leaves out of a text, and what it keeps of each document."""

import dataclasses

import numpy as np
import pytest
import torch
from support.commands import default_stage

from muse.benchmarks import selection
from muse.benchmarks.results import Results
from muse.benchmarks.suite import check_benchmark, settled
from muse.config import DataConfig, TokenizerConfig
from muse.data import load_tokens
from muse.errors import ConfigError
from muse.options import changed

CPU = torch.device("cpu")
LENGTH = 16
# By name, so many words; a word has two to four tokens.
WORDS = {"hard": 900, "long": 2000, "other": 900, "short": 20, "valid": 50, "test": 50}


@pytest.fixture
def config(bench_config, tmp_path, monkeypatch):
    """Of documents of which three have 40 windows or more; options replace those of a group."""
    # So many windows take long.
    monkeypatch.setattr(selection, "SAMPLES_TARGET", 40)
    monkeypatch.setattr(selection, "WINDOWS", 50)
    random = np.random.default_rng(0)
    (tmp_path / "text" / "train").mkdir(parents=True)
    for name, count in WORDS.items():
        words = random.integers(1000, size=count) if name == "hard" else np.arange(count) % 3
        place = tmp_path / "text" / (f"{name}.txt" if name in ("valid", "test") else f"train/{name}.txt")
        place.write_text(" ".join(f"w{word}" for word in words))

    def build(**options):
        built = bench_config(3, name="selection", train_steps=0, batch_size=7, seq_len=LENGTH)
        built = dataclasses.replace(
            built,
            data=DataConfig(name="text", path=str(tmp_path / "text"), cache=str(tmp_path / "cache")),
            tokenizer=TokenizerConfig(name="bpe", vocab_size=260),
        )
        return settled(changed(built, **{"optim": {"selection": "high"}, **options}), "selection")

    return build


def measured(config):
    return selection.measure_selection(config, CPU)


def test_a_share_leaves_out_all_else_and_every_document_keeps_what_the_guard_says(config):
    found = measured(config())
    assert (found["documents"], found["left_out"], found["windows"]) == (3, 1, 3 * 50)
    assert list(found["shares"]) == ["0.2", "0.6"]
    for share, of_share in found["shares"].items():
        # Batches round, and the last one is small.
        assert of_share["filtered"] == pytest.approx(1 - float(share), abs=0.01)
        assert of_share["samples"] == 50
        assert of_share["least"] <= float(share) + 0.01 <= of_share["most"] + 0.02
    assert list(measured(config(optim={"selection": "random", "selection_share": 0.2}))["shares"]) == ["0.2"]


def test_without_a_guard_a_document_may_lose_its_windows(config, monkeypatch):
    """Scored by where a token is, all that is kept is of one document."""

    def scores(self, features, targets, entropy=False):
        # The random words have digits all over.
        losses = (targets.float().std(1, keepdim=True)).expand(targets.shape)
        return losses, losses

    monkeypatch.setattr("muse.models.LanguageModel.token_losses", scores)
    guarded, bare = (
        measured(config(optim={"selection": "high", "selection_guard": guard}))["shares"]["0.2"]
        for guard in (0.25, 0.0)
    )
    assert guarded["samples"] == 50
    assert bare["samples"] < 25
    assert bare["most"] > guarded["most"] > guarded["least"] > bare["least"]
    assert bare["filtered"] == guarded["filtered"]


def test_windows_are_of_the_document_in_which_they_begin(config):
    built = config()
    data = load_tokens(built.data, built.tokenizer, 260)
    starts, documents, _ = selection._windows(data, LENGTH)
    ends = np.flatnonzero(np.asarray(data.train) == data.tokenizer.end_id)
    assert len(ends) == 4
    firsts = [0, *(ends[:-1] + 1)]
    for document, place in ((0, 0), (1, 1), (2, 2)):
        own = starts[documents == document]
        assert len(own) == 50
        assert (own >= firsts[place]).all()
        assert (own <= ends[place]).all()
        assert (own % LENGTH == 0).all()


@pytest.mark.parametrize("kind", ["high", "entropy", "random"])
def test_the_criteria_are_of_a_share_of_a_fifth_and_a_trained_model_may_be_asked(config, tmp_path, kind):
    built = config(optim={"selection": kind}, benchmark={"train_steps": 2})
    results = Results(tmp_path, lambda name, one: measured(one), default_stage)
    selection.judge(built, results)
    values = results.values
    assert results.failures == results.unjudged == {}
    assert values["filter_rate"] == pytest.approx(0.8, abs=0.01)
    # What the documents ask cannot be: a share of 0.2 leaves out 0.8.
    assert values["filter_rate_pass"] is False
    assert (values["selection_samples"], values["selection_samples_pass"]) == (50, True)
    assert set(results.details["selection"]) == {"a share of 0.2", "a share of 0.6"}


def test_where_no_document_is_long_enough_what_is_left_out_is_told_all_the_same(
    config, monkeypatch, tmp_path
):
    monkeypatch.setattr(selection, "SAMPLES_TARGET", 10**6)
    results = Results(tmp_path, lambda name, one: measured(one), default_stage)
    selection.judge(config(), results)
    assert results.values["filter_rate"] == pytest.approx(0.8, abs=0.02)
    assert results.values["selection_samples"] is results.values["selection_samples_pass"] is None
    assert "no document" in results.unjudged["selection_samples"]


def test_what_has_no_selection_or_no_documents_is_refused(config, bench_config):
    with pytest.raises(ConfigError, match=r"benchmark=selection needs optim\.selection=high or "):
        check_benchmark(bench_config(3, name="selection"), ())
    with pytest.raises(ConfigError, match="it needs stage=3"):
        check_benchmark(bench_config(2, name="selection"), ())
    check_benchmark(config(), ())
    with pytest.raises(ConfigError, match="tokenizer=word does not tell where documents end"):
        measured(config(tokenizer={"name": "word"}))
    with pytest.raises(ConfigError, match="no window of 9999 tokens"):
        measured(config(benchmark={"seq_len": 9999}))
    with pytest.raises(ConfigError, match="needs text"):
        measured(config(data={"name": "synthetic", "path": None}))
