"""What commands are told on the command line and in files: every form of it, and what is wrong with it."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from hydra import version
from hydra._internal.utils import create_config_search_path
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from hydra.types import RunMode
from omegaconf import OmegaConf

from muse.config import SourceConfig, build_config
from muse.errors import ConfigError
from muse.launch import cli, sweep
from muse.launch.composition import Loader, prepare_hydra

CONF = Path(__file__).resolve().parents[2] / "conf"


@dataclass
class Ran:
    """What a command did.

    Attributes:
        status: its exit status.
        jobs: the configuration of each job.
        overrides: what Hydra says each job was given.
        folders: the folder of each job.
        err: what it wrote to standard error.
    """

    status: int
    jobs: list[Any]
    overrides: list[list[str]]
    folders: list[Path]
    err: str


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command in this process, whose jobs only note what they were told."""
    monkeypatch.setattr(cli, "_statuses", [])
    monkeypatch.setattr(sweep, "_folder", None)
    monkeypatch.setattr(cli, "finish_sweep", lambda: 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(*arguments: str, command: str = "train") -> Ran:
        done = Ran(0, [], [], [], "")

        @hydra.main(version_base="1.3", config_path=str(CONF), config_name=command)
        def main(composed):
            done.jobs.append(build_config(composed))
            told = HydraConfig.get()
            done.overrides.append(list(told.overrides.task))
            done.folders.append(Path(told.runtime.output_dir).relative_to(tmp_path))
            return 0.5

        monkeypatch.setattr(sys, "argv", [f"{command}.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.start(main)
        done.status = ended.value.code
        done.err = capsys.readouterr().err
        return done

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def compose():
    """Composes what a command is given, as it does for a sweep if -m is among it."""
    version.setbase("1.3")
    setup_globals()
    prepare_hydra()
    loader = Loader(create_config_search_path(str(CONF)))

    def compose(*arguments: str, command: str = "train") -> Any:
        mode = RunMode.MULTIRUN if "-m" in arguments else RunMode.RUN
        return loader.load_configuration(command, [item for item in arguments if item != "-m"], mode)

    return compose


def unresolved(composed: Any) -> Any:
    """What was composed, with the names of what is only known later, such as the time."""
    return OmegaConf.to_container(composed, resolve=False)


def refusal(ran: Ran) -> str:
    """The one sentence that a command ended with."""
    assert ran.status == 1
    assert not ran.jobs
    (line,) = ran.err.splitlines()
    assert line.startswith("error: ")
    # It was refused before anything was written.
    assert not os.listdir()
    return line.removeprefix("error: ")


SEVERAL = "has several values; add -m to sweep over them"
QUOTE = "quote a value with special characters"
SEARCHED = ("stage=1,2", "stage=range(1,3)", "stage=glob([1,2])", "hydra.sweeper.params.stage='glob([1,2])'")
NAMED = ("stage={}", "stage='{}'", 'stage="{}"', "stage=[{}]", "+stage={}", "++stage={}", "++stage=['{}']")
STAGES_1_2 = (
    "stage=1,2",
    "stage='1','2'",
    'stage="1","2"',
    "stage=choice(1,2)",
    "stage=choice('1',2)",
    "stage=range(1,3)",
    "stage=glob([1,2])",
    "stage=glob(*,exclude=[0,3,3a])",
    "stage=sort(2,1)",
    "+stage=1,2",
    "++stage=1,2",
    "+stage=choice(1,2)",
    "++stage=glob(*,exclude=[0,3,3a])",
    "hydra.sweeper.params.stage=1,2",
    "+hydra.sweeper.params.stage='1,2'",
    "hydra.sweeper.params.stage=choice(1,2)",
    "hydra.sweeper.params.stage='glob([1,2])'",
    '+hydra.sweeper.params={stage:"1,2"}',
)


@pytest.mark.parametrize("argument", STAGES_1_2)
def test_every_form_of_a_sweep_over_stages_is_the_same_sweep(compose, argument):
    told = compose("-m", argument, "seed=3").hydra
    # What the sweeper is given, and the identity of a search is made of.
    if "params" in argument:
        assert dict(told.sweeper.params) == {"stage": "'1','2'"}
        assert told.overrides.task == ["seed=3"]
    else:
        assert told.overrides.task == ["stage='1','2'", "seed=3"]


@pytest.mark.parametrize("argument", ["stage=choice(1,2)", "++stage=1,2", "hydra.sweeper.params.stage=1,2"])
def test_every_form_of_a_sweep_over_stages_runs(run, argument):
    ran = run("-m", argument, "seed=3")
    assert ran.err == ""
    assert [job.stage.number for job in ran.jobs] == ["1", "2"]
    # What paths, the summary and the identity of a cell are made of.
    assert [sorted(given) for given in ran.overrides] == [["seed=3", "stage='1'"], ["seed=3", "stage='2'"]]
    assert [folder.name for folder in ran.folders] == ["0-stage1-tiny", "1-stage2-tiny"]


@pytest.mark.parametrize("argument", SEARCHED)
def test_every_form_of_a_sweep_over_stages_can_be_searched(run, argument):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    ran = run("-m", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", argument)
    assert ran.status == 0, ran.err
    assert sorted(job.stage.number for job in ran.jobs) == ["1", "2"]


@pytest.mark.parametrize("stage", ["1", "3a"])
@pytest.mark.parametrize("form", NAMED)
def test_every_form_that_names_a_stage_is_the_same_run(compose, form, stage):
    composed = compose(form.format(stage))
    assert composed.stage.number == stage
    assert composed.hydra.runtime.choices.stage == stage
    assert composed.hydra.overrides.task == [f"stage='{stage}'"]


@pytest.mark.parametrize("written", ["2", '"1"', "3a"])
def test_a_stage_is_named_in_an_experiment_file(run, tmp_path, written):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    text = f"# @package _global_\ndefaults:\n  - override /stage: {written}\ntrain:\n  steps: 7\n"
    (tmp_path / "mine" / "experiment" / "x.yaml").write_text(text)
    ran = run("--config-dir", "mine", "+experiment=x")
    assert ran.err == ""
    assert [(job.stage.number, job.train.steps) for job in ran.jobs] == [(written.strip('"'), 7)]
    assert f"stage{ran.jobs[0].stage.number}-" in str(ran.folders[0])


# Each choice of loggers, and what is on: W&B's mode, TensorBoard, CSV.
LOGGERS = {
    "logger=none": ("disabled", False, False),
    "logger=wandb": ("offline", False, False),
    "logger=tensorboard": ("disabled", True, False),
    "logger=csv": ("disabled", False, True),
    "logger=[csv]": ("disabled", False, True),
    "logger=[csv,csv]": ("disabled", False, True),
    "logger=[csv,tensorboard]": ("disabled", True, True),
    "logger=['csv',\"tensorboard\"]": ("disabled", True, True),
    "++logger=[wandb,csv]": ("offline", False, True),
    "logger=[csv,wandb]": ("offline", False, True),
    "logger=[wandb,tensorboard,csv]": ("offline", True, True),
}


def loggers(config: Any) -> tuple[str, bool, bool]:
    return config.logger.mode, config.logger.tensorboard, config.logger.csv


@pytest.mark.parametrize("command", ["train", "bench"])
@pytest.mark.parametrize("argument", LOGGERS)
def test_one_logger_or_several_are_chosen(compose, argument, command):
    composed = compose(argument, command=command)
    assert loggers(composed) == LOGGERS[argument]
    # What a single name was before there were several.
    if "," not in argument:
        assert composed.hydra.runtime.choices.logger == argument.partition("=")[2].strip("[]")


def test_the_default_is_wandb_alone(compose):
    assert loggers(compose()) == ("offline", False, False)


def test_options_of_several_loggers_are_given_beside_them(compose):
    composed = compose("logger=[csv,wandb]", "logger.mode=online", "logger.tags=[a]", "logger.log_every=3")
    assert loggers(composed) == ("online", False, True)
    assert (composed.logger.tags, composed.logger.log_every) == (["a"], 3)


def test_several_loggers_are_one_choice_of_a_sweep(run):
    ran = run("-m", "logger=[csv,tensorboard]", "seed=1,2")
    assert ran.err == ""
    assert [(job.seed, *loggers(job)) for job in ran.jobs] == [
        (seed, "disabled", True, True) for seed in (1, 2)
    ]
    assert ran.overrides[0] == ["logger=[csv,tensorboard]", "seed=1"]


SWEPT_LOGGERS = (
    "logger=[csv,tensorboard],none",
    "logger=choice([csv,tensorboard],none)",
    "hydra.sweeper.params.logger='[csv,tensorboard],none'",
)


@pytest.mark.parametrize("argument", SWEPT_LOGGERS)
def test_several_loggers_are_swept_over_beside_one(run, argument):
    ran = run("-m", argument)
    assert ran.err == ""
    assert [loggers(job) for job in ran.jobs] == [("disabled", True, True), ("disabled", False, False)]


@pytest.mark.parametrize("argument", SWEPT_LOGGERS)
def test_several_loggers_are_searched_over_beside_one(run, argument):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    ran = run("-m", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", argument)
    assert ran.status == 0, ran.err
    assert sorted(map(loggers, ran.jobs)) == [("disabled", False, False), ("disabled", True, True)]


@pytest.fixture
def experiment(run, tmp_path):
    """Runs a command with an experiment file of this text."""

    def experiment(text: str, *arguments: str) -> Ran:
        place = tmp_path.parent / f"{tmp_path.name} files"
        (place / "experiment").mkdir(parents=True)
        (place / "experiment" / "x.yaml").write_text(f"# @package _global_\n{text}\n")
        return run("--config-dir", str(place), "+experiment=x", *arguments)

    return experiment


def test_several_loggers_are_named_in_an_experiment_file(experiment):
    (job,) = experiment("defaults: [override /logger: [csv, wandb]]").jobs
    assert loggers(job) == ("offline", False, True)


def test_the_command_has_the_last_word_on_the_loggers_of_an_experiment_file(experiment):
    (job,) = experiment("defaults: [override /logger: [csv, wandb]]", "logger=tensorboard").jobs
    assert loggers(job) == ("disabled", True, False)


ALONE = "is not possible, since none stands alone; choose none, or one or several of csv, tensorboard, wandb"


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ("[none, csv]", f"logger=[none,csv] (in experiment/x) {ALONE}"),
        (
            "[csv, foo]",
            "logger=foo (in experiment/x) is not known; choose one of csv, none, tensorboard, wandb",
        ),
        ("[]", "logger=[] (in experiment/x) is not known; choose one of csv, none, tensorboard, wandb"),
    ],
)
def test_loggers_that_do_not_go_together_in_an_experiment_file_are_one_sentence(experiment, names, told):
    assert refusal(experiment(f"defaults: [override /logger: {names}]")) == told


def test_several_of_another_group_in_an_experiment_file_are_one_sentence(experiment):
    told = refusal(experiment("defaults: [override /stage: [1, 2]]"))
    assert told == "stage=[1,2] (in experiment/x) is not known; choose one of 0, 1, 2, 3, 3a"


def test_a_sweep_is_written_in_an_experiment_file(run, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    params = {"stage": "1,2", "train.steps": "choice(3,4)"}
    text = "# @package _global_\n" + yaml.safe_dump({"hydra": {"sweeper": {"params": params}}})
    (tmp_path / "mine" / "experiment" / "x.yaml").write_text(text)
    ran = run("-m", "--config-dir", "mine", "+experiment=x")
    assert [(job.stage.number, job.train.steps) for job in ran.jobs] == [
        ("1", 3),
        ("1", 4),
        ("2", 3),
        ("2", 4),
    ]
    assert ran.overrides[0] == ["stage='1'", "train.steps=3", "experiment=x"]


# Of each preset, what it is about.
PRESETS = {
    "stage3_basic": {"stage.koopman": "replace", "stage.trunk": "residual", "model.name": "tiny"},
    "stage3_training": {"stage.trunk": "reversible", "model.name": "small", "train.early_stop": 3},
    "stage3_inference": {"stage.koopman": "replace", "stage.koopman_every": 1},
    "stage3_diagnostics": {"stage.verify": True, "logger.csv": True},
    "price_smoke": {"benchmark.name": "price", "benchmark.flow_steps": [], "benchmark.learning_rates": [1.0]},
}
PRESET_FILES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
# Those that are about a benchmark.
OF_BENCH = ["price_smoke"]


@pytest.mark.parametrize("name", OF_BENCH)
def test_a_preset_of_a_benchmark_is_refused_in_a_training(compose, name):
    with pytest.raises(ConfigError) as caught:
        compose(f"experiment={name}", command="train")
    told = f"benchmark (in experiment/{name}) is an option of bench.py, not of train.py"
    assert str(caught.value) == told


@pytest.mark.parametrize(
    ("name", "command"),
    [(name, "bench") for name in PRESET_FILES]
    + [(name, "train") for name in PRESET_FILES if name not in OF_BENCH],
)
def test_each_preset_is_an_experiment_of_its_commands(compose, name, command):
    composed = compose(f"experiment={name}", command=command)
    build_config(OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"]))
    wanted = {"stage.number": "3", **PRESETS[name]}
    assert {key: OmegaConf.select(composed, key) for key in wanted} == wanted
    assert unresolved(composed) == unresolved(compose(f"+experiment={name}", command=command))
    # The command has the last word.
    assert compose("stage=2", f"experiment={name}", "train.steps=7", command=command).train.steps == 7
    assert compose("stage=2", f"experiment={name}", command=command).stage.number == "2"


@pytest.mark.parametrize("name", ["deployment", "serving"])
def test_a_benchmark_has_the_name_that_the_documents_call_a_stage(compose, name):
    alias = {"deployment": "3c", "serving": "3d"}[name]
    wanted = compose(f"benchmark={name}", "model=simple", command="bench")
    for form in (f"stage={alias}", f"+stage='{alias}'", f'stage="{alias}"'):
        composed = compose(form, "model=simple", command="bench")
        assert composed.benchmark.name == name
        assert unresolved(composed) == unresolved(wanted)
    with pytest.raises(ConfigError, match="stage=3b is no model"):
        compose("stage=3b", command="bench")


@pytest.mark.parametrize(
    "arguments",
    [
        "data.sources={a:{path:x,weight:2},b:{path:y}}",
        "data.sources.a={path:x,weight:2} data.sources.b.path=y",
        "data.sources.a.path=x data.sources.a.weight=2 data.sources={b:{path:y}}",
        "+data.sources.a.path=x ++data.sources.a.weight=2 +data.sources.b.path=y",
        "data.sources.a.path=z data.sources.a.path=x data.sources.a.weight=2 data.sources.b.path=y",
    ],
)
def test_every_form_of_a_mapping_is_the_same_one(compose, arguments):
    composed = compose("data=mix", *arguments.split())
    assert build_config(composed.data).sources == {
        "a": SourceConfig(path="x", weight=2.0),
        "b": SourceConfig(path="y"),
    }


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("train.step=3", "train.step=3 is not known; the nearest are train.steps, train.test, train"),
        ("trian.steps=3", "trian.steps=3 is not known; the nearest are train.steps,"),
        ("steps=3", "steps=3 is not known; the nearest are train.steps,"),
        ("train={step:3}", "train={step:3} is not known; the nearest are train.steps,"),
        ("modle=tiny", "modle=tiny is not known; the nearest are model,"),
        ("stage=4", "stage=4 is not known; choose one of 0, 1, 2, 3, 3a"),
        ("stage=3b", "stage=3b is no model; it is: python -m muse.serve RUN"),
        ("stage=3c", "stage=3c is no model; it is: python bench.py benchmark=deployment"),
        ("stage=", "stage= is not known; choose one of 0, 1, 2, 3, 3a"),
        ("stage=1.5", "stage=1.5 is not known; choose one of 0, 1, 2, 3, 3a"),
        ("stage=[1,2]", "stage=[1,2] is not known; choose one of 0, 1, 2, 3, 3a"),
        ("model=huge", "model=huge is not known; choose one of deep, scaled, seed, simple, small, tiny"),
        ("data=foo", "data=foo is not known; choose one of files, mix, stdlib, synthetic, text, wikitext2"),
        ("logger=null", "logger=null is not known; choose one of csv, none, tensorboard, wandb"),
        ("logger=[csv,foo]", "logger=foo is not known; choose one of csv, none, tensorboard, wandb"),
        ("logger=[]", "logger=[] is not known; choose one of csv, none, tensorboard, wandb"),
        ("logger=[none,csv]", f"logger=[none,csv] {ALONE}"),
        ("logger=[wandb,none]", f"logger=[wandb,none] {ALONE}"),
        ("logger=csv,wandb", f"logger=csv,wandb {SEVERAL}"),
        ("-m logger=csv,[none,csv]", f"logger=[none,csv] {ALONE}"),
        ("-m hydra.sweeper.params.logger='[none,csv],csv'", f"logger=[none,csv] {ALONE}"),
        ("hydra/launcher=foo", "hydra/launcher=foo is not known; choose one of basic"),
        ("hydra/laucher=basic", "hydra/laucher=basic is not known; the nearest are hydra/launcher"),
        ("hydra.swep.dir=x", "hydra.swep.dir=x is not known; the nearest are hydra.sweep.dir"),
        ("train.steps=abc", "train.steps=abc is not allowed; train.steps must be a whole number"),
        ("train.steps=1.5", "train.steps=1.5 is not allowed; train.steps must be a whole number"),
        ("seed=null", "seed=null is not allowed; seed must be a whole number"),
        ("stage.dt=x", "stage.dt=x is not allowed; stage.dt must be a number"),
        ("stage.tied=x", "stage.tied=x is not allowed; stage.tied must be true or false"),
        ("hardware.threads=x", "hardware.threads=x is not allowed; hardware.threads must be a whole"),
        ("data.sources=a", "data.sources=a is not allowed; data.sources must be a mapping, as in"),
        ("data.sources=null", "data.sources=null is not allowed; data.sources must be a mapping, as in"),
        ("data.sources={a:x}", "data.sources={a:x} is not allowed; data.sources.a must be a group"),
        ("data.sources={a:{pth:x}}", "data.sources.a.pth is not known; the nearest are data.sources.a.path,"),
        ("data=mix data.sources.a.pth=x", "data.sources.a.pth is not known; the nearest are data."),
        ("data.sources.a.weight=x", "data.sources.a.weight=x is not allowed; data.sources.a.weight must be"),
        ("data.path=[a,b]", "data.path=[a,b] is not allowed; data.path must be text or null"),
        ("optim.betas=3", "optim.betas=3 is not allowed; optim.betas must be a list, as in [a,b]"),
        ("train=5", "train=5 is not allowed; train must be a group of options"),
        ("data.path=a=b", f"data.path=a=b cannot be read; {QUOTE}: 'data.path=\"a=b\"'"),
        ("data.path=a[b", f"data.path=a[b cannot be read; {QUOTE}: 'data.path=\"a[b\"'"),
        ("data.path=a(b)", f"data.path=a(b) cannot be read; {QUOTE}: 'data.path=\"a(b)\"'"),
        ("data.path={a", f"data.path={{a cannot be read; {QUOTE}: 'data.path=\"{{a\"'"),
        ("data.path=a,b", f"data.path=a,b {SEVERAL}, or write 'data.path=\"a,b\"' for one text"),
        ("optim.betas=0.9,0.95", f"optim.betas=0.9,0.95 {SEVERAL}, or write 'optim.betas"),
        ("stage=1,2", f"stage=1,2 {SEVERAL}"),
        ("stage=choice(1,2)", f"stage=choice(1,2) {SEVERAL}"),
        ("train.steps", "train.steps cannot be read; options are written group=choice and"),
        ("+foo=1", "+foo=1 is not known"),
        ("++foo=1", "++foo=1 is not known"),
        ("+experiment=x", "experiment=x is not known; choose one of price_smoke, stage3_basic, "),
        ("+train.stepz=1", "+train.stepz=1 is not known; the nearest are train.steps,"),
        ("++model.real.layer=1", "++model.real.layer=1 is not known; the nearest are model.real.layers,"),
        ("benchmark=vram", "benchmark=vram is an option of bench.py, not of train.py"),
        ("+benchmark=vram", "+benchmark=vram is an option of bench.py, not of train.py"),
        ("stack.level=2", "stack.level=2 is an option of bench.py, not of train.py"),
        ("~logger", "~logger is not possible, since every run needs it; choose one of logger=csv,"),
        ("~logger=wandb", "~logger=wandb is not possible, since every run needs it"),
        ("~train", "~train is not possible, since every run needs it; without it the default holds"),
        ("~data", "~data is not possible, since every run needs it; choose one of data=files"),
        ("~optim.lr", "~optim.lr is not possible, since every run needs it; without it the default holds"),
        ("~seed", "~seed is not possible"),
        ("~foo", "Could not delete from config. 'foo' does not exist."),
        ("-m stage=1,4", "stage=4 is not known; choose one of 0, 1, 2, 3, 3a"),
        ("-m stage=choice(1,4)", "stage=4 is not known"),
        ("-m stage=range(0,5)", "stage=4 is not known"),
        ("-m stage=glob(x*)", "stage=glob(x*) is not known; choose one of 0, 1, 2, 3, 3a"),
        ("-m train.step=1,2", "train.step=1,2 is not known; the nearest are train.steps,"),
        ("-m +foo=1,2", "+foo=1,2 is not known"),
        ("-m +train.foo=1,2", "+train.foo=1,2 is not known"),
        ("-m ~logger stage=1,2", "~logger is not possible"),
        ("-m hydra.launcher._target_=a,b", "hydra.launcher._target_=a,b has several values; only"),
        ("-m hydra.sweeper.params.stage=1,4", "stage=4 is not known; choose one of 0, 1, 2, 3, 3a"),
        ("-m hydra.sweeper.params.train.step='1,2'", "train.step=1,2 is not known; the nearest"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(compose, arguments, told):
    with pytest.raises(ConfigError) as caught:
        compose(*arguments.split())
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("train.step=3", "train.step=3 is not known"),
        ("-m stage=0,4", "stage=4 is not known"),
        ("data.path=a=b", "data.path=a=b cannot be read"),
        ("+foo=1", "+foo=1 is not known"),
        ("-m train.steps=1,abc", "train.steps=abc is not allowed; train.steps must be a whole number"),
        ("-m train.steps=interval(1,2)", "train.steps=interval(1,2) needs a sweeper that searches"),
        ("--config-name=nope", "Cannot find primary config 'nope'"),
        ("--config-dir=nope", "Additional config directory"),
    ],
)
def test_what_is_wrong_ends_a_command_before_anything_is_written(run, arguments, told):
    assert refusal(run(*arguments.split())).startswith(told)


@pytest.mark.parametrize("argument", ["benchmark.repeat=3", "+benchmark.repeat=3"])
def test_options_of_bench_are_known_to_bench_alone(compose, argument):
    with pytest.raises(ConfigError, match=r"is not known; the nearest are benchmark\.repeats,"):
        compose(argument, command="bench")
    assert compose("+benchmark=vram", "stack.level=2", command="bench").stack.level == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train: {step: 3}", "train.step (in experiment/x) is not known; the nearest are train.steps"),
        ("train: {steps: abc}", "train.steps (in experiment/x) is not allowed; train.steps must be a"),
        ("foo: 3", "foo"),
        ("defaults: [override /stage: 7]", "stage=7"),
        ("train: {steps: 3", "experiment/x"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_an_experiment_file_is_one_sentence(run, tmp_path, text, told, monkeypatch):
    place = tmp_path.parent / f"{tmp_path.name} files"
    (place / "experiment").mkdir(parents=True)
    (place / "experiment" / "x.yaml").write_text(f"# @package _global_\n{text}\n")
    assert told in refusal(run("--config-dir", str(place), "+experiment=x"))


def test_what_sets_known_options_works_with_any_number_of_plus_signs(run):
    ran = run("+train.steps=3", "++train.batch_size=2", "++data.path='a=b'", "hydra.job.name=other", "seed=7")
    assert ran.err == ""
    (job,) = ran.jobs
    assert (job.train.steps, job.train.batch_size, job.data.path, job.seed) == (3, 2, "a=b", 7)
    assert run("data.path=a b").jobs[0].data.path == "a b"


ROOTS = ("file", "file/below", "/proc/none")


@pytest.mark.parametrize("multirun", [[], ["-m"]], ids=["a run", "a sweep"])
@pytest.mark.parametrize("root", ROOTS)
def test_an_output_root_that_cannot_be_written_is_one_sentence(run, tmp_path, root, multirun):
    (tmp_path / "file").write_text("mine")
    ran = run(*multirun, f"output_root={root}")
    assert (ran.status, ran.jobs) == (1, [])
    told = rf"error: output_root={root} cannot be written \([^)]+\); free some space there or choose another"
    assert re.match(told, ran.err)
    assert ran.err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_of_a_run_that_cannot_be_written_is_one_sentence(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    ran = run("hydra.run.dir=file/below")
    assert (ran.status, ran.jobs) == (1, [])
    assert ran.err.startswith("error: the folder file/below cannot be written (Not a directory);")


def test_a_disk_that_is_full_before_the_job_begins_is_one_sentence(run, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hydra.core.utils._save_config", full)
    ran = run()
    assert (ran.status, ran.jobs) == (1, [])
    assert ran.err.startswith(
        "error: no space is left for the folder of the run (No space left on device); free"
    )
    assert ran.err.count("\n") == 1
