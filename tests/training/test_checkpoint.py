from __future__ import annotations

import errno
import functools
import json
import math
import os
import random
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.configs import SEQ_LEN, VOCAB, small_sizes, stage_config
from support.runs import CrashError, contents, crash_at, same, stored
from support.training import Recorder, assert_one_sentence, run_config, run_train, snapshot
from support.waiting import PATIENCE
from torch import nn

from muse.config import OptimConfig
from muse.errors import RunError
from muse.models import LanguageModel, build_model
from muse.runs.checkpoints import (
    HASHES,
    STATE,
    TrainingState,
    adopt_checkpoints,
    find_checkpoint,
    find_damage,
    find_sound_checkpoint,
    load_state,
    load_tensors,
    load_weights,
    stored_tensors,
)
from muse.training import checkpoint as checkpoints
from muse.training.checkpoint import CheckpointWriter, random_state, restore_random_state
from muse.training.optim import ModelOptimizer

METADATA, TENSORS = ".metadata", "__0_0.distcp"
FILES = [METADATA, TENSORS, HASHES, STATE]
both_ways = pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in the background"])


def small_model(number: int = 1, precision: str = "fp32", seed: int = 0, d_model: int = 8, **stage):
    model = small_sizes(d_model=d_model, layers=1)
    return build_model(stage_config(number, precision, **stage), model, VOCAB, seed)


def training_state(step: int) -> TrainingState:
    return TrainingState(step, scaler={"scale": 65536.0}, random=[], best_loss=math.inf, wandb_id="abc")


def save(
    run: Path,
    step: int,
    model: nn.Module | None = None,
    best: bool = False,
    asynchronous: bool = False,
    **tensors: Any,
) -> Path:
    """Write a checkpoint, wait for it, and return the folder it must be in."""
    model = model if model is not None else small_model()
    writer = CheckpointWriter(run / "checkpoints", asynchronous)
    writer.save({"model": model.state_dict(), **tensors}, training_state(step), best)
    writer.finish()
    return run / "checkpoints" / f"step_{step:08d}"


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def files(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}


def flip(path: Path, place: int, mask: int = 0x9A) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= mask
    path.write_bytes(content)


def damage(path: Path, how: str) -> None:
    size = path.stat().st_size
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        os.truncate(path, size // 2)
    else:
        # In a checkpoint's largest file this is a number of a tensor, which nothing but a hash can miss.
        flip(path, size // 2)


# ---- What comes back


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("number", "mixer"), [(0, "attention"), (1, "attention"), (1, "none")], ids=["real", "complex", "seed"]
)
def test_weights_come_back(tmp_path, number, mixer, precision, tied):
    model = small_model(number, precision, tied=tied, mixer=mixer)
    saved = save(tmp_path, 7, model)
    other = small_model(number, precision, seed=1, tied=tied, mixer=mixer)
    assert not same(model.state_dict(), other.state_dict())
    load_weights(saved, other)
    assert same(model.state_dict(), other.state_dict())
    tokens = torch.arange(SEQ_LEN)[None]
    assert torch.equal(model(tokens), other(tokens))
    # Shared weights are in the file once.
    assert stored_tensors(saved) == {f"model.{n}": (p.shape, p.dtype) for n, p in model.named_parameters()}


@both_ways
def test_the_state_comes_back(tmp_path, asynchronous):
    now = random_state()
    saved = save(tmp_path, 5, asynchronous=asynchronous)
    assert same(vars(load_state(saved)), {**vars(training_state(5)), "random": [now]})


def draw() -> list[Any]:
    """Numbers of every generator; a second normal number comes from a first one's leftover."""
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.normal(),
        torch.rand(5),
        nn.functional.dropout(torch.ones(50)),
    ]


def test_the_random_states_of_python_numpy_and_torch_come_back(tmp_path):
    draw()
    saved = save(tmp_path, 1)
    expected = draw()
    torch.manual_seed(9)
    random.seed(9)
    np.random.seed(9)
    assert not any(map(same, draw(), expected))
    restore_random_state(load_state(saved).random[0])
    assert same(draw(), expected)


def test_the_random_state_of_a_gpu_comes_back(tmp_path, monkeypatch):
    state, restored = torch.arange(16, dtype=torch.uint8), []

    def with_a_gpu(act: Callable[..., Any], *arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "get_rng_state", lambda gpu: state)
            patch.setattr(torch.cuda, "set_rng_state", lambda value, gpu: restored.append(value))
            return act(*arguments)

    monkeypatch.setattr(checkpoints, "random_state", functools.partial(with_a_gpu, random_state))
    saved = save(tmp_path, 1)
    with_a_gpu(restore_random_state, load_state(saved).random[0])
    assert same(restored, [state])


@pytest.mark.gpu
def test_dropout_on_a_gpu_goes_on_where_it_was(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    ones = torch.ones(1000, device="cuda")
    saved = save(tmp_path, 1)
    first = nn.functional.dropout(ones)
    assert not same(first, nn.functional.dropout(ones))
    restore_random_state(load_state(saved).random[0])
    assert same(first, nn.functional.dropout(ones))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_random_state_of_a_gpu_is_left_out_where_there_is_none():
    state = {**random_state(), "cuda": torch.arange(16, dtype=torch.uint8)}
    expected = draw()
    restore_random_state(state)
    assert same(draw(), expected)


def test_a_model_is_loaded_in_its_own_dtype(tmp_path):
    model = small_model(precision="fp32")
    other = small_model(precision="bf16", seed=1)
    load_weights(save(tmp_path, 1, model), other)
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert b.dtype == torch.bfloat16
        assert torch.equal(a.to(torch.bfloat16), b), name


# ---- Which checkpoints are kept


def test_the_last_two_and_the_best_are_kept(tmp_path):
    expected = [
        (1, False, [1]),
        (2, True, [1, 2]),
        (3, False, [2, 3]),
        (4, False, [2, 3, 4]),
        (5, False, [2, 4, 5]),
        (6, True, [5, 6]),
        (7, False, [6, 7]),
        (8, False, [6, 7, 8]),
    ]
    model, weights = small_model(), {}
    for step, best, kept in expected:
        with torch.no_grad():
            model.norm.gain.fill_(step)
        saved = save(tmp_path, step, model, best)
        weights[step] = snapshot(model)
        names = [f"step_{kept_step:08d}" for kept_step in kept]
        assert folders(tmp_path) == (["best", *names] if step > 1 else names)
        assert find_checkpoint(tmp_path) == saved
    best = find_checkpoint(tmp_path, "best")
    assert best.name == "step_00000006"
    for path in (best, best.with_name("step_00000007"), saved):
        step = load_state(path).step
        assert path.name == f"step_{step:08d}"
        assert same(stored(path), {f"model.{name}": value for name, value in weights[step].items()})


@both_ways
def test_a_saved_step_can_be_made_the_best_later(tmp_path, asynchronous):
    first = save(tmp_path, 3, asynchronous=asynchronous)
    before = files(first)
    assert find_checkpoint(tmp_path, "best") is None
    assert save(tmp_path, 3, best=True, asynchronous=asynchronous) == first
    assert find_checkpoint(tmp_path, "best") == first
    assert files(first) == before


@pytest.mark.parametrize("content", [None, "", "step_00000009"])
def test_a_pointer_to_nothing_is_no_checkpoint(tmp_path, content):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    if content is not None:
        (folder / "best").write_text(content)
    assert find_checkpoint(tmp_path, "best") is None
    assert find_checkpoint(tmp_path) is None
    assert find_sound_checkpoint(tmp_path) is None
    saved = save(tmp_path, 1)
    assert find_checkpoint(tmp_path, "best") is None
    assert find_sound_checkpoint(tmp_path) == find_checkpoint(tmp_path) == saved


def no_links(*_: object) -> None:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


@pytest.mark.parametrize("links", [True, False])
def test_a_continued_run_takes_over_its_checkpoint_the_one_before_and_an_older_best_one(
    tmp_path, monkeypatch, links
):
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    for step, best in ((1, True), (2, False), (3, True)):
        save(tmp_path / "old", step, small_model(seed=step), best)
    old = tmp_path / "old" / "checkpoints"
    for name, kept, best in (
        ("step_00000003", ["best", "step_00000002", "step_00000003"], "step_00000003"),
        # The best one comes later than what is continued, and will come again.
        ("step_00000002", ["step_00000002"], None),
    ):
        run = tmp_path / name
        adopt_checkpoints(tmp_path / "old", old / name, run, best == name)
        assert folders(run) == kept
        assert find_checkpoint(run, "best") == (run / "checkpoints" / best if best else None)
        assert same(contents(find_sound_checkpoint(run)), contents(old / name))
    # What becomes of the old run does not matter.
    shutil.rmtree(tmp_path / "old")
    assert find_damage(tmp_path / "step_00000003" / "checkpoints" / "step_00000003") is None


@both_ways
def test_a_best_checkpoint_is_adopted_as_such_although_its_process_ended_before_it_said_so(
    tmp_path, asynchronous
):
    save(tmp_path / "old", 1, best=True)
    saved = save(tmp_path / "old", 2, best=True, asynchronous=asynchronous)
    (tmp_path / "old" / "checkpoints" / "best").write_text("step_00000001")
    adopt_checkpoints(tmp_path / "old", saved, tmp_path / "new", True)
    assert find_checkpoint(tmp_path / "new", "best") == find_checkpoint(tmp_path / "new")
    assert load_state(find_checkpoint(tmp_path / "new")).step == 2


def test_a_damaged_best_checkpoint_is_left_behind_with_a_warning(tmp_path):
    best, _, last = (save(tmp_path / "old", step, best=step == 1) for step in (1, 2, 3))
    damage(best / TENSORS, "changed")
    with pytest.warns(UserWarning, match="damaged") as caught:
        adopt_checkpoints(tmp_path / "old", last, tmp_path / "new", False)
    (message,) = [str(warning.message) for warning in caught]
    assert str(best) in message
    assert TENSORS in message
    assert "\n" not in message
    assert folders(tmp_path / "new") == ["step_00000002", "step_00000003"]


@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_that_is_damaged_after_it_was_taken_over_costs_the_steps_since_the_one_before(
    tmp_path, monkeypatch, links
):
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    before, last = (save(tmp_path / "old", step, small_model(seed=step)) for step in (2, 3))
    adopt_checkpoints(tmp_path / "old", last, tmp_path / "new", False)
    taken = find_sound_checkpoint(tmp_path / "new")
    flip(taken / TENSORS, (taken / TENSORS).stat().st_size // 2)
    with pytest.warns(UserWarning, match="damaged"):
        left = find_sound_checkpoint(tmp_path / "new")
    assert left.parent == taken.parent
    assert same(contents(left), contents(before))
    # What goes on from there takes nothing over that is damaged.
    adopt_checkpoints(tmp_path / "new", left, tmp_path / "newest", False)
    assert folders(tmp_path / "newest") == [left.name]
    # And the next checkpoint makes the oldest one go, as ever.
    save(tmp_path / "newest", 3)
    save(tmp_path / "newest", 4)
    assert folders(tmp_path / "newest") == ["step_00000003", "step_00000004"]


# ---- Asynchronous writing


@contextmanager
def held_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Tensors are not written before the event, or the end of the block."""
    write, release = dcp.FileSystemWriter.write_data, threading.Event()

    def wait_and_write(*arguments: Any) -> Any:
        assert release.wait(PATIENCE)
        return write(*arguments)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", wait_and_write)
    try:
        yield release
    finally:
        release.set()


def trained(precision: str = "bf16") -> tuple[LanguageModel, ModelOptimizer]:
    """A model and its optimiser after a step."""
    model = small_model(precision=precision)
    optimizer = ModelOptimizer(model, OptimConfig(name="muon"))
    train_once(model, optimizer, 0)
    return model, optimizer


def train_once(model: LanguageModel, optimizer: ModelOptimizer, step: int) -> None:
    model.zero_grad()
    tokens = torch.arange(SEQ_LEN + 1)[None] % VOCAB
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.attach_gradients()
    optimizer.step(step)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_holds_its_own_step_although_training_goes_on(tmp_path, monkeypatch, precision):
    model, optimizer = trained(precision)
    writer = CheckpointWriter(tmp_path / "checkpoints", asynchronous=True)
    with held_back(monkeypatch) as release:
        tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        expected = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
        now = random_state()
        writer.save(tensors, training_state(1), best=True)
        # Not even a part of it counts yet.
        assert find_checkpoint(tmp_path) is None
        for step in (1, 2):
            train_once(model, optimizer, step)
        for moment in optimizer.state_tensors():
            moment.fill_(7.0)
        torch.rand(3)
        release.set()
        writer.finish()
    saved = find_checkpoint(tmp_path)
    assert saved == find_checkpoint(tmp_path, "best")
    assert same(stored(saved, "model"), expected)
    assert not same(stored(saved, "model"), {f"model.{n}": v for n, v in model.state_dict().items()})
    left = stored(saved, "optimizer")
    assert int(left.pop("optimizer.updates")) == 1
    assert len(left) > 5
    assert not any((moment == 7.0).any() for moment in left.values())
    assert same(load_state(saved).random, [now])


def test_checkpoints_written_in_the_background_are_those_written_at_once(tmp_path):
    model, optimizer = trained()
    paths = [
        save(tmp_path / str(way), 1, model, asynchronous=way, optimizer=optimizer.state_dict())
        for way in (False, True)
    ]
    assert same(*map(contents, paths))
    assert len(stored(paths[0], "optimizer")) > 5


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path, monkeypatch):
    model = small_model()
    writer = CheckpointWriter(tmp_path / "checkpoints", asynchronous=True)
    expected = []
    for step in (1, 2, 3):
        with torch.no_grad():
            model.norm.gain.fill_(step)
        expected.append({f"model.{name}": value for name, value in snapshot(model).items()})
        writer.save({"model": model.state_dict()}, training_state(step), best=step == 1)
        with torch.no_grad():
            model.norm.gain.fill_(-1)
        assert find_checkpoint(tmp_path) == (
            tmp_path / "checkpoints" / f"step_{step - 1:08d}" if step > 1 else None
        )
    writer.finish()
    writer.finish()
    assert folders(tmp_path) == ["best", *(f"step_{step:08d}" for step in (1, 2, 3))]
    for step, weights in enumerate(expected, 1):
        assert same(stored(tmp_path / "checkpoints" / f"step_{step:08d}"), weights)


@pytest.mark.parametrize("error", [OSError(errno.EIO, os.strerror(errno.EIO)), RuntimeError("broken pipe")])
def test_an_error_of_the_writing_thread_ends_the_next_save(tmp_path, monkeypatch, error):
    def fail(*_: object) -> None:
        raise error

    model = small_model()
    first = save(tmp_path, 1, model)
    writer = CheckpointWriter(tmp_path / "checkpoints", asynchronous=True)
    with monkeypatch.context() as patch:
        patch.setattr(dcp.FileSystemWriter, "write_data", fail)
        writer.save({"model": model.state_dict()}, training_state(2), best=True)
        with pytest.raises(RunError, match=r"step 2 ") as caught:
            writer.save({"model": model.state_dict()}, training_state(3), best=True)
    assert error.args[-1].lower() in str(caught.value).lower()
    assert_one_sentence(caught.value)
    assert folders(tmp_path) == ["step_00000001"]
    assert find_sound_checkpoint(tmp_path) == first
    # The writer itself is not broken.
    writer.save({"model": model.state_dict()}, training_state(3), best=True)
    writer.finish()
    assert load_state(find_sound_checkpoint(tmp_path)).step == 3


# ---- Full disks


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_in_a_tensor(*_: object) -> None:
    """What torch.save makes of a stream that has no space."""
    try:
        no_space()
    except OSError:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")


def assert_kept(run: Path, first: Path, before: dict[str, bytes], error: RunError) -> None:
    """The failed save of step 2 said so and left nothing but the first checkpoint."""
    message = str(error)
    assert "step 2 " in message
    assert "no space is left on the disk" in message
    assert str(run / "checkpoints") in message
    assert_one_sentence(error)
    assert not [name for name in folders(run) if "tmp" in name]
    assert find_sound_checkpoint(run) == find_checkpoint(run, "best") == first
    assert files(first) == before


@both_ways
@pytest.mark.parametrize(
    ("owner", "name", "fail"),
    [
        (torch, "save", no_space),
        (Path, "mkdir", no_space),
        (dcp.FileSystemWriter, "write_data", no_space),
        (dcp.FileSystemWriter, "write_data", no_space_in_a_tensor),
        (dcp.FileSystemWriter, "finish", no_space),
        (Path, "write_text", no_space),
        (os, "fsync", no_space),
        (os, "rename", no_space),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, owner, name, fail, asynchronous):
    model = small_model(seed=1)
    first = save(tmp_path, 1, best=True)
    before = files(first)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(RunError) as caught:
            save(tmp_path, 2, model, best=True, asynchronous=asynchronous)
    assert_kept(tmp_path, first, before, caught.value)
    # With space again the same step can be saved.
    second = save(tmp_path, 2, model, asynchronous=asynchronous)
    assert find_sound_checkpoint(tmp_path) == second
    assert same(stored(second), {f"model.{key}": value for key, value in snapshot(model).items()})


@both_ways
def test_a_disk_that_is_full_after_a_checkpoint_leaves_it(tmp_path, monkeypatch, asynchronous):
    first = save(tmp_path, 1, best=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_atomically", no_space)
        with pytest.raises(RunError, match="no space is left on the disk"):
            save(tmp_path, 2, best=True, asynchronous=asynchronous)
    assert find_checkpoint(tmp_path, "best") == first
    second = find_sound_checkpoint(tmp_path)
    assert load_state(second).step == 2
    assert save(tmp_path, 2, best=True) == second == find_checkpoint(tmp_path, "best")


@both_ways
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("name", [STATE, TENSORS, f"{METADATA}.tmp"])
def test_a_device_without_space_leaves_the_previous_checkpoint(tmp_path, monkeypatch, name, asynchronous):
    first = save(tmp_path, 1, best=True)
    before = files(first)
    mkdir = Path.mkdir

    def mkdir_beside_a_full_disk(path: Path, *arguments: Any, **options: Any) -> None:
        mkdir(path, *arguments, **options)
        if "step_00000002" in path.name and not (path / name).is_symlink():
            (path / name).symlink_to("/dev/full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", mkdir_beside_a_full_disk)
        with pytest.raises(RunError) as caught:
            save(tmp_path, 2, best=True, asynchronous=asynchronous)
    assert_kept(tmp_path, first, before, caught.value)


@both_ways
def test_a_full_disk_in_training_says_what_is_kept(tmp_path, monkeypatch, asynchronous):
    config = run_config(steps=6, checkpoint_every=2, async_checkpoint=asynchronous)
    _, whole = run_train(config, tmp_path / "whole")
    write = dcp.FileSystemWriter.write_data

    def full_at_the_second(writer: Any, *arguments: Any) -> Any:
        if "step_00000004" in str(writer.checkpoint_id):
            no_space()
        return write(writer, *arguments)

    log = Recorder()
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", full_at_the_second)
    with pytest.raises(RunError, match=r"step 4 .*no space is left"):
        run_train(config, tmp_path / "full", log)
    monkeypatch.undo()
    # In the background it is noticed by the time of the next checkpoint.
    assert max(log.losses()) == (6 if asynchronous else 4)
    left = find_sound_checkpoint(tmp_path / "full")
    assert load_state(left).step == 2
    _, rest = run_train(config, tmp_path / "rest", resume_from=left)
    assert same(contents(rest.checkpoint), contents(whole.checkpoint))


# ---- Processes that end while they write


def in_a_child(act: Callable[[], None]) -> int:
    """Wait status of a child process that does ``act`` and ends."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            # A child that hangs must not hang the tests.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(PATIENCE)
            act()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def kill_at(count: int) -> None:
    """Let this process die at its operation number ``count`` on files, from 0."""
    left = [count]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" or event.startswith(("os.", "shutil.")):
            left[0] -= 1
            if left[0] == -1:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@both_ways
def test_a_process_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path, asynchronous):
    """Steps 1 (the best), 2 and 3 are there; writing 4 removes 2."""
    model = nn.Linear(3, 2)
    expected = {f"model.{name}": value for name, value in snapshot(model).items()}
    for step in (1, 2, 3):
        save(tmp_path / "start", step, model, best=step == 1)

    def write_the_fourth(run: Path, count: int) -> None:
        kill_at(count)
        save(run, 4, model, asynchronous=asynchronous)

    found = set()
    for count in range(200):
        run = tmp_path / str(count)
        shutil.copytree(tmp_path / "start", run)
        status = in_a_child(functools.partial(write_the_fourth, run, count))
        if status == 0:
            break
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            left = find_sound_checkpoint(run)
        found.add(load_state(left).step)
        assert left == find_checkpoint(run)
        assert same(stored(left), expected)
        assert find_damage(find_checkpoint(run, "best")) is None
        # A folder appears when it is complete.
        fourth = run / "checkpoints" / "step_00000004"
        assert not fourth.exists() or find_damage(fourth) is None
        # What is left behind is in nobody's way.
        again = save(run, 5, model)
        assert find_sound_checkpoint(run) == again
        assert same(stored(again), expected)
        kept = {path.name for path in (run / "checkpoints").glob("*step_*")}
        assert kept == {"step_00000001", "step_00000005", max(kept - {"step_00000005"})}
        shutil.rmtree(run)
    assert count > 15
    # Some died before the checkpoint counted, and some after.
    assert found == {3, 4}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_killed_while_it_takes_over_checkpoints_leaves_whole_ones_and_no_last_without_a_best(
    tmp_path,
):
    old, run = tmp_path / "old", tmp_path / "new"
    best, last = save(old, 1, best=True), save(old, 2)

    def adopt(count: int) -> None:
        kill_at(count)
        adopt_checkpoints(old, last, run, False)

    for count in range(200):
        status = in_a_child(functools.partial(adopt, count))
        left = sorted((run / "checkpoints").glob("step_*"))
        assert all(find_damage(path) is None for path in left)
        assert last.name not in [path.name for path in left] or find_checkpoint(run, "best") is not None
        if status == 0:
            break
        shutil.rmtree(run, ignore_errors=True)
    assert count > 15
    assert [path.name for path in left] == [best.name, last.name]


def test_a_half_written_checkpoint_is_swept_away_by_the_next_writer(tmp_path):
    first = save(tmp_path, 1)
    half = tmp_path / "checkpoints" / ".step_00000002.tmp"
    shutil.copytree(first, half)
    damage(half / TENSORS, "truncated")
    (half / "junk").write_text("junk")
    assert find_sound_checkpoint(tmp_path) == first
    CheckpointWriter(tmp_path / "checkpoints")
    assert folders(tmp_path) == ["step_00000001"]
    # Even one that is found in the place of the next checkpoint gets nothing into it.
    writer = CheckpointWriter(tmp_path / "checkpoints")
    half.mkdir()
    (half / "junk").write_text("junk")
    writer.save({"model": small_model().state_dict()}, training_state(2), best=False)
    assert sorted(files(find_sound_checkpoint(tmp_path))) == FILES


# ---- Damaged checkpoints


def ways_to_damage() -> list[Any]:
    return [
        pytest.param(file, how, id=f"{file} {how}")
        for file in FILES
        for how in ("changed", "truncated", "missing")
    ]


@pytest.mark.parametrize(("file", "how"), ways_to_damage())
def test_the_checkpoint_before_a_damaged_one_is_used_with_a_warning(tmp_path, file, how):
    _, before, last = (save(tmp_path, step, small_model(seed=step), best=step == 1) for step in (1, 2, 3))
    assert find_sound_checkpoint(tmp_path) == last
    damage(last / file, how)
    with pytest.warns(UserWarning, match="damaged") as caught:
        assert find_sound_checkpoint(tmp_path) == before
    (message,) = [str(warning.message) for warning in caught]
    assert str(last) in message
    assert file in message
    assert "\n" not in message


@pytest.mark.parametrize(("file", "how"), ways_to_damage())
def test_nothing_is_loaded_from_a_damaged_checkpoint(tmp_path, file, how):
    saved = save(tmp_path, 3, small_model(seed=1))
    damage(saved / file, how)
    model = small_model()
    with pytest.raises(RunError, match="damaged") as caught:
        load_weights(saved, model)
    assert str(saved) in str(caught.value)
    assert_one_sentence(caught.value)
    assert same(model.state_dict(), small_model().state_dict())


def test_if_all_are_damaged_one_sentence_says_so(tmp_path):
    for step, file in ((1, TENSORS), (2, STATE), (3, METADATA)):
        damage(save(tmp_path, step, best=step == 1) / file, "changed")
    with pytest.warns(UserWarning, match="damaged") as warned, pytest.raises(RunError) as caught:
        find_sound_checkpoint(tmp_path)
    assert len(warned) == 3
    message = str(caught.value)
    assert f"every checkpoint of {tmp_path} is damaged" in message
    assert "resume=never" in message
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("file", [METADATA, TENSORS, STATE])
def test_every_changed_byte_is_found(tmp_path, file):
    saved = save(tmp_path, 3)
    path = saved / file
    size = path.stat().st_size
    generator = torch.Generator().manual_seed(0)
    for place in [0, size - 1, *torch.randint(size, (60,), generator=generator).tolist()]:
        flip(path, place, 1)
        assert file in find_damage(saved)
        flip(path, place, 1)
    assert find_damage(saved) is None


def test_a_changed_byte_of_the_hashes_is_found_unless_it_means_the_same(tmp_path):
    saved = save(tmp_path, 3)
    path = saved / HASHES
    before = json.loads(path.read_text())
    assert sorted([*before, HASHES]) == FILES
    for place in range(path.stat().st_size):
        # The third makes a tabulator of a space.
        mask = (0x01, 0x20, 0x29, 0x80)[place % 4]
        flip(path, place, mask)
        try:
            unchanged = json.loads(path.read_text(encoding="utf-8")) == before
        except ValueError:
            unchanged = False
        assert (find_damage(saved) is None) == unchanged
        flip(path, place, mask)


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
def test_a_damaged_state_is_named_in_one_sentence(tmp_path, how):
    saved = save(tmp_path, 3)
    path = saved / STATE
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(garble(path.read_bytes(), how))
    with pytest.raises(RunError, match="damaged") as caught:
        load_state(saved)
    assert str(saved) in str(caught.value)
    assert_one_sentence(caught.value)


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


OTHERS = [{"d_model": 16}, {"number": 0}, {"tied": False}, {"mixer": "none"}, {"norm": "layer"}]


@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_the_weights_of_another_model_are_refused(tmp_path, other, swapped):
    first, second = {}, other
    if swapped:
        first, second = second, first
    saved, model = save(tmp_path, 3, small_model(**second)), small_model(**first)
    with pytest.raises(RunError, match="another model") as caught:
        load_weights(saved, model)
    assert same(model.state_dict(), small_model(**first).state_dict())
    assert str(saved) in str(caught.value)
    assert_one_sentence(caught.value)


def test_a_checkpoint_that_cannot_be_read_is_not_called_one_of_another_model(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    saved = save(tmp_path, 3)
    monkeypatch.setattr(dcp.FileSystemReader, "read_data", fail)
    with pytest.raises(RunError, match=f"{saved} cannot be read: .*{os.strerror(errno.EIO)}") as caught:
        load_weights(saved, small_model())
    assert "another model" not in str(caught.value)
    assert caught.value.of_all_ranks
    assert_one_sentence(caught.value)


def test_the_moments_of_another_optimizer_are_refused(tmp_path):
    model = small_model()
    adamw, muon = (ModelOptimizer(model, OptimConfig(name=name)) for name in ("adamw", "muon"))
    saved = save(tmp_path, 1, model, optimizer=adamw.state_dict())
    with pytest.raises(RunError, match="another model") as caught:
        load_tensors(saved, {"model": model.state_dict(), "optimizer": muon.state_dict()})
    assert_one_sentence(caught.value)


def test_a_damaged_checkpoint_stops_a_resumed_run_before_its_first_step(tmp_path):
    config = run_config(steps=4, checkpoint_every=2)
    with pytest.raises(CrashError):
        run_train(config, tmp_path / "first", Recorder(react=crash_at(3)))
    checkpoint = find_checkpoint(tmp_path / "first")
    damage(checkpoint / TENSORS, "truncated")
    log = Recorder()
    with pytest.raises(RunError, match="damaged"):
        run_train(config, tmp_path / "second", log, checkpoint)
    assert log.lines == []
