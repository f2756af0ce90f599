"""Trainings that begin with trained weights, and that end early."""

import math
import shutil

import pytest
import torch
from support.commands import WITHOUT_LOG, run_here
from support.configs import run_config, stage_config, write_text
from support.runs import CrashError, crash_at, same, stored
from support.trained import make_trained
from support.training import run_train

import muse
from muse.config import TrainConfig
from muse.errors import ConfigError
from muse.export import export_run
from muse.files import find_files
from muse.runs.checkpoints import find_checkpoint
from muse.training import trainer
from muse.training.evaluate import Evaluation


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_trained(tmp_path_factory.mktemp("trained"), "2", dropout=0.1)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """train.py on another text; its status, what it said, and the folder of the run."""
    (tmp_path / "more").mkdir()
    text = write_text(tmp_path / "more", lines=300)
    monkeypatch.chdir(tmp_path)

    def start(*options):
        given = [
            "data=text", f"data.path={text}", f"data.cache={tmp_path / 'cache'}", "train.steps=2",
            "train.batch_size=2", "train.eval_every=1", "train.checkpoint_every=1", "train.sample_tokens=4",
            "hardware=cpu", "logger=none", "output_root=out", *options, *WITHOUT_LOG,
        ]  # fmt: skip
        before = set(find_files(tmp_path / "out", "run.json"))
        status = run_here("train.py", given)
        new = set(find_files(tmp_path / "out", "run.json")) - before
        captured = capsys.readouterr()
        return status, captured.out + captured.err, next(iter(new)).parent if new else None

    return start


@pytest.mark.parametrize("kind", ["run", "file"])
def test_a_training_begins_with_the_weights_tokenizer_and_options_of_a_run(trained, command, tmp_path, kind):
    place, config, model = trained
    if kind == "file":
        place = tmp_path / "weights.safetensors"
        export_run(trained[0], place)
    # A rate so small that nothing changes.
    status, told, run = command(f"train.init={place}", "optim.lr=1e-30", "optim.weight_decay=0")
    assert status == 0, told
    assert f"beginning with the weights of {place}" in told
    assert run.parent.name == "stage2-small"
    found = muse.load(run, "last")
    assert found.config.stage == config.stage
    assert found.config.model == config.model
    assert found.tokenizer.to_json() == muse.load(place).tokenizer.to_json()
    for (name, mine), theirs in zip(found.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-25, msg=name)


def test_such_a_training_goes_on_with_the_same_bits_also_where_the_weights_are_gone(
    trained, command, tmp_path
):
    place = tmp_path / "weights.safetensors"
    export_run(trained[0], place)
    status, told, whole = command(f"train.init={place}", "train.steps=4")
    assert status == 0, told
    cut = whole.with_name("cut")
    shutil.copytree(whole, cut)
    (cut / "result.json").unlink()
    shutil.rmtree(cut / "checkpoints" / "step_00000004")
    assert find_checkpoint(cut).name == "step_00000003"
    place.unlink()
    status, told, again = command(f"resume={cut}", "train.steps=4")
    assert status == 0, told
    assert same(stored(find_checkpoint(again), "model"), stored(find_checkpoint(whole), "model"))
    assert not same(stored(find_checkpoint(whole), "model"), stored(find_checkpoint(trained[0]), "model"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["stage=1"], "stage: 2 → 1"),
        (["stage.flows=1"], "stage.flows: 2 → 1"),
        (["model=seed"], "model: small → seed"),
        (["model.complex.layers=3"], "model.complex.layers: 2 → 3"),
        (["tokenizer=word"], "tokenizer: bpe → word"),
    ],
)
def test_what_does_not_fit_the_weights_is_refused_by_name(trained, command, options, told):
    status, said, run = command(f"train.init={trained[0]}", *options)
    assert (status, run) == (1, None)
    assert told in said
    assert "Traceback" not in said


def test_what_a_preset_says_otherwise_than_the_weights_is_named(trained, command):
    preset = ("experiment=stage3_training", "train.steps=2", "train.test=false")
    status, told, run = command(f"train.init={trained[0]}", *preset)
    assert status == 0, told
    assert muse.load(run).config.stage == trained[1].stage
    (line,) = (line for line in told.splitlines() if line.startswith("experiment=stage3_training"))
    lost = line.partition(" in ")[2].split(", ")
    assert f"experiment=stage3_training gives way to train.init={trained[0]} in " in line
    assert {"stage: 3 → 2", "stage.trunk: reversible → residual", "model.complex.layers: 6 → 2"} <= {*lost}
    # Neither what the preset leaves alone, nor what it has its way in, nor what the command says.
    names = {change.partition(":")[0] for change in lost}
    assert not names & {"stage.dropout", "stage.flows", "train.early_stop", "train.steps", "tokenizer.name"}
    # And on the way on.
    status, told, run = command(f"resume={run}", "experiment=stage3_diagnostics", "train.steps=3")
    assert status == 0, told
    assert "stage.verify: true → false" in told
    status, told, run = command(f"train.init={trained[0]}")
    assert "gives way" not in told


def test_another_window_and_another_dropout_may_be_given(trained, command):
    options = ("model.seq_len=12", "stage.dropout=0", "stage.gradient=backprop")
    status, told, run = command(f"train.init={trained[0]}", *options)
    assert status == 0, told
    config = muse.load(run).config
    assert (config.model.seq_len, config.stage.dropout, config.stage.gradient) == (12, 0.0, "backprop")


@pytest.mark.parametrize("init", ["nowhere", "weights.pt"])
def test_what_is_no_run_is_one_sentence(command, tmp_path, init):
    (tmp_path / "weights.pt").write_bytes(b"x")
    status, told, run = command(f"train.init={init}")
    assert (status, run) == (1, None)
    assert told.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in told


def test_weights_of_another_vocabulary_are_one_sentence(trained, tmp_path):
    config = run_config(stage_config("2"), init=str(trained[0]))
    with pytest.raises(RuntimeError, match="is of another model"):
        run_train(config, tmp_path / "run")


LOSSES = (3.0, 2.0, 2.5, 1.9, 1.9, 2.2, 1.0, 0.5)


@pytest.fixture
def measured(monkeypatch):
    """Evaluations find these losses, one after the other."""

    def evaluate(self, split, limit):
        loss = LOSSES[self.done - 1]
        return Evaluation(loss, math.exp(loss), None, None, 10, "no words")

    monkeypatch.setattr(trainer.Trainer, "_evaluate", evaluate)


@pytest.mark.parametrize(("early_stop", "steps"), [(0, 8), (1, 3), (2, 6), (3, 8)])
def test_a_training_ends_when_its_loss_has_not_fallen_and_keeps_the_best(
    tmp_path, measured, early_stop, steps
):
    config = run_config(stage_config("1"), steps=8, eval_every=1, early_stop=early_stop)
    _, result = run_train(config, tmp_path)
    assert result.step == steps
    best = LOSSES.index(min(LOSSES[:steps])) + 1
    assert find_checkpoint(tmp_path, "best").name == f"step_{best:08}"
    assert find_checkpoint(tmp_path).name == f"step_{steps:08}"


def test_evaluations_before_a_stop_count_after_it(tmp_path, measured):
    config = run_config(stage_config("1"), steps=8, eval_every=1, early_stop=2, checkpoint_every=1)
    with pytest.raises(CrashError):
        run_train(config, tmp_path / "first", log=lambda step, _: crash_at(6)(step))
    assert find_checkpoint(tmp_path / "first").name == "step_00000005"
    _, result = run_train(config, tmp_path / "second", resume_from=find_checkpoint(tmp_path / "first"))
    assert result.step == 6


def test_early_stopping_needs_evaluations():
    with pytest.raises(ConfigError, match=r"train\.early_stop=2 needs evaluations"):
        TrainConfig(early_stop=2, eval_every=0)
