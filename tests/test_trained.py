import json
import shutil

import pytest
import torch
from support.trained import make_trained

import muse
from muse.config import TokenizerConfig
from muse.data import Corpus, build_tokenizer
from muse.errors import ConfigError, RunError
from muse.export import export_run
from muse.runs.folder import TOKENIZER_FILE

TOKENS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("kind", ["run", "checkpoint", "file"])
def test_a_model_comes_with_its_tokenizer_and_options(made, run, tmp_path, kind):
    _, config, model = made
    place = run
    if kind == "checkpoint":
        place = run / "checkpoints" / "step_00000003"
    elif kind == "file":
        place = tmp_path / "model.safetensors"
        export_run(run, place)
        # Everything is in it.
        shutil.rmtree(run)
    found = muse.load(place)
    assert found.config == config
    assert not found.model.training
    assert torch.equal(found.model(TOKENS), model(TOKENS))
    assert found.tokenizer is not None
    assert found.tokenizer.to_json() == (made[0] / TOKENIZER_FILE).read_text(encoding="utf-8")


def test_an_older_run_makes_its_tokenizer_again_or_has_none(made, run, monkeypatch, tmp_path):
    (run / TOKENIZER_FILE).unlink()
    found = muse.load(run)
    assert found.tokenizer is not None
    assert found.tokenizer.to_json() == (made[0] / TOKENIZER_FILE).read_text(encoding="utf-8")
    described = json.loads((run / "run.json").read_text())
    described["config"]["data"]["path"] = str(tmp_path / "gone.txt")
    (run / "run.json").write_text(json.dumps(described))
    with pytest.warns(UserWarning, match="holds no tokenizer"):
        assert muse.load(run).tokenizer is None


def test_what_is_no_run_is_one_sentence(run, tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"cos\nsystem\n(S'touch never'\ntR.")
    for place, kind, message in (
        (tmp_path / "weights.pt", ConfigError, "pickle, which is never loaded"),
        (tmp_path / "nowhere", ConfigError, "does not say which options"),
        (tmp_path / "model.safetensors", RunError, "no model that MUSE exported"),
    ):
        with pytest.raises(kind, match=message) as caught:
            muse.load(place)
        assert "\n" not in str(caught.value)
        assert str(place) in str(caught.value)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        muse.load(run)


@pytest.mark.parametrize("text", ["", '{"cut', "{}"])
def test_a_damaged_tokenizer_is_one_sentence(run, text):
    (run / TOKENIZER_FILE).write_text(text)
    with pytest.raises(RunError, match=r"tokenizer of .* cannot be read, it is damaged") as caught:
        muse.load(run)
    assert "\n" not in str(caught.value)


def test_the_tokenizer_of_another_model_is_refused(run, tmp_path):
    other = build_tokenizer(TokenizerConfig(name="word"), Corpus(["a b"], ["a"], ["a"]), tmp_path)
    (run / TOKENIZER_FILE).write_text(other.to_json())
    with pytest.raises(RunError, match=r"has 4 entries, and its model \d+: it is another model's"):
        muse.load(run)


def test_every_name_of_the_package_is_there():
    for name in muse.__all__:
        assert getattr(muse, name) is not None
        assert name in dir(muse)
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        muse.lode
