"""The folder of a run: the names of its files, and what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from muse.files import read_json

# Written when a run begins: its configuration and what it is made with.
RUN_FILE = "run.json"
# Written when it has come to its end.
RESULT_FILE = "result.json"
CHECKPOINTS = "checkpoints"
SAMPLE_FILE = "sample.txt"
# Of a profiled run on a CPU.
MEMORY_FILE = "memory.json"
# Written beside the configuration: what turns its text into tokens and back.
TOKENIZER_FILE = "tokenizer.json"


def run_of(place: Path) -> Path:
    """The folder of the run that a place is one of the checkpoints of; else the place itself."""
    is_checkpoint = place.parent.name == CHECKPOINTS and not (place / RUN_FILE).exists()
    return place.parent.parent if is_checkpoint else place


def read_run(run: Path) -> dict[str, Any]:
    """What a run wrote of itself when it began.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no configuration.
    """
    described = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
    if not isinstance(described, dict) or not isinstance(described.get("config"), dict):
        raise ValueError(f"{RUN_FILE} has no configuration")
    return described


def read_result(run: Path) -> dict[str, Any]:
    """The results of a run; empty where it has none."""
    result: dict[str, Any] = read_json(run / RESULT_FILE)
    return result
