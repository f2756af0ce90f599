from __future__ import annotations

import errno
import functools
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from training_helpers import (
    SEQ_LEN,
    VOCAB,
    CrashError,
    Recorder,
    crash_at,
    run_config,
    run_train,
    same,
    stage_config,
)

from muse.config import ModelConfig, WidthConfig
from muse.errors import RunError
from muse.models import LanguageModel, build_model
from muse.training import checkpoint as checkpoints
from muse.training.checkpoint import (
    STATE,
    WEIGHTS,
    TrainingState,
    find_checkpoint,
    load_state,
    load_weights,
    random_state,
    read_pointer,
    restore_random_state,
    save_checkpoint,
)


def small_model(number: int = 1, precision: str = "fp32", seed: int = 0, d_model: int = 8, **stage):
    width = WidthConfig(d_model=d_model, layers=1, heads=2, kv_heads=1, d_ff=16)
    model = ModelConfig("nano", VOCAB, SEQ_LEN, real=width, complex=width)
    return build_model(stage_config(number, precision, **stage), model, VOCAB, seed)


def training_state(step: int) -> TrainingState:
    return TrainingState(
        step=step,
        optimizers=[{"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(4)}}, "lr": 0.1}],
        scaler={"scale": 65536.0},
        random=random_state(),
        best_loss=math.inf,
        wandb_id="abc",
    )


def save(folder: Path, step: int, model: LanguageModel | None = None, best: bool = False) -> Path:
    model = model if model is not None else small_model()
    return save_checkpoint(folder / "checkpoints", model, training_state(step), best)


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("number", "mixer"), [(0, "attention"), (1, "attention"), (1, "none")], ids=["real", "complex", "seed"]
)
def test_weights_and_state_come_back(tmp_path, number, mixer, precision, tied):
    model = small_model(number, precision, tied=tied, mixer=mixer)
    saved = save(tmp_path, 7, model)
    other = small_model(number, precision, seed=1, tied=tied, mixer=mixer)
    assert not same(model.state_dict(), other.state_dict())
    load_weights(saved, other)
    assert same(model.state_dict(), other.state_dict())
    tokens = torch.arange(SEQ_LEN)[None]
    assert torch.equal(model(tokens), other(tokens))
    with safe_open(saved / WEIGHTS, "pt") as file:
        assert set(file.keys()) == {name for name, _ in model.named_parameters()}


def test_the_state_comes_back(tmp_path):
    state = training_state(5)
    state.optimizers[0]["bfloat16"] = torch.randn(3).to(torch.bfloat16)
    saved = save_checkpoint(tmp_path, small_model(), state, best=False)
    assert same(vars(load_state(saved)), vars(state))


def test_the_random_state_comes_back():
    state = random_state()
    first = torch.rand(5), torch.nn.functional.dropout(torch.ones(50))
    restore_random_state(state)
    assert same(first, (torch.rand(5), torch.nn.functional.dropout(torch.ones(50))))


def test_a_model_is_loaded_in_its_own_dtype(tmp_path):
    model = small_model(precision="fp32")
    other = small_model(precision="bf16", seed=1)
    load_weights(save(tmp_path, 1, model), other)
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert b.dtype == torch.bfloat16
        assert torch.equal(a.to(torch.bfloat16), b), name


def test_only_the_last_and_the_best_are_kept(tmp_path):
    expected = [
        (1, False, ["last", "step_00000001"]),
        (2, True, ["best", "last", "step_00000002"]),
        (3, False, ["best", "last", "step_00000002", "step_00000003"]),
        (4, False, ["best", "last", "step_00000002", "step_00000004"]),
        (5, True, ["best", "last", "step_00000005"]),
    ]
    for step, best, names in expected:
        saved = save(tmp_path, step, best=best)
        assert folders(tmp_path) == names
        assert find_checkpoint(tmp_path) == saved
        assert load_state(saved).step == step
    assert read_pointer(tmp_path / "checkpoints", "best") == "step_00000005"


def test_a_saved_step_can_be_made_the_best_later(tmp_path):
    first = save(tmp_path, 3)
    before = (first / STATE).read_bytes()
    assert find_checkpoint(tmp_path, "best") is None
    assert save(tmp_path, 3, best=True) == first
    assert find_checkpoint(tmp_path, "best") == first
    assert (first / STATE).read_bytes() == before


@pytest.mark.parametrize("content", [None, "", "step_00000009"])
def test_a_pointer_to_nothing_is_no_checkpoint(tmp_path, content):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    if content is not None:
        (folder / "last").write_text(content)
    assert find_checkpoint(tmp_path) is None


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (checkpoints, "save_file"),
        (torch, "save"),
        (os, "fsync"),
        (os, "rename"),
        (checkpoints, "write_atomically"),
    ],
)
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, owner, name):
    model = small_model()
    first = save(tmp_path, 1, model, best=True)
    contents = {path.name: path.read_bytes() for path in first.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, no_space)
        with pytest.raises(RunError, match=r"step 2 .*no space is left on the disk") as caught:
            save(tmp_path, 2, small_model(seed=1))
    assert "\n" not in str(caught.value)
    assert not [path for path in folders(tmp_path) if "tmp" in path]
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path, "best") == first
    assert {path.name: path.read_bytes() for path in first.iterdir()} == contents
    # With space again the same step can be saved.
    assert find_checkpoint(tmp_path) != save(tmp_path, 2, small_model(seed=1))
    assert load_state(find_checkpoint(tmp_path)).step == 2


@pytest.mark.parametrize("name", ["save_file", "write_atomically"])
def test_a_write_that_is_cut_short_leaves_the_previous_checkpoint(tmp_path, monkeypatch, name):
    write = getattr(checkpoints, name)

    def write_half(*arguments: object) -> None:
        write(*arguments)
        for path in arguments:
            if isinstance(path, Path) and path.is_file():
                raise CrashError

    first = save(tmp_path, 1)
    monkeypatch.setattr(checkpoints, name, write_half)
    with pytest.raises(CrashError):
        save(tmp_path, 2)
    monkeypatch.undo()
    found = find_checkpoint(tmp_path)
    # Either the old one or the new one, and whole.
    assert found in (first, first.with_name("step_00000002"))
    assert load_state(found).step == (1 if found == first else 2)
    load_weights(found, small_model())


def test_a_full_disk_in_training_says_what_is_kept(tmp_path, monkeypatch):
    config = run_config(steps=6, checkpoint_every=2)
    _, whole = run_train(config, tmp_path / "whole")
    save_file = checkpoints.save_file

    def full_at_the_second(weights: object, path: Path) -> None:
        if "step_00000004" in str(path):
            no_space()
        save_file(weights, path)

    monkeypatch.setattr(checkpoints, "save_file", full_at_the_second)
    with pytest.raises(RunError, match="step 4"):
        run_train(config, tmp_path / "full")
    monkeypatch.undo()
    left = find_checkpoint(tmp_path / "full")
    assert load_state(left).step == 2
    _, rest = run_train(config, tmp_path / "rest", resume_from=left)
    assert (rest.checkpoint / WEIGHTS).read_bytes() == (whole.checkpoint / WEIGHTS).read_bytes()


def garble(content: bytes, how: str) -> bytes:
    return {
        "empty": b"",
        "half": content[: len(content) // 2],
        "one byte short": content[:-1],
        "first bytes": bytes(64) + content[64:],
        "text": b"not a checkpoint\n" * 8,
        "noise": bytes((7 * i * i + 3 * i) % 256 for i in range(len(content))),
    }[how]


@pytest.mark.parametrize(
    "how", ["empty", "half", "one byte short", "first bytes", "text", "noise", "missing"]
)
@pytest.mark.parametrize("file", [WEIGHTS, STATE])
def test_a_damaged_file_is_named_in_one_sentence(tmp_path, file, how):
    saved = save(tmp_path, 3)
    path = saved / file
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(garble(path.read_bytes(), how))
    load = load_state if file == STATE else functools.partial(load_weights, model=small_model())
    with pytest.raises(RunError, match="damaged") as caught:
        load(saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_changed_byte_of_the_state_raises_no_other_error(tmp_path):
    saved = save(tmp_path, 3)
    path = saved / STATE
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    messages = []
    for place in torch.randint(len(content), (400,), generator=generator).tolist():
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x9A]) + content[place + 1 :])
        try:
            load_state(saved)
        except RunError as error:
            messages.append(str(error))
    assert len(messages) > 30
    assert all(str(saved) in message and "\n" not in message for message in messages)


@pytest.mark.parametrize(
    "other",
    [{"d_model": 16}, {"number": 0}, {"tied": False}, {"mixer": "none"}, {"norm": "layer"}],
    ids=lambda value: str(value),
)
def test_the_weights_of_another_model_are_refused(tmp_path, other):
    saved = save(tmp_path, 3, small_model(**other))
    with pytest.raises(RunError, match="another model") as caught:
        load_weights(saved, small_model())
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_stops_a_resumed_run_before_its_first_step(tmp_path):
    config = run_config(steps=4, checkpoint_every=2)
    with pytest.raises(CrashError):
        run_train(config, tmp_path / "first", Recorder(react=crash_at(3)))
    checkpoint = find_checkpoint(tmp_path / "first")
    path = checkpoint / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    log = Recorder()
    with pytest.raises(RunError, match="damaged"):
        run_train(config, tmp_path / "second", log, checkpoint)
    assert log.lines == []
