"""Training on documents: what a step's loss is, and that a run goes on with the very windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import configs
from support.configs import SEQ_LEN, VOCAB, document_data, stage_config, token_data
from support.runs import CrashError, contents, crash_at, same
from support.training import Recorder, run_train

from muse.config import DataConfig, OptimConfig, RunConfig
from muse.data import Mix, document_batch, packed_text
from muse.errors import ConfigError
from muse.layers.packing import packing_of
from muse.models import build_model
from muse.runs.checkpoints import find_checkpoint
from muse.training import trainer


def run_config(number: str = "3", optim: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    stage = stage_config(number, dropout=0.0, **({} if number in "01" else {"gradient": "backprop"}))
    config = configs.run_config(stage, optim, **train)
    config.data = DataConfig(packing="documents")
    return config


def mixed() -> Any:
    data = document_data()
    return dataclasses.replace(data, train=Mix(("a", "b"), (data.train, document_data(90).train), (2.0, 1.0)))


def test_the_loss_of_a_step_is_the_mean_over_its_targets(tmp_path):
    """However windows of unequal numbers of targets lie in micro-batches."""
    data, log = document_data(), Recorder()
    config = run_config(optim={"accumulation": 3}, steps=4)
    run_train(config, tmp_path, log, data=data)
    model = build_model(config.stage, config.model, VOCAB, config.seed)
    inputs, targets, positions = document_batch(packed_text(data, SEQ_LEN), 0, 6, config.seed)
    counted = (targets >= 0).sum(1)
    assert len(set(counted.tolist())) > 1
    with torch.no_grad():
        total = model.loss(inputs, targets, reduction="sum", packing=packing_of(positions))
    assert log.losses()[1] == pytest.approx((total / counted.sum()).item(), rel=1e-6)
    assert log.lines[0][1]["train/padding"] == pytest.approx(1 - counted.sum().item() / targets.numel())


@pytest.mark.parametrize("number", ["0", "1", "3"])
def test_micro_batches_equal_one_batch(tmp_path, number):
    trained = []
    for pieces in (1, 2, 4):
        config = run_config(number, {"accumulation": pieces, "eps": 1e-3}, batch_size=8 // pieces)
        log, build = Recorder(), trainer.build_model
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "build_model", lambda *given, build=build: build(*given).double())
            model, _ = run_train(config, tmp_path / str(pieces), log, data=document_data())
        trained.append((model, log.losses()))
    (one, losses), *others = trained
    for model, found in others:
        assert found == pytest.approx(losses, rel=1e-12)
        for p, q in zip(one.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def saving_until(step: int) -> Callable[[trainer.Trainer], None]:
    """Save after every step, the last one of which is the end of the process."""

    def save(own: trainer.Trainer) -> None:
        own.save()
        crash_at(step)(own.done)

    return save


@pytest.mark.parametrize("data", [document_data(), mixed()], ids=["a text", "a mix"])
def test_every_step_may_be_the_last_one_of_a_process(tmp_path, data):
    """Within an epoch, at its end and in the next one; lines straddle two processes."""
    config = run_config(optim={"accumulation": 2}, steps=8, checkpoint_every=1)
    config.logger.log_every = 3
    log = Recorder()
    _, undisturbed = run_train(config, tmp_path / "whole", log, data=data)
    checkpoint, lines = None, []
    for step in range(1, 8):
        run, own = tmp_path / str(step), Recorder()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer.Trainer, "save_if_due", saving_until(step))
            with pytest.raises(CrashError):
                run_train(config, run, own, checkpoint, data)
        lines += own.lines
        checkpoint = find_checkpoint(run)
    rest = Recorder()
    _, resumed = run_train(config, tmp_path / "rest", rest, checkpoint, data)
    assert same(contents(undisturbed.checkpoint), contents(resumed.checkpoint))
    padding = [(step, line["train/padding"]) for step, line in log.lines if "train/padding" in line]
    assert [step for step, _ in padding] == [3, 6, 8]
    found = [(step, line["train/padding"]) for step, line in [*lines, *rest.lines] if "train/padding" in line]
    assert found == padding


def test_a_text_ends_with_its_epoch(tmp_path):
    data = document_data()
    config = run_config(steps=100)
    config.data = dataclasses.replace(config.data, at_end="stop")
    _, result = run_train(config, tmp_path, data=data)
    assert result.step == packed_text(data, SEQ_LEN).windows // 2


def test_what_has_no_end_of_text_is_refused(tmp_path):
    of_words = dataclasses.replace(document_data())
    of_words.tokenizer.of_words = True
    for data, named in ((of_words, "tokenizer=word"), (token_data(), "data=synthetic")):
        with pytest.raises(ConfigError, match=f"data.packing=documents needs an end of text .* {named}"):
            run_train(run_config(), tmp_path / named, data=data)


REFUSED = [
    ("stage=3a", {"stage": stage_config("3a")}),
    ("stage.mixer=none", {"stage": stage_config("1", mixer="none")}),
    ("stage.mera=add", {"stage": stage_config("3", mera="add")}),
    ("stage.attention_window=4", {"stage": stage_config("3", attention_window=4)}),
    ("stage.koopman_prediction=0.5", {"stage": stage_config("3", koopman_prediction=0.5)}),
    ("optim.selection=high", {"optim": OptimConfig(selection="high")}),
]


@pytest.mark.parametrize(("named", "options"), REFUSED, ids=[named for named, _ in REFUSED])
def test_what_takes_a_window_for_one_text_is_refused(named, options):
    RunConfig(**options)
    with pytest.raises(ConfigError, match=f"data.packing=documents does not go with {named}") as error:
        RunConfig(**options, data=DataConfig(packing="documents"))
    assert "\n" not in str(error.value)


def test_stream_windows_are_as_they_were(tmp_path):
    """One text from edge to edge: no boundaries, no weights, no figure of padding."""
    config, log = run_config(steps=2), Recorder()
    config.data = DataConfig()
    run_train(config, Path(tmp_path), log, data=document_data())
    assert not any("train/padding" in line for _, line in log.lines)
    batches = trainer._batches(config, document_data(), 0)
    assert all(batch.positions is None and batch.weight is None for batch in batches)
