"""train.py on two ranks: under torchrun, and in processes as torchrun starts them."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support.distributed import Job, options, script, train_py, wait_for_steps
from support.processes import be_command
from support.ranks import Ranks
from support.runs import errors, logged, read_json, run_folders, same, stored

from muse.dynamics import HamiltonianNeuralODE
from muse.errors import ConfigError, RunError
from muse.measure import matrix_products
from muse.processes.torchrun import launched_rank
from muse.report.metrics import MetricsLog
from muse.runs.checkpoints import find_checkpoint, find_sound_checkpoint
from muse.training import run as train_run
from muse.training.checkpoint import CheckpointWriter
from muse.training.profile import STEPS as STEPS_OF_PROFILE

STEPS = 12
LOST = re.compile(r"error: the ranks do not reach each other \(.+\); if one of them ended, it said why")


def run_options(place: Path, root: str, together: str, *more: str, stage: str = "2") -> list[str]:
    periods = [f"train.steps={STEPS}", "train.eval_every=6", "train.checkpoint_every=3"]
    return options(place, root, together, *periods, *more, stage=stage)


def assert_same_end(first: Path, second: Path) -> None:
    assert same(stored(find_checkpoint(first)), stored(find_checkpoint(second)))
    assert logged(first) == logged(second)
    one, other = (read_json(run / "result.json") for run in (first, second))
    assert (one["valid"], one["steps"]) == (other["valid"], other["steps"])


@pytest.fixture(scope="module")
def finished(place: Path) -> dict[str, Ranks]:
    """The ranks of an undisturbed run of each way to train together."""
    found = {}
    for together in ("ddp", "fsdp"):
        ranks = found[together] = train_py(2, place, run_options(place, together, together))
        assert ranks.wait() == [0, 0], ranks.err()
    return found


@pytest.fixture(scope="module")
def undisturbed(place: Path, finished: dict[str, Ranks]) -> dict[str, Path]:
    """The folders of these runs."""
    return {together: run_folders(place / together)[0] for together in finished}


@pytest.mark.slow
def test_the_first_rank_alone_prints_and_writes(place, undisturbed):
    job = Job(place, run_options(place, "torchrun", "ddp"))
    status, out, err = job.finish()
    assert status == 0, err
    (run,) = run_folders(place / "torchrun")
    assert_same_end(run, undisturbed["ddp"])
    for once in ("2 ranks", "validation loss", "split  loss", "sample, after", f"everything is in {run}"):
        assert (out + err).count(once) == 1
    assert sorted(path.name for path in run.iterdir()) == [
        ".hydra",
        "checkpoints",
        "flow.png",
        "loss.png",
        "metrics.jsonl",
        "result.json",
        "run.json",
        "sample.txt",
        "tokenizer.json",
        "train.log",
    ]
    steps = [line["step"] for line in logged(run) if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1))
    assert [line["step"] for line in logged(run) if "valid/loss" in line] == [6, 12]
    # Hydra made no other folder, neither there nor where train.py was started.
    assert [path.name for path in (place / "torchrun").rglob(".hydra")] == [".hydra"]
    assert not (place / "outputs").exists()
    left = [path.name for path in (place / "temporary").iterdir()]
    assert not [name for name in left if not name.startswith("torchelastic_")]


@pytest.mark.slow
@pytest.mark.parametrize("together", ["ddp", "fsdp"])
def test_other_ranks_print_nothing(finished, together):
    ranks = finished[together]
    assert "validation loss" in "".join(ranks.out() + ranks.err())
    assert ranks.out()[1] + ranks.err()[1] == ""


def hold_first_rank(steps: int) -> None:
    """Let the first rank wait after so many steps until it is sent a signal."""
    log, sent = MetricsLog.__call__, []

    def log_and_wait(self: MetricsLog, step: int, metrics: dict[str, float]) -> None:
        if step != steps:
            log(self, step, metrics)
            return
        handle = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *given: (sent.append(given), handle(*given)))
        log(self, step, metrics)
        while not sent:
            time.sleep(0.01)
        signal.signal(signal.SIGTERM, handle)

    MetricsLog.__call__ = log_and_wait


@pytest.mark.slow
@pytest.mark.parametrize(
    ("together", "torchrun"),
    [("fsdp", "torch.distributed.run"), ("ddp", "muse.torchrun")],
)
def test_a_run_stopped_by_a_signal_to_torchrun_goes_on_with_the_same(place, undisturbed, together, torchrun):
    root = f"stopped {together} {torchrun}"
    arguments = run_options(place, root, together, "resume=auto")
    job = Job(place, arguments, script(place, hold_first_rank, 5), torchrun)
    try:
        run = wait_for_steps(job.alive, place / root, 5)
        job.process.send_signal(signal.SIGTERM)
    finally:
        status, out, err = job.finish()
    assert errors(err) == []
    assert err.count("stopping after this step") == 1
    if torchrun == "muse.torchrun":
        assert status == 128 + signal.SIGTERM
        assert err == "\nstopping after this step; once more stops at once\n"
    else:
        assert status != 0
    assert [line["step"] for line in logged(run) if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    assert out.count("step 6 is saved, resume=auto") == 1
    assert find_checkpoint(run).name == "step_00000006"
    ranks = train_py(2, place, arguments)
    assert ranks.wait() == [0, 0], ranks.err()
    assert f"resuming {run} after step 6" in ranks.out()[0]
    assert_same_end(run_folders(place / root)[-1], undisturbed[together])


def signal_second_rank_late() -> None:
    """Let a signal reach the first rank after four steps, and the second one when both save for that."""
    log, save = MetricsLog.__call__, CheckpointWriter.save

    def log_and_signal(self: MetricsLog, step: int, metrics: dict[str, float]) -> None:
        log(self, step, metrics)
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    def signal_and_save(self: CheckpointWriter, *arguments: Any) -> None:
        if launched_rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        save(self, *arguments)

    MetricsLog.__call__, CheckpointWriter.save = log_and_signal, signal_and_save


@pytest.mark.slow
@pytest.mark.parametrize("together", ["ddp", "fsdp"])
def test_a_signal_that_reaches_the_ranks_one_after_another_ends_them_together(place, together):
    arguments = run_options(place, f"late {together}", together, "train.checkpoint_every=0")
    ranks = train_py(2, place, arguments, prepare=signal_second_rank_late)
    assert ranks.wait() == [128 + signal.SIGTERM] * 2
    assert errors("".join(ranks.err())) == []
    (run,) = run_folders(place / f"late {together}")
    assert find_sound_checkpoint(run).name == "step_00000005"


@pytest.mark.slow
@pytest.mark.parametrize("together", ["ddp", "fsdp"])
def test_a_damaged_file_of_one_rank_makes_all_take_the_checkpoint_before(place, undisturbed, together):
    root = place / f"damaged {together}"
    shutil.copytree(place / together, root)
    (run,) = run_folders(root)
    (run / "result.json").unlink()
    (damaged,) = find_checkpoint(run).glob("__1_*.distcp")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    ranks = train_py(2, place, run_options(place, root.name, together, "resume=auto"))
    assert ranks.wait() == [0, 0], ranks.err()
    assert ranks.err()[0].count(f"{damaged.parent} is damaged: {damaged.name} is not what was written") == 1
    assert ranks.err()[1] == ""
    assert f"resuming {run} after step 9" in ranks.out()[0]
    assert_same_end(run_folders(root)[-1], undisturbed[together])


def make_peak_product_small() -> None:
    matrix_products.PEAK_SIDE = {"cpu": 64}


@pytest.mark.slow
def test_a_profile_of_two_ranks_is_that_of_the_first_one_and_changes_no_bit(place, undisturbed):
    arguments = run_options(place, "profiled", "fsdp", "profile=true")
    ranks = train_py(2, place, arguments, prepare=make_peak_product_small)
    assert ranks.wait() == [0, 0], ranks.err()
    assert ranks.out()[1] + ranks.err()[1] == ""
    plain, (profiled,) = undisturbed["fsdp"], run_folders(place / "profiled")
    assert_same_end(plain, profiled)
    told = read_json(profiled / "profile.json")
    assert (told["steps"], told["recorded_steps"]) == (STEPS_OF_PROFILE, 3)
    # The collectives of the first rank are in its profile.
    events = json.loads(gzip.decompress((profiled / "trace.json.gz").read_bytes()))["traceEvents"]
    assert any("allgather" in event.get("name", "") for event in events)
    assert {"profile.json", *told["files"]} == {
        path.name for path in profiled.iterdir() if path.name not in {other.name for other in plain.iterdir()}
    }


@pytest.mark.slow
def test_one_process_under_torchrun_is_a_run_without_it(place):
    runs = []
    for root, together, torchrun in (
        ("plain", "none", False),
        ("one", "none", True),
        ("one ddp", "ddp", True),
    ):
        ranks = train_py(1, place, run_options(place, root, together, "train.steps=4"), torchrun)
        assert ranks.wait() == [0], ranks.err()
        runs += run_folders(place / root)
    assert_same_end(runs[0], runs[1])
    assert_same_end(runs[0], runs[2])


@pytest.mark.slow
@pytest.mark.parametrize(("together", "asynchronous"), [("ddp", "true"), ("fsdp", "false")])
def test_a_rank_that_is_killed_ends_the_other(place, together, asynchronous):
    root = f"killed {together} {asynchronous}"
    frequent = ["train.steps=1000000", "train.checkpoint_every=1", f"train.async_checkpoint={asynchronous}"]
    ranks = train_py(2, place, run_options(place, root, together, *frequent))
    try:
        wait_for_steps(ranks.processes[0].is_alive, place / root, 3)
    finally:
        ranks.processes[1].kill()
        statuses = ranks.wait()
    assert statuses == [1, -signal.SIGKILL]
    (message,) = errors(ranks.err()[0])
    assert LOST.fullmatch(message)
    assert "Traceback" not in ranks.err()[0]


def break_second_rank() -> None:
    """Let the flows of the second rank refuse their tenth state."""
    forward, calls = HamiltonianNeuralODE.forward, []

    def refuse(self: HamiltonianNeuralODE, *arguments: Any) -> Any:
        calls.append(1)
        if launched_rank() == 1 and len(calls) == 10:
            raise RunError(f"{self.name}: this state cannot be")
        return forward(self, *arguments)

    HamiltonianNeuralODE.forward = refuse


REFUSED = "error: rank 1: blocks.0.flow.1: this state cannot be"


@pytest.mark.slow
@pytest.mark.parametrize("together", ["ddp", "fsdp"])
def test_a_rank_that_fails_alone_says_why_and_ends_the_other(place, together):
    ranks = train_py(2, place, run_options(place, f"alone {together}", together), prepare=break_second_rank)
    assert ranks.wait() == [1, 1]
    assert errors(ranks.err()[1]) == [REFUSED]
    (message,) = errors(ranks.err()[0])
    assert LOST.fullmatch(message)
    assert "Traceback" not in "".join(ranks.err())


def lose_second_ranks_data() -> None:
    """Let the second rank find no data."""
    load = train_run.load_tokens

    def refuse(*arguments: Any) -> Any:
        if launched_rank() == 1:
            raise ConfigError("data.cache=elsewhere is not there")
        return load(*arguments)

    train_run.load_tokens = refuse


@pytest.mark.slow
def test_an_option_that_one_rank_alone_cannot_use_is_said_by_that_rank(place):
    ranks = train_py(2, place, run_options(place, "lost", "ddp"), prepare=lose_second_ranks_data)
    assert ranks.wait() == [1, 1]
    assert errors(ranks.err()[1]) == ["error: rank 1: data.cache=elsewhere is not there"]
    (message,) = errors(ranks.err()[0])
    assert LOST.fullmatch(message)


@pytest.mark.slow
def test_torchrun_ends_with_a_rank_that_fails_alone(place):
    job = Job(place, run_options(place, "broken", "ddp"), script(place, break_second_rank))
    status, _, err = job.finish()
    assert status != 0
    assert errors(err).count(REFUSED) == 1
    assert all(message == REFUSED or LOST.fullmatch(message) for message in errors(err))


@pytest.mark.slow
@pytest.mark.parametrize("together", ["ddp", "fsdp"])
def test_what_fails_on_all_ranks_is_said_once(place, together):
    diverging = ["optim.lr=1e30", "optim.warmup=0", "train.checkpoint_every=1"]
    arguments = run_options(place, f"diverging {together}", together, *diverging, stage="1")
    ranks = train_py(2, place, arguments)
    statuses = ranks.wait(watched=True)
    assert 1 in statuses
    assert 0 not in statuses
    (message,) = errors("".join(ranks.err()))
    assert "is not finite in step 2" in message
    assert message.count("step_00000001") == 1
    assert ranks.out()[1] == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "together", "more", "told"),
    [
        (2, "none", [], "torchrun started 2 processes, but hardware.parallel=none; choose ddp or fsdp"),
        (0, "ddp", [], "hardware.parallel=ddp needs python -m muse.torchrun"),
        (0, "fsdp", [], "hardware.parallel=fsdp needs python -m muse.torchrun"),
        (2, "fsdp", ["optim=muon"], "optim=muon does not go with hardware.parallel=fsdp"),
        (2, "fsdp", ["stage.precision=fp16-mixed"], "stage.precision=fp16-mixed does not go with"),
        (
            2,
            "fsdp",
            ["hardware.compile=true"],
            "hardware.compile=true does not go with hardware.parallel=fsdp",
        ),
        (2, "ddp", ["train.batch_size=3"], "train.batch_size=3 windows cannot be shared by 2 processes"),
        (3, "fsdp", ["train.batch_size=3", "optim.second_moment=modulus"], "needs both; choose plane"),
        (2, "ddp", ["data.path=missing.txt"], "data.path=missing.txt"),
        (2, "ddp", ["resume=nowhere"], "resume=nowhere holds no checkpoint"),
        (2, "ddp", ["-m"], "a sweep (-m) starts a process for each cell; torchrun goes with a single run"),
    ],
)
def test_an_option_that_cannot_be_used_is_one_sentence_of_one_rank(place, count, together, more, told):
    arguments = run_options(place, "refused", together, *more)
    ranks = train_py(count or 1, place, arguments, torchrun=count > 0)
    statuses = ranks.wait(watched=True)
    assert 1 in statuses
    assert 0 not in statuses
    (message,) = [line for err in ranks.err() for line in err.splitlines()]
    assert message.startswith("error: ")
    assert told in message
    assert "".join(ranks.out()[1:]) == ""
    assert not list((place / "refused").rglob("checkpoints"))


@pytest.mark.slow
@pytest.mark.parametrize(("count", "together"), [(0, "ddp"), (1, "none"), (2, "fsdp")])
def test_benchmarks_on_several_ranks_are_refused(place, count, together):
    arguments = ["benchmark=stability", f"hardware.parallel={together}", f"output_root={place / 'bench'}"]
    output = place / "output" / f"bench {count} {together}"
    ranks = Ranks(count or 1, output, be_command, "bench.py", arguments, place, torchrun=count > 0)
    statuses = ranks.wait(watched=True)
    assert 0 not in statuses
    (message,) = errors("".join(ranks.err()))
    assert f"hardware.parallel={'ddp' if together == 'none' else together}" in message
    assert "of train.py; bench.py measures in one process" in message
    assert "Traceback" not in "".join(ranks.err())
