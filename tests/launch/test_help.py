"""--help: every option has a meaning, every choice of a group too, and both are shown."""

from __future__ import annotations

import dataclasses
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from muse import config
from muse.config import BenchConfig, BenchmarkConfig, OptimConfig, RunConfig, StageConfig
from muse.options import allowed_values, nearest, options_of, summary, type_name

ROOT = Path(__file__).resolve().parents[2]
GROUPS = [value for value in vars(config).values() if dataclasses.is_dataclass(value)]


@pytest.mark.parametrize("schema", GROUPS, ids=lambda schema: schema.__name__)
def test_each_group_and_option_is_described(schema):
    assert summary(schema)
    undescribed = {name for name, option in options_of(schema).items() if not option.meaning}
    assert not undescribed


def test_types_are_told_in_words():
    options = options_of(BenchConfig)
    told = {
        "train.steps": "a whole number",
        "stage.dt": "a number",
        "benchmark.dt": "a number or null",
        "stage.tied": "true or false",
        "data.path": "text or null",
        "optim.betas": "a list, as in [a,b]",
        "model.real": "a group of options",
    }
    assert {path: type_name(options[path].type) for path in told} == told


def test_the_values_allowed_may_depend_on_other_options():
    real = StageConfig(number="0", activation="gelu")
    assert allowed_values(real, "activation") == ("gelu", "swiglu")
    assert "swiglu" not in allowed_values(StageConfig(), "activation")
    assert allowed_values(BenchmarkConfig(), "dtypes") == ("float32", "bfloat16", "float16")
    for name in ("betas", "lr", "warmup"):
        assert allowed_values(OptimConfig(), name) == ()


def test_the_nearest_names_are_those_of_the_same_option_elsewhere_and_of_slips():
    options = list(options_of(BenchConfig))
    assert nearest("train.step", options)[0] == "train.steps"
    assert nearest("batch_size", options)[:2] == ["train.batch_size", "benchmark.batch_size"]
    assert nearest("lr", options) == ["model.lr", "optim.lr"]
    assert nearest("zzz", options) == []


@pytest.fixture
def shown(monkeypatch, capsys, tmp_path):
    """What a command shows with arguments: its exit status, standard output and error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr("muse.processes.signals.install_command_handlers", lambda: None)

    def show(*arguments: str, script: str = "train.py"):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert not list(tmp_path.iterdir())
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return show


@pytest.mark.parametrize(("script", "schema"), [("train.py", RunConfig), ("bench.py", BenchConfig)])
def test_help_says_of_each_option_what_it_is(shown, script, schema):
    status, out, _ = shown("--help", script=script)
    assert status == 0
    assert max(map(len, out.splitlines())) <= 100
    words = " ".join(out.split())
    for path, option in options_of(schema).items():
        assert option.meaning in words, path
        if not dataclasses.is_dataclass(option.type):
            assert any(line.startswith(f"  {path}=") for line in out.splitlines()), path
    assert "  stage                           0, 1, 2, 3, 3a" in out.splitlines()
    assert ("  benchmark  " in out) == (script == "bench.py")


def test_help_of_a_group_says_what_each_choice_is_and_what_an_option_may_be(shown):
    status, out, _ = shown("--help", "stage")
    assert status == 0
    words = " ".join(out.split())
    assert "2 The complex model with Hamiltonian flows, two a block" in words
    integrator = options_of(StageConfig)["integrator"].meaning
    assert f"stage.integrator=leapfrog {integrator} [one of leapfrog," in words
    assert "stage.ode_steps=1 steps of the flow" in words
    assert "[a whole number, at least 1]" in words
    assert "[a whole number, between 8 and 28]" in words
    assert "optim." not in out


def test_help_of_an_option_has_the_value_it_is_given(shown):
    status, out, _ = shown("stage=0", "--help", "stage.activation", "optim.lr", "model=seed")
    assert status == 0
    assert "stage.activation=swiglu" in out
    assert "[one of gelu, swiglu]" in out
    assert "optim.lr=0.0006" in out
    assert "[a number, greater than 0; model.lr unless given]" in out


@pytest.mark.parametrize(
    ("option", "limit"),
    [
        ("tokenizer.vocab_size", "at least 257"),
        ("logger.tags", "each of 1 to 64 characters"),
        ("logger.group", "of 1 to 128 characters"),
    ],
)
def test_help_of_an_option_has_its_limits(shown, option, limit):
    assert limit in shown("--help", option)[1]


def test_help_of_a_launcher_says_what_each_is(shown):
    status, out, _ = shown("--help", "hydra/launcher")
    assert status == 0
    assert "Cells side by side on this machine" in out


def test_help_of_what_does_not_exist_names_the_nearest(shown):
    status, out, err = shown("--help", "stagee.dt")
    assert status == 1
    assert out == ""
    assert err.startswith(
        "error: --help stagee.dt: there is no such group or option; the nearest are stage.dt"
    )
    assert err.count("\n") == 1


@pytest.mark.parametrize("path", sorted((ROOT / "conf").glob("*/*.yaml")), ids=lambda path: path.stem)
def test_each_choice_of_a_group_says_what_it_is(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("# ") and "@package" not in line for line in lines[:2])


def test_hydra_has_its_own_help(shown):
    status, out, _ = shown("--hydra-help")
    assert status == 0
    assert "--multirun" in out


def test_flags_may_stand_between_options(shown):
    status, out, _ = shown("seed=7", "--cfg", "job", "stage=2")
    assert status == 0
    assert "number: '2'" in out
    assert "seed: 7" in out


def test_a_flag_that_does_not_exist_is_one_sentence(shown):
    status, _, err = shown("--train.steps=3")
    assert (status, err) == (
        1,
        "error: --train.steps=3 is not known; options have no dashes, as in train.steps=100\n",
    )


@pytest.mark.parametrize("script", ["train.py", "bench.py"])
def test_help_needs_no_torch_and_its_reader_may_leave(script):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['it', '--help']\n"
        "class Gone:\n"
        "    def write(self, text): raise BrokenPipeError\n"
        "    def flush(self): pass\n"
        "    def fileno(self): return 1\n"
        "sys.stdout = Gone()\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
