"""Ask a card everything within minutes: exactness, kernels, steps, memory, each in a process of its own.

python -m muse.card outputs/card
python -m muse.card outputs/card --resume --minutes 4
python -m muse.card outputs/card --quick

What a part finds is on disk when the part ends: card.json and card.md are whole at any moment. A part that
takes too long is ended, and the next one begins; --resume asks again what has no answer.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from muse.card.parts import FULL, QUICK, ROOT, Part, command_of, parts_of
from muse.card.report import page
from muse.commands import Parser, run_command
from muse.errors import ConfigError
from muse.files import finite, read_json, write_atomically, write_json

# What the seconds of the parts add up to, about.
MINUTES = 8.0
ANSWERS_FILE, PAGE_FILE, LOG_FILE = "card.json", "card.md", "log.txt"
DONE, FAILED, LATE, LEFT = "done", "failed", "took too long", "not begun"
# Seconds that a part has to end when it is told to.
ENDING = 5.0


def main() -> None:
    """The command."""
    parser = Parser("muse.card", __doc__)
    parser.add_argument("folder", type=Path, help="for all that is found")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all parts ({MINUTES:g})")
    parser.add_argument("--resume", action="store_true", help="go on with what has no answer in the folder")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the command itself")
    run_command(lambda: ask(parser.parse_args()))


def ask(arguments: argparse.Namespace) -> None:
    """Ask every part, and keep what it answers.

    Raises:
        ConfigError: an argument is not allowed, or the folder has answers and is not to go on.
        SystemExit: with status 1, a part has no answer.
    """
    if not 0 < arguments.minutes < 1e4:
        raise ConfigError(f"--minutes {arguments.minutes:g} is not allowed; it must be above 0")
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU; --device cpu tries the command without one")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not (ROOT / "bench.py").is_file():
        raise ConfigError("muse.card runs in a checkout, whose bench.py, train.py and tests it starts")
    file = arguments.folder / ANSWERS_FILE
    asked = {"device": device, "quick": arguments.quick}
    answers: dict[str, Any] = {}
    if file.exists():
        if not arguments.resume:
            raise ConfigError(f"{file} is there already; --resume goes on with it, or give another folder")
        stored = read_json(file)
        if stored["asked"] != asked:
            raise ConfigError(f"{file} was asked for {stored['asked']}, and now it is {asked}")
        answers = stored["parts"]
    parts = parts_of(device, QUICK if arguments.quick else FULL)
    ends = time.monotonic() + 60 * arguments.minutes
    for number, part in enumerate(parts, 1):
        if answers.get(part.name, {}).get("status") == DONE:
            continue
        left = max(0.0, ends - time.monotonic())
        limit = min(left, part.seconds * arguments.minutes / MINUTES)
        told = f"{number} of {len(parts)}: {part.name}, at most {limit:.0f} s"
        print(f"{told}; {left:.0f} s left for all", flush=True)
        answers[part.name] = _answer(part, arguments.folder / part.name, limit)
        _write(arguments.folder, asked, {one.name: answers.get(one.name, _nothing()) for one in parts})
    print(page(answers))
    print(f"everything is in {arguments.folder}")
    missing = [name for name, answer in answers.items() if answer["status"] != DONE]
    if missing:
        raise SystemExit(f"error: {', '.join(missing)}: no answer; --resume asks again")


def _nothing() -> dict[str, Any]:
    return {"status": LEFT, "seconds": 0.0, "reason": None, "figures": None}


def _answer(part: Part, folder: Path, limit: float) -> dict[str, Any]:
    """Run a part within its limit, and read what it has written."""
    if limit <= 0:
        return _nothing() | {"reason": "no time was left"}
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (folder / LOG_FILE).open("wb") as log:
        process = subprocess.Popen(
            command_of(part, folder),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
        )
        status = None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if status is None:
                _end(process)
    answer = _nothing() | {"seconds": time.monotonic() - began}
    if status is None:
        return answer | {"status": LATE, "reason": f"ended after {limit:.0f} s"}
    try:
        figures = part.read(folder)
        if not figures:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, SyntaxError):
        return answer | {"status": FAILED, "reason": _last_line(folder / LOG_FILE, status)}
    reason = None if status == 0 else _last_line(folder / LOG_FILE, status)
    return answer | {"status": DONE, "reason": reason, "figures": figures}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a part and all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(ENDING)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _last_line(log: Path, status: int) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"status {status}: {lines[-1][:200] if lines else 'it said nothing'}"


def _write(folder: Path, asked: dict[str, Any], answers: dict[str, Any]) -> None:
    write_json(folder / ANSWERS_FILE, finite({"asked": asked, "parts": answers}))
    write_atomically(folder / PAGE_FILE, page(answers))


if __name__ == "__main__":
    main()
