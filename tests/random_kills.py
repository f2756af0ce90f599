"""Kill a training on two ranks at random moments, and compare its end with that of an undisturbed one.

    python tests/random_kills.py ddp --kills=20 --seed=0

Each time one of the ranks or the whole job, torchrun too, gets SIGKILL: once in four while it starts, else
some steps later, in a step or a save. Then it goes on. The figures are printed; it fails if a step is lost
that was saved, or if the end of the run has another bit.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from support.configs import write_text
from support.distributed import Job, options, wait_for_steps
from support.runs import logged, read_json, run_folders, same, stored
from support.waiting import wait_until

from muse.runs.checkpoints import find_checkpoint, find_damage

WHO = {"rank 0": "RANK=0", "rank 1": "RANK=1", "all": ""}
# New steps that a part of the run makes at most before it is killed, in periods of saving.
PERIODS = 2


@dataclass
class Kill:
    """What a kill found and cost.

    Attributes:
        who: a key of ``WHO``.
        reached: last step that was logged.
        saved: last step with a checkpoint, which is whole.
        saving: whether a checkpoint was being written.
    """

    who: str
    reached: int
    saved: int
    saving: bool

    @property
    def lost(self) -> int:
        """Steps to be made again."""
        return self.reached - self.saved


def last_step(run: Path) -> int:
    """The last step that a run has logged, 0 without one."""
    if not (run / "metrics.jsonl").exists():
        return 0
    return max((line["step"] for line in logged(run)), default=0)


def saved_step(root: Path) -> int:
    """The newest step that is saved below ``root``; every checkpoint must be whole."""
    kept = [path for run in run_folders(root) for path in (run / "checkpoints").glob("step_*")]
    for path in kept:
        assert find_damage(path) is None, f"{path}: {find_damage(path)}"
    return max((int(path.name.removeprefix("step_")) for path in kept), default=0)


def kill_once(
    place: Path,
    root: Path,
    arguments: list[str],
    chance: random.Random,
    start: float,
    period: float,
    every: int,
) -> Kill | None:
    """Go on with the run below ``root`` and kill it; None if it ends before.

    Args:
        start: seconds from the start of a part to its first step.
        period: seconds between two saves.
        every: steps between two saves.
    """
    before, saved = run_folders(root), saved_step(root)
    who = chance.choice(list(WHO))
    steps = chance.choice([0, *[chance.randint(1, PERIODS * every) for _ in range(3)]])
    job = Job(place, arguments, torchrun="muse.torchrun")
    if steps:
        wait_until(lambda: not job.alive() or last_step((run_folders(root) or [root])[-1]) >= saved + steps)
    time.sleep(chance.uniform(0, period if steps else start))
    ended = not job.alive()
    job.kill(WHO[who])
    status, out, err = job.finish()
    assert status == 0 or not ended, err
    resumed = re.search(r"resuming .* after step (\d+)", out)
    assert resumed is None or int(resumed[1]) == saved, f"{resumed[0]}, but step {saved} is saved"
    if ended:
        return None
    new = [run for run in run_folders(root) if run not in before]
    reached = max([saved, *map(last_step, new)])
    saving = any(True for run in new for _ in run.glob("checkpoints/.step_*.tmp"))
    kill = Kill(who, reached, saved_step(root), saving)
    assert kill.saved >= saved, f"step {saved} was saved, and only {kill.saved} is left"
    return kill


def differences(first: Path, second: Path) -> list[str]:
    """What is not the same to the last bit in the ends of two runs."""
    found = []
    for which in ("last", "best"):
        one, other = find_checkpoint(first, which), find_checkpoint(second, which)
        if one is None or other is None or one.name != other.name or not same(stored(one), stored(other)):
            found.append(f"the {which} checkpoint")
    if logged(first) != logged(second):
        found.append("the metrics")
    if read_json(first / "result.json")["valid"] != read_json(second / "result.json")["valid"]:
        found.append("the validation loss")
    return found


def main() -> int:
    """Print the figures of a run that is killed; 1 if it is not the undisturbed one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("together", choices=["ddp", "fsdp"], help="how two ranks train one model")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the training")
    parser.add_argument("--every", type=int, default=3, help="steps between two checkpoints")
    parser.add_argument("--asynchronous", action="store_true", help="with train.async_checkpoint=true")
    given = parser.parse_args()
    chance = random.Random(given.seed)
    # More than all parts make before they are killed.
    total = (PERIODS + 2) * given.every * given.kills
    with TemporaryDirectory() as name:
        place = write_text(Path(name)).parent

        def arguments(root: str) -> list[str]:
            periods = [f"train.steps={total}", f"train.checkpoint_every={given.every}", "train.eval_every=10"]
            return options(
                place,
                root,
                given.together,
                *periods,
                f"train.async_checkpoint={str(given.asynchronous).lower()}",
                f"seed={given.seed}",
                "resume=auto",
            )

        begun = time.monotonic()
        job = Job(place, arguments("whole"), torchrun="muse.torchrun")
        whole = wait_for_steps(job.alive, place / "whole", 1)
        start = time.monotonic() - begun
        status, _, err = job.finish()
        assert status == 0, err
        period = (time.monotonic() - begun - start) / total * given.every
        root = place / "killed"
        kills: list[Kill] = []
        while len(kills) < given.kills:
            kill = kill_once(place, root, arguments("killed"), chance, start, period, given.every)
            if kill is None:
                break
            kills.append(kill)
            during = ", in a save" if kill.saving else ""
            print(
                f"{len(kills):3}: {kill.who} killed after step {kill.reached}{during}; {kill.lost} lost",
                flush=True,
            )
            # A checkpoint that is written while training goes on counts from the next one on.
            most = given.every * (2 if given.asynchronous else 1)
            assert kill.lost <= most, f"{kill.lost} steps are lost, more than since the last save"
        status, _, err = Job(place, arguments("killed"), torchrun="muse.torchrun").finish()
        assert status == 0, err
        different = differences(whole, run_folders(root)[-1])
    lost = [kill.lost for kill in kills]
    end = f"other bits in {', '.join(different)}" if different else "the bits are those of an undisturbed run"
    print(
        f"{given.together}: {len(kills)} kills, {sum(kill.saving for kill in kills)} of them in a save; "
        f"{sum(lost)} of {total} steps lost, at most {max(lost, default=0)} by a kill, none that was saved; "
        f"{end}"
    )
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
