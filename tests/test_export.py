from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.configs import small_width

import muse
from muse import export
from muse.benchmarks.model import benchmark_model
from muse.config import (
    BenchConfig,
    BenchmarkConfig,
    DataConfig,
    HardwareConfig,
    LoggerConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
)
from muse.errors import ConfigError, RunError
from muse.export import export_run, load_exported
from muse.files import write_json
from muse.models import LanguageModel, build_model
from muse.runs.checkpoints import TrainingState, load_weights
from muse.runs.folder import RUN_FILE
from muse.runs.provenance import provenance
from muse.training.checkpoint import CheckpointWriter

VOCAB, SEQ_LEN = 29, 8
STAGES = {
    "real": {"number": "0", "activation": "gelu"},
    "complex": {"number": "1"},
    "stored in bf16": {"number": "1", "precision": "bf16"},
    "untied": {"number": "1", "tied": False, "mixer": "none"},
    "flow": {"number": "2"},
}


def run_config(**stage: Any) -> RunConfig:
    width = small_width(d_ff=12)
    return RunConfig(
        stage=StageConfig(**{"precision": "fp32", "dropout": 0.1, **stage}),
        # More than the vocabulary of the data has, as it may be.
        model=ModelConfig("nano", VOCAB + 3, SEQ_LEN, real=width, complex=width),
        data=DataConfig(name="text", path="Größe.txt"),
        optim=OptimConfig(lr=3e-3, betas=[0.9, 0.98], clip=0.0),
        hardware=HardwareConfig(device="cpu", memory_gb=1.5),
        logger=LoggerConfig(mode="disabled"),
        train=TrainConfig(steps=7, batch_size=2, eval_stride=3),
        seed=5,
    )


def random_model(config: RunConfig, seed: int) -> LanguageModel:
    """A model none of whose parameters and counts is what another one begins with."""
    model = build_model(config.stage, config.model, VOCAB, seed)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, values in model.state_dict().items():
        change = torch.rand(values.shape, generator=generator)
        weights[name] = values + (0.1 if values.is_floating_point() else 8.0) * change
    model.load_state_dict(weights)
    return model


def make_run(run: Path, config: RunConfig, best: int | None = 3, last: int = 7) -> dict[int, LanguageModel]:
    """A run as train.py leaves it, with a checkpoint of the best step and one of the last."""
    models = {}
    for step in (best, last):
        if step is None:
            continue
        model = models[step] = random_model(config, step)
        moments = {"moments": {"exp_avg": torch.ones(4)}, "updates": torch.tensor(step)}
        CheckpointWriter(run / "checkpoints").save(
            {"model": model.state_dict(), "optimizer": moments},
            TrainingState(step, {}, [], math.inf, None),
            best=step == best,
        )
    write_json(run / RUN_FILE, provenance(config))
    return models


@pytest.fixture
def config() -> RunConfig:
    return run_config()


@pytest.fixture
def run(tmp_path: Path, config: RunConfig) -> Path:
    make_run(tmp_path / "run", config)
    return tmp_path / "run"


def assert_same_weights(first: LanguageModel, second: LanguageModel) -> None:
    weights, others = first.state_dict(), second.state_dict()
    assert weights.keys() == others.keys()
    for name, values in weights.items():
        assert values.dtype == others[name].dtype
        assert torch.equal(values, others[name]), name


def assert_one_sentence(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert "Traceback" not in str(error)


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_configuration_and_model_come_back_bit_for_bit(tmp_path, stage):
    config = run_config(**stage)
    models = make_run(tmp_path / "run", config)
    file = tmp_path / "deep" / "folder" / "model.safetensors"
    assert export_run(tmp_path / "run", file) == 3
    model, tokenizer, found = load_exported(file)
    # Of a run that kept none, and whose text is gone.
    assert tokenizer is None
    assert found == config
    assert_same_weights(model, models[3])
    tokens = torch.arange(SEQ_LEN)[None]
    assert torch.equal(model.eval()(tokens), models[3].eval()(tokens))
    # Other programs find there what they need as well.
    with safe_open(file, "pt") as opened:
        assert set(opened.keys()) == set(model.state_dict())
        assert json.loads(opened.metadata()["config"]) == dataclasses.asdict(config)
        assert opened.metadata()["step"] == "3"


@pytest.mark.parametrize(("which", "best", "step"), [("best", 3, 3), ("last", 3, 7), ("best", None, 7)])
def test_the_checkpoint_asked_for_is_exported(tmp_path, config, which, best, step):
    models = make_run(tmp_path / "run", config, best)
    assert export_run(tmp_path / "run", tmp_path / "model.safetensors", which) == step
    assert_same_weights(muse.load(tmp_path / "model.safetensors").model, models[step])


def test_an_exported_model_is_what_a_benchmark_measures(tmp_path, run, config):
    file = tmp_path / "model.safetensors"
    export_run(run, file)
    sizes = dataclasses.replace(config.model, vocab_size=VOCAB)
    models = []
    for checkpoint in (file, run):
        benchmark = BenchmarkConfig(checkpoint=str(checkpoint))
        bench = BenchConfig(stage=config.stage, model=sizes, benchmark=benchmark)
        models.append(benchmark_model(bench, torch.device("cpu")))
    assert_same_weights(*models)
    assert_same_weights(models[0], muse.load(file).model)


def test_exported_weights_are_loaded_in_the_dtype_of_the_model(tmp_path, run):
    file = tmp_path / "model.safetensors"
    export_run(run, file)
    model = random_model(run_config(precision="bf16"), 1)
    load_weights(file, model)
    for (name, a), (_, b) in zip(
        model.named_parameters(), muse.load(file).model.named_parameters(), strict=True
    ):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b.bfloat16()), name


@pytest.mark.parametrize("other", [{"number": "0", "activation": "gelu"}, {"tied": False}, {"mixer": "none"}])
def test_the_weights_of_another_model_are_refused(tmp_path, run, other):
    file = tmp_path / "model.safetensors"
    export_run(run, file)
    with pytest.raises(RunError, match="another model") as caught:
        load_weights(file, random_model(run_config(**other), 1))
    assert str(file) in str(caught.value)
    assert_one_sentence(caught.value)


def cut(file: Path, size: int) -> None:
    os.truncate(file, size)


def spoil_header(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[8:40] = bytes(32)
    file.write_bytes(content)


DAMAGES = {
    "empty": lambda file: cut(file, 0),
    "cut in its header": lambda file: cut(file, 100),
    "cut in its weights": lambda file: cut(file, file.stat().st_size - 10),
    "header": spoil_header,
    "text": lambda file: file.write_text("not a model\n" * 20),
    "missing": lambda file: file.unlink(),
    "folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("spoil", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_one_sentence(tmp_path, run, config, spoil):
    file = tmp_path / "model.safetensors"
    export_run(run, file)
    spoil(file)
    for loaded in (lambda: muse.load(file), lambda: load_weights(file, random_model(config, 1))):
        with pytest.raises(RunError, match="damaged") as caught:
            loaded()
        assert str(file) in str(caught.value)
        assert_one_sentence(caught.value)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"config": "{}"[:1]},
        {"config": "[]"},
        {"config": '{"stage": {"number": "9"}}'},
        {"config": '{"stage": {"wings": 2}}'},
        {"config": '{"train": {"steps": "many"}}'},
    ],
    ids=str,
)
def test_a_file_of_another_program_is_one_sentence(tmp_path, run, metadata):
    file = tmp_path / "model.safetensors"
    export_run(run, file)
    save_file(load_file(file), file, metadata)
    with pytest.raises(RunError, match="no model that MUSE exported") as caught:
        muse.load(file)
    assert_one_sentence(caught.value)


def test_a_configuration_that_does_not_fit_its_weights_is_another_model(tmp_path, run, config):
    file = tmp_path / "model.safetensors"
    export_run(run, file)
    changed = dataclasses.asdict(
        dataclasses.replace(config, stage=dataclasses.replace(config.stage, tied=False))
    )
    save_file(load_file(file), file, {"config": json.dumps(changed), "step": "3"})
    with pytest.raises(RunError, match="another model"):
        muse.load(file)


@pytest.mark.parametrize("name", ["model", "model.pt", "model.safetensors.gz", ".safetensors"])
def test_a_name_without_its_ending_is_refused(tmp_path, run, name):
    with pytest.raises(ConfigError, match=r"\.safetensors"):
        export_run(run, tmp_path / name)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("lost", ["everything", RUN_FILE, "checkpoints", "contents of run.json"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, run, lost):
    if lost == "contents of run.json":
        (run / RUN_FILE).write_text("{}")
    elif lost == "everything":
        run = tmp_path / "nowhere"
    else:
        (run / lost).rename(tmp_path / "lost")
    with pytest.raises(ConfigError, match="not the folder of a run with a checkpoint") as caught:
        export_run(run, tmp_path / "model.safetensors")
    assert str(run) in str(caught.value)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("how", ["changed", "truncated", "missing"])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "hashes.json", "state.pt"])
def test_nothing_is_exported_from_a_damaged_checkpoint(tmp_path, run, name, how):
    path = run / "checkpoints" / "step_00000003" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x9A
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content if how == "changed" else content[: len(content) // 2])
    with pytest.raises(RunError, match="damaged") as caught:
        export_run(run, tmp_path / "model.safetensors")
    # Which of its files it is.
    assert name in str(caught.value)
    assert_one_sentence(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def fail_after(write: Any, error: BaseException) -> Any:
    """``write``, which stops when half of the file is there."""

    def write_half(weights: Any, path: Path, metadata: Any) -> None:
        write(weights, path, metadata)
        os.truncate(path, Path(path).stat().st_size // 2)
        raise error

    return write_half


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("before", [None, b"something else"], ids=["new", "there"])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, run, monkeypatch, error, before):
    file = tmp_path / "model.safetensors"
    if before is not None:
        file.write_bytes(before)
    with monkeypatch.context() as patch:
        patch.setattr(export, "save_file", fail_after(save_file, error))
        with pytest.raises(RunError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
            export_run(run, file)
    if isinstance(error, OSError):
        assert f"{file} could not be written" in str(caught.value)
        assert "No space left" in str(caught.value)
        assert_one_sentence(caught.value)
    assert (file.read_bytes() if file.exists() else None) == before
    assert {path.name for path in tmp_path.iterdir()} == {"run"} | ({file.name} if before else set())
    assert export_run(run, file) == 3
    muse.load(file)
    assert {path.name for path in tmp_path.iterdir()} == {"run", file.name}


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, run):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RunError, match="could not be written") as caught:
        export_run(run, tmp_path / "taken" / "model.safetensors")
    assert_one_sentence(caught.value)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    export.main()


def test_the_command_tells_the_step(tmp_path, run, monkeypatch, capsys):
    file = tmp_path / "model.safetensors"
    for which, step in (("best", 3), ("last", 7)):
        command(monkeypatch, run, file, "--which", which)
        assert capsys.readouterr().out == f"the weights after step {step} are in {file}\n"


def test_an_error_of_the_command_is_its_exit_status(tmp_path, run, monkeypatch):
    for arguments in ((run, tmp_path / "model.pt"), (tmp_path / "nowhere", tmp_path / "model.safetensors")):
        with pytest.raises(SystemExit) as caught:
            command(monkeypatch, *arguments)
        # Python prints a text to standard error and exits with status 1.
        assert str(caught.value.code).startswith("error: ")
        assert_one_sentence(caught.value)
