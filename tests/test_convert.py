import shutil
from functools import partial

import pytest
import torch
from safetensors import safe_open
from support.commands import run_here
from support.trained import make_trained

import muse
from muse.errors import ConfigError
from muse.export import export_run
from muse.layers import ComplexAttention

# Of what is given, whether the function of stage 2 is kept.
KEPT = {
    ("stage.koopman=none",): True,
    ("stage.koopman=add",): True,
    ("stage.koopman=add", "stage.mera=add", "stage.mera_every=1", "stage.dialectic=mlp"): True,
    (): False,
    ("stage.koopman=none", "stage.mera=replace"): False,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_trained(tmp_path_factory.mktemp("trained"), "2", dropout=0.1)[0]


@pytest.fixture
def command(told_by):
    return partial(told_by, "muse.convert")


@pytest.mark.parametrize(("options", "kept"), KEPT.items(), ids=str)
def test_what_is_new_adds_nothing_and_the_rest_is_kept(run, command, tmp_path, options, kept):
    file = tmp_path / "stage3.safetensors"
    status, out, err = command(run, "stage=3", *options, "--output", file)
    assert status == 0, err
    old, new = muse.load(run), muse.load(file)
    assert new.config.stage.number == "3"
    assert new.config.stage.dropout == 0.1
    assert new.tokenizer.to_json() == old.tokenizer.to_json()
    tokens = torch.randint(old.tokenizer.vocab_size, (2, 16))
    with torch.no_grad():
        assert torch.equal(new.model(tokens), old.model(tokens)) == kept
    told = out.splitlines()[0].split()
    assert (told[-1] == told[-4].rstrip(",")) == kept
    # What both have is the same, wherever stage 3 has it.
    weights = old.model.state_dict()
    for number, block in enumerate(new.model.blocks):
        for part in block.mixer.modules():
            if isinstance(part, ComplexAttention):
                for name, tensor in part.state_dict().items():
                    assert torch.equal(tensor, weights[f"blocks.{number}.attention.{name}"])
        for name, tensor in block.flow.state_dict().items():
            assert torch.equal(tensor, weights[f"blocks.{number}.flow.{name}"])
    # And what is new can learn.
    new.model.train().requires_grad_(True)
    new.model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    fresh = [name for name, _ in new.model.named_parameters() if name.endswith("koopman.output.weight")]
    for name in fresh:
        assert new.model.get_parameter(name).grad.any()
    assert bool(fresh) == ("stage.koopman=add" in options)


def test_it_is_written_into_the_folder_of_the_run_and_can_be_trained_from(run, command, tmp_path):
    own = tmp_path / "run"
    shutil.copytree(run, own)
    status, out, err = command(own, "stage=3")
    assert status == 0, err
    text = muse.load(own).config.data.path
    assert f"train.init={own / 'stage3.safetensors'} data=text data.path={text}" in out
    assert {path.name for path in own.iterdir()} - {path.name for path in run.iterdir()} == {
        "stage3.safetensors"
    }
    text = muse.load(run).config.data
    arguments = [
        f"train.init={own / 'stage3.safetensors'}",
        *("data=text", f"data.path={text.path}", f"data.cache={text.cache}"),
        *("train.steps=1", "train.batch_size=2", "logger=none", f"output_root={tmp_path / 'out'}"),
        *("hardware=cpu", "hydra/job_logging=disabled"),
    ]  # fmt: skip
    status = run_here("train.py", arguments)
    assert status == 0
    (trained,) = (tmp_path / "out" / "train").glob("stage3-*/*")
    assert muse.load(trained).config.stage.koopman == "replace"


def test_a_text_that_is_gone_leaves_the_loss_untold(run, command, tmp_path, monkeypatch):
    def gone(*arguments):
        raise ConfigError("data.path=x is not there")

    monkeypatch.setattr("muse.evaluate.load_tokens", gone)
    status, out, err = command(run, "stage=3", "--output", tmp_path / "stage3.safetensors")
    assert status == 0, err
    assert "cannot be told: data.path=x is not there" in out
    assert (tmp_path / "stage3.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["stage=2"], "muse.convert makes stage 3 of stage 2; give stage=3"),
        (["stage.koopman=add"], "give stage=3"),
        (["stage=3", "stage.dt=2"], "stage.dt=2 is not of what stage 3 adds; give some of stage.koopman, "),
        (["stage=3", "koopman=add"], "koopman=add is not of what stage 3 adds"),
        (["stage=3", "stage.koopman=x"], "stage.koopman=x is not known; choose one of none, replace, add"),
        (["stage=3", "stage.koopman=["], "stage.koopman=[ cannot be read"),
        (["stage=3", "stage.koopman_every=x"], "stage.koopman_every has a value that it cannot have"),
        (["stage=3", "--output", "x.bin"], "--output x.bin is not a name for weights"),
        ([], "the following arguments are required: options"),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_sentence_and_nothing_is_written(run, command, arguments, told):
    before = sorted(run.iterdir())
    status, out, err = command(run, *arguments)
    assert status == 1
    assert out == ""
    assert told in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(run.iterdir()) == before


def test_a_file_of_stage_2_says_how_long_it_was_trained_and_is_not_replaced(run, command, tmp_path):
    file = tmp_path / "weights.safetensors"
    export_run(run, file)
    before = file.read_bytes()
    told = {}
    for source in (run, file):
        assert command(source, "stage=3", "--output", tmp_path / "stage3.safetensors")[0] == 0
        with safe_open(tmp_path / "stage3.safetensors", "pt") as opened:
            told[source] = opened.metadata()["step"]
    assert told == {run: "3", file: "3"}
    status, _, err = command(file, "stage=3", "--output", f"{tmp_path}/../{tmp_path.name}/{file.name}")
    assert status == 1
    assert "is the file of stage 2; give another one" in err
    assert file.read_bytes() == before


def test_damaged_weights_are_one_sentence_and_nothing_is_written(run, command, tmp_path):
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged)
    (weights,) = damaged.glob("checkpoints/step_*/*.distcp")
    weights.write_bytes(weights.read_bytes()[:-8])
    before = sorted(damaged.rglob("*"))
    status, out, err = command(damaged, "stage=3")
    assert (status, out) == (1, "")
    assert "is damaged" in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(damaged.rglob("*")) == before


def test_only_stage_2_becomes_stage_3(command, tmp_path):
    other, *_ = make_trained(tmp_path, "1")
    status, _, err = command(other, "stage=3")
    assert status == 1
    assert "the run is of stage 1; muse.convert makes stage 3 of stage 2" in err
    status, _, err = command(tmp_path / "nowhere", "stage=3")
    assert status == 1
    assert "nowhere" in err
