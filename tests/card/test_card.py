"""The command that asks a card everything: its parts end within limits, and what is found is kept."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from support.commands import commands_here

from muse.benchmarks.kernel_cases import FAMILIES, Sizes, normal_leaves
from muse.card import __main__ as command
from muse.card.parts import FULL, GOALS, QUICK, Goal, Part, command_of, parts_of
from muse.card.report import judged, page
from muse.files import read_json, write_json

WRITES = "import sys, json; open(sys.argv[1], 'w').write(json.dumps({'answer': 42}))"
HANGS = "import os, time; os.fork(); print(os.getpid(), flush=True); time.sleep(1e6)"
FAILS = "raise SystemExit('error: there is nothing')"


def part(name, code, seconds=600.0):
    """One whose figures are in a file that its code writes."""
    return Part(
        name, ("-c", code, "{folder}/found.json"), seconds, lambda folder: read_json(folder / "found.json")
    )


@pytest.fixture
def ask(monkeypatch, tmp_path, capsys):
    """Status, standard output and error of the command with given parts."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(parts, *arguments):
        monkeypatch.setattr(command, "parts_of", lambda device, sizes: parts)
        monkeypatch.setattr(sys, "argv", ["muse.card", str(tmp_path / "card"), *arguments])
        status, told = 0, ""
        try:
            command.main()
        except SystemExit as end:
            status, told = 1, f"{end.code}\n"
        captured = capsys.readouterr()
        return status, captured.out, captured.err + told

    return run


def runs(process):
    """Whether it is more than what its parent has not waited for."""
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def answers(tmp_path):
    return read_json(tmp_path / "card" / "card.json")["parts"]


def test_a_part_that_hangs_or_fails_hides_no_other(ask, tmp_path):
    status, out, err = ask([part("hangs", HANGS, 1.0), part("fails", FAILS), part("writes", WRITES)])
    found = answers(tmp_path)
    assert status == 1
    assert err == "error: hangs, fails: no answer; --resume asks again\n"
    assert {name: answer["status"] for name, answer in found.items()} == {
        "hangs": "took too long", "fails": "failed", "writes": "done"
    }  # fmt: skip
    assert found["fails"]["reason"] == "status 1: error: there is nothing"
    assert found["writes"]["figures"] == {"answer": 42}
    assert (tmp_path / "card" / "card.md").read_text() in out
    processes = [int(line) for line in (tmp_path / "card" / "hangs" / "log.txt").read_text().split()]
    assert len(processes) == 2
    assert not any(map(runs, processes))


def test_what_has_an_answer_is_not_asked_again(ask, tmp_path):
    first, second = part("first", WRITES), part("second", FAILS)
    assert ask([first, second])[0] == 1
    status, _, err = ask([first, second])
    assert (status, "--resume goes on with it" in err) == (1, True)
    write_json(tmp_path / "card" / "first" / "found.json", {"answer": 0})
    assert ask([part("first", FAILS), part("second", WRITES)], "--resume")[0] == 0
    assert {name: answer["figures"] for name, answer in answers(tmp_path).items()} == {
        "first": {"answer": 42}, "second": {"answer": 42}
    }  # fmt: skip
    status, _, err = ask([first, second], "--resume", "--quick")
    assert (status, "was asked for" in err) == (1, True)


def test_parts_without_time_are_told_as_not_begun(ask, tmp_path):
    status, _, _ = ask([part("hangs", HANGS, 1e6), part("late", WRITES)], "--minutes", "0.01")
    assert status == 1
    assert {name: answer["status"] for name, answer in answers(tmp_path).items()} == {
        "hangs": "took too long", "late": "not begun"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--minutes", "0"], "--minutes 0 is not allowed"), (["--device", "cuda"], "torch finds no GPU")],
)
def test_bad_arguments_are_one_sentence(ask, arguments, told):
    status, _, err = ask([], *arguments)
    assert (status, err.count("\n")) == (1, 1)
    assert told in err


def test_goals_have_a_direction_and_are_open_without_a_figure():
    for at_least, met in ((True, False), (False, True)):
        goal = Goal("", 1.0, at_least, lambda found: found["part"]["value"])
        assert judged(goal, {"part": {"value": 0.5}}) == (0.5, met)
        assert judged(goal, {"part": {"value": 1.0}}) == (1.0, True)
        for nothing in ({}, {"part": {}}, {"part": {"value": None}}):
            assert judged(goal, nothing) == (None, None)


def test_every_goal_of_kernels_asks_for_a_case_that_there_is():
    """Among what the benchmark of kernels would report, if every figure was its place in a list."""
    numbers = itertools.count(1)
    sizes = Sizes(batch=1, length=4, width=4, heads=1, head_dim=4, hidden=4, steps=1, vocab=8)
    kernels = {}
    for dtype, build in itertools.product((torch.float32, torch.bfloat16), FAMILIES.values()):
        for case in build(sizes, dtype, normal_leaves(0, dtype, torch.device("cpu"))):
            names = ["ours", "eager", "compiled", *case.others]
            kernels[f"{case.name}, {str(dtype)[6:]}"] = {
                "alternatives": {name: {"training_ratio": next(numbers)} for name in names},
                "forward_share_of_peak": next(numbers),
                "backward_share_of_peak": next(numbers),
            }
    found = {part.name: {"kernels": kernels} for part in parts_of("cuda", FULL)}
    figures = [
        judged(goal, found)[0] for goal in GOALS if "stage" not in goal.title and "failed" not in goal.title
    ]
    assert len(figures) == 10
    assert None not in figures
    assert len(set(figures)) == len(figures)


@pytest.mark.parametrize("sizes", [FULL, QUICK])
def test_parts_have_names_and_limits_within_the_time(sizes):
    for device in ("cuda", "cpu"):
        parts = parts_of(device, sizes)
        assert len({part.name for part in parts}) == len(parts)
        assert sum(part.seconds for part in parts) < 600


@pytest.mark.slow
def test_real_parts_answer_and_are_told(tmp_path, monkeypatch):
    """Each kind of part by its own command, in small; those of Hydra in this process."""
    answers = {}
    chosen = ("machine", "tests", "exactness", "kernels_linear", "training_1", "memory_1")
    monkeypatch.setattr("muse.measure.matrix_products.PEAK_SIDE", {"cpu": 64})
    run_script = commands_here(monkeypatch, tmp_path)
    for one in parts_of("cpu", QUICK):
        folder = tmp_path / one.name
        if one.name in ("machine", "tests"):
            answers[one.name] = command._answer(one, folder, 600)
        elif one.name in chosen:
            _, script, *options = command_of(one, folder)
            assert run_script(Path(script).name, options) == 0
            answers[one.name] = command._nothing() | {"status": command.DONE, "figures": one.read(folder)}
    assert {name: answer["status"] for name, answer in answers.items()} == dict.fromkeys(chosen, "done")
    json.dumps(answers)
    found = {name: answer["figures"] for name, answer in answers.items()}
    assert found["tests"]["failed"] == []
    assert found["tests"]["passed"] > 0
    assert found["exactness"]["gradients_correct"] is True
    assert found["memory_1"]["reconstruction_error"] == 0
    assert found["training_1"]["tokens_per_second"] > 0
    told = page(answers)
    for part in ("linear, float32", "| training_1 |", "| memory_1 |", "| tests | done |"):
        assert part in told
    measured = [goal.title for goal in GOALS if judged(goal, found)[0] is not None]
    assert "stage 1, tokens a second" in measured
    assert "stage 2, exact against full backpropagation, time" in measured


def test_a_command_names_its_folder(tmp_path):
    for one in parts_of("cuda", FULL):
        assert any(str(tmp_path) in word for word in command_of(one, tmp_path))
