"""What a command says beside what the run that it names was made with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

import muse.launch.cli  # noqa: F401 - registers what conf/common.yaml resolves
from muse.config import (
    DataConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
    TokenizerConfig,
    TrainConfig,
    register_schemas,
)
from muse.errors import ConfigError
from muse.runs.folder import RUN_FILE
from muse.runs.options import (
    differences,
    format_changes,
    may_change,
    stage_and_model,
    stored_options,
    with_options_of,
)
from muse.runs.provenance import ROOT

GROUPS = ("stage", "model", "data", "tokenizer", "optim", "train", "seed")
TRAINED = RunConfig(
    stage=StageConfig(number="2", dt=0.5),
    data=DataConfig(name="text", path="here.txt", cache="there"),
    tokenizer=TokenizerConfig(name="word"),
    optim=OptimConfig(lr=0.25),
    train=TrainConfig(steps=7, batch_size=3),
    seed=5,
)


@pytest.fixture
def run(tmp_path):
    """The folder of a run that was made with ``TRAINED``."""
    (tmp_path / RUN_FILE).write_text(json.dumps({"config": dataclasses.asdict(TRAINED)}))
    return tmp_path


def taken(config, run, *given):
    return with_options_of(config, "resume", run, given, GROUPS, may_change)


def test_what_is_not_given_is_the_runs(run):
    cache = dataclasses.replace(TRAINED.data, cache="outputs/cache")
    assert taken(RunConfig(), run) == dataclasses.replace(TRAINED, data=cache)


def test_what_is_given_and_may_change_is_the_commands(run):
    config = RunConfig(train=TrainConfig(steps=9), optim=OptimConfig(lr=0.5))
    mixed = taken(config, run, "train.steps", "optim.lr")
    assert (mixed.train, mixed.optim) == (TrainConfig(steps=9, batch_size=3), OptimConfig(lr=0.5))


@pytest.mark.parametrize(
    "given", [["stage"], ["stage", "data.path"], ["tokenizer", "data", "stage.dt", "seed"]]
)
def test_repeating_what_the_run_was_made_with_says_nothing_against_it(run, given):
    assert taken(dataclasses.replace(TRAINED), run, *given).stage == TRAINED.stage


def test_the_choice_of_a_group_is_no_word_about_the_options_below_it(run):
    """stage=2 composes a dt of 1.0, which nobody asked for."""
    assert taken(RunConfig(stage=StageConfig(number="2")), run, "stage").stage.dt == 0.5


def test_all_that_is_said_against_the_run_is_named_with_both_values(run, tmp_path, monkeypatch):
    """Before the mixture is built, which would be refused for another reason."""
    monkeypatch.chdir(tmp_path)
    Path("here.txt").write_text("text")
    config = RunConfig(stage=StageConfig(number="0", activation="swiglu"), train=TrainConfig(steps=9))
    with pytest.raises(ConfigError) as error:
        taken(config, run, "stage", "data.path", "seed", "train.batch_size", "train.steps")
    assert str(error.value) == (
        f"resume={run} was trained with other options (data.path: here.txt → null, seed: 5 → 0, "
        "stage: 2 → 0, train.batch_size: 3 → 16); leave these out, they come from the run"
    )


def test_a_text_that_was_moved_is_found_where_the_command_says(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moved = RunConfig(data=DataConfig(name="text", path="moved.txt"))
    assert taken(moved, run, "data", "data.path").data.path == "moved.txt"
    Path("here.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"data\.path: here\.txt → moved\.txt"):
        taken(moved, run, "data", "data.path")


def test_a_part_that_is_given_as_a_whole_is_given_in_each_of_its_options(run):
    config = RunConfig()
    config.model.complex.d_model *= 2
    with pytest.raises(ConfigError, match=r"model\.complex\.d_model: 96 → 192\)"):
        taken(config, run, "model.complex")


def test_a_run_from_before_an_option_existed_had_its_default(run):
    older = stored_options(run)
    del older["stage"]["confinement"], older["train"]["eval_stride"]
    assert differences(older, TRAINED) == {}
    changed = dataclasses.replace(TRAINED, stage=dataclasses.replace(TRAINED.stage, confinement=1.0))
    assert differences(older, changed) == {"stage.confinement": (0.5, 1.0)}


def test_an_option_that_is_gone_is_told(run):
    older = stored_options(run)
    older["stage"]["magic"] = 3
    assert format_changes(differences(older, TRAINED)) == "stage.magic: 3 → no option of this version"
    (run / RUN_FILE).write_text(json.dumps({"config": older}))
    with pytest.raises(ConfigError, match=r"stage\.magic=3, which is no option of this version"):
        taken(RunConfig(), run)


def test_many_changes_are_counted():
    changes = {f"train.option{n:02}": (n, None) for n in range(13)}
    assert format_changes(changes).startswith("train.option00: 0 → null, train.option01: 1 → null, ")
    assert format_changes(changes).endswith("train.option09: 9 → null and 3 more")


def test_the_folder_of_a_run_is_named_after_the_run_that_goes_on(run):
    assert stage_and_model("1", "small", str(run), None) == "stage2-tiny"
    assert stage_and_model("1", "small", "never", str(run / "checkpoints" / "step_1")) == "stage2-tiny"
    for resume in ("never", "auto", str(run / "nowhere")):
        assert stage_and_model("1", "small", resume, None) == "stage1-small"


@pytest.mark.parametrize(("command", "option"), [("train", "resume"), ("bench", "benchmark.checkpoint")])
def test_hydra_names_the_folder_so(run, monkeypatch, command, option):
    # What is set below must not outlive the test.
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for given, kind in (([], "stage1-tiny"), ([f"{option}={run}"], "stage2-tiny")):
            composed = compose(command, given, return_hydra_config=True)
            HydraConfig.instance().set_config(composed)
            assert Path(composed.hydra.run.dir).parent == Path("outputs") / command / kind


def test_a_mapping_is_the_runs_as_a_whole(tmp_path):
    sources = {"a": SourceConfig(path="here", weight=2.0), "b": SourceConfig(path="there")}
    trained = RunConfig(data=DataConfig(name="mix", sources=sources))
    (tmp_path / RUN_FILE).write_text(json.dumps({"config": dataclasses.asdict(trained)}))
    assert taken(RunConfig(), tmp_path).data == trained.data
    (changed,) = differences(
        stored_options(tmp_path),
        dataclasses.replace(trained, data=DataConfig(name="mix", sources={"a": sources["a"]})),
    )
    assert changed == "data.sources"
    told = format_changes({"data.sources": (dataclasses.asdict(trained)["data"]["sources"], {})})
    assert told.startswith("data.sources: {a:{weight:2.0,data:files,path:here,column:null,")
    assert told.endswith("}} → {}")


def test_sources_may_change_where_one_is_gone(tmp_path):
    (tmp_path / "a.txt").touch()
    sources = {"a": SourceConfig(path=f"{tmp_path}/*.txt")}
    assert not may_change("data.sources", dataclasses.asdict(DataConfig("mix", sources=sources))["sources"])
    sources["b"] = SourceConfig(path=f"{tmp_path}/b.txt")
    assert may_change("data.sources", dataclasses.asdict(DataConfig("mix", sources=sources))["sources"])
