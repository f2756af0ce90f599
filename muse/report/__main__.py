"""One web page about a run, or about several side by side, that needs nothing but itself.

python -m muse.report outputs/train/stage1-tiny/2026-01-31_12-00-00-123
python -m muse.report outputs/train/stage0-tiny/* outputs/train/stage1-tiny/* --output stages.html

A run may still go on, or have been killed. The folder of a benchmark will do, and that of a sweep, which
stands for its cells.
"""

from __future__ import annotations

from pathlib import Path

from muse.commands import Parser, run_command
from muse.errors import ConfigError, RunError
from muse.files import write_atomically
from muse.report.page import GENERATOR
from muse.report.recorded import Recorded, is_sweep, read_cell_runs, read_recorded
from muse.report.sections import report
from muse.report.sweep import read_cells

FILE = "report.html"


def main() -> None:
    """The command."""
    parser = Parser("muse.report", __doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, benchmark or sweep"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.html",
        help=f"({FILE} in the folder of the run; of several, in the current one)",
    )
    parser.add_argument("--force", action="store_true", help="replace a file that is no such page")
    run_command(lambda: write_report(**vars(parser.parse_args())))


def write_report(runs: list[Path], output: Path | None, force: bool) -> None:
    """Write the page about the folders ``runs``, and say where it is.

    Raises:
        ConfigError: a folder is of no run, nothing can be shown of it yet, or another file would be replaced.
        RunError: it cannot be written.
    """
    path = output or (runs[0] / FILE if len(runs) == 1 else Path(FILE))
    found: list[Recorded] = []
    sweeps = {}
    for place in dict.fromkeys(runs):
        if is_sweep(place):
            try:
                sweeps[place] = read_cells(place)
            except (OSError, ValueError) as error:
                raise ConfigError(f"{place} is a sweep whose cells cannot be read ({error})") from error
            if not sweeps[place]:
                raise ConfigError(f"{place} is a sweep of which no cell has begun")
            found += read_cell_runs(place)
        else:
            found.append(read_recorded(place))
    _require_own(path, force)
    try:
        write_atomically(path, report(found, sweeps))
    except OSError as error:
        raise RunError(f"{path} could not be written: {error.strerror or error}") from error
    print(f"the page is {path}")


def _require_own(path: Path, force: bool) -> None:
    """See that a page may be written, which replaces such pages alone."""
    if path.is_dir():
        raise ConfigError(f"--output {path} is a folder; give the name of a file")
    if force or not path.exists():
        return
    with open(path, "rb") as file:
        begin = file.read(1000)
    if GENERATOR.encode() not in begin:
        raise ConfigError(
            f"{path} is no page of muse.report; --force replaces it, --output names another file"
        )


if __name__ == "__main__":
    main()
