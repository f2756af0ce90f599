"""python -m muse.report: the page about runs, benchmarks and sweeps."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.commands import run_here

from muse.config import BenchConfig, RunConfig
from muse.report.page import GENERATOR
from muse.report.recorded import names_of, option_table, read_recorded
from muse.report.sweep import record_cell

VALID = {"loss": 4.25, "ppl": 70.1, "word_ppl": 371.5, "bits_per_byte": 1.625, "tokens": 99}
EMPTY = {"meta", "br", "img", "input", "link"}
HOSTILE = "<script>alert('$x$ & $')</script>"


def config(kind: type[RunConfig] = RunConfig, **options: Any) -> dict[str, Any]:
    made = json.loads(json.dumps(dataclasses.asdict(kind())))
    for name, value in options.items():
        group, option = name.split("__")
        made[group][option] = value
    return made


def made_with(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "config": options,
        "commit": "abc123",
        "seed": 7,
        "versions": {"torch": "2.13.0"},
        "device": "a CPU",
    }


def write_run(folder: Path, options: dict[str, Any], finished: bool = True, steps: int = 40) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(made_with(options)))
    lines = [
        {
            "step": step,
            "train/loss": 8 - step / 10,
            "train/lr": 0.01,
            "train/tokens_per_second": 1000.0 + step,
        }
        for step in range(1, steps + 1)
    ]
    lines += [{"step": step, "valid/loss": 5 - step / 100, "flow/energy": 3.0} for step in (20, 40)]
    # A line that was cut off when the run was killed.
    text = "\n".join(map(json.dumps, lines)) + ("\n" if finished else '\n{"step": 41, "tra')
    (folder / "metrics.jsonl").write_text(text)
    if finished:
        result = {"valid": VALID, "test": None, "steps": steps, "parameters": 1234567, **made_with(options)}
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "sample.txt").write_text(f"the sample {HOSTILE}\n")
    return folder


def write_benchmark(folder: Path, **values: Any) -> Path:
    folder.mkdir(parents=True)
    criteria = [
        {"criterion": "peak", "measured": 0.5, "target": "< 1", "pass": True},
        {"criterion": "drift", "measured": 0.5, "target": "< 0.1", "pass": False},
        {"criterion": "speed", "measured": None, "target": "> 1", "pass": None},
    ]
    result = {
        "values": {"vram_gb": 0.5, **values},
        "criteria": criteria,
        "details": {"vram": {"exact": {"peak": 0.123}, "backprop": {"peak": 0.789, "times": [1, 2]}}},
        "failures": {},
        "unjudged": {"speed": "nothing ran"},
        **made_with(config(BenchConfig, benchmark__name="vram")),
    }
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "vram.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


class Checked(HTMLParser):
    """The text and the attributes of a page whose elements all end where they should."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and "style" not in self.open:
            self.text.append(data.strip())


def read_page(path: Path) -> Checked:
    """A page that is whole and needs nothing but itself."""
    page = path.read_text(encoding="utf-8")
    checked = Checked(page)
    names = [value for _, name, value in checked.attributes if name == "id"]
    assert len(names) == len(set(names))
    for tag, name, value in checked.attributes:
        assert tag not in ("script", "link", "iframe", "object"), tag
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "data"):
            assert value.startswith(("data:image/png;base64,", "#")), value
    assert not re.search(r"@import|url\((?!#)", page)
    return checked


def shown(folder: Path, *arguments: object) -> Checked:
    assert run_here("muse.report", [*map(str, arguments)]) == 0
    return read_page(folder / "report.html")


def test_the_page_of_a_run_tells_its_results_curves_sample_and_origin(tmp_path, capsys):
    run = write_run(tmp_path / "run", config(model__name=HOSTILE))
    page = shown(run, run)
    assert str(run / "report.html") in capsys.readouterr().out
    for told in ("finished", "4.25", "70.1", "371.5", "1.625", "1,234,567", "abc123", "7", "2.13.0", "a CPU"):
        assert told in page.text
    assert f"the sample {HOSTILE}" in page.text
    captions = (
        "loss",
        "learning rate",
        "training speed [tokens/s]",
        "mean energy of the flows at their start",
    )
    assert set(captions) <= set(page.text)
    assert sum(tag == "svg" and name == "viewbox" for tag, name, _ in page.attributes) == len(captions)


def test_several_runs_share_axes_and_differ_in_options_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = write_run(tmp_path / "a", config(optim__lr=0.01))
    second = write_run(tmp_path / "b", config(optim__lr=0.02))
    third = write_run(tmp_path / "c", config(optim__lr=0.02, stage__number="2", model__name="$_$ <b>"))
    page = shown(tmp_path, first, second, third)
    assert page.text[:2] == ["3 runs"] * 2
    names = ["stage 1, tiny, optim.lr=0.01", "stage 1, tiny, optim.lr=0.02", "stage 2, $_$ <b>"]
    found = [read_recorded(folder) for folder in (first, second, third)]
    assert names_of(found) == names
    # In the tables, and at the end of its line in the pictures.
    assert all(page.text.count(name) > 3 for name in names)
    assert option_table(found) == {
        "model": ["tiny", "tiny", "$_$ <b>"],
        "optim.lr": ["0.01", "0.02", "0.02"],
        "stage": ["1", "1", "2"],
    }


def test_runs_that_nothing_tells_apart_are_numbered(tmp_path):
    folders = [write_run(tmp_path / name, config()) for name in "ab"]
    assert names_of([read_recorded(one) for one in folders]) == ["stage 1, tiny (1)", "stage 1, tiny (2)"]


def test_an_option_that_a_run_does_not_have_is_a_dash(tmp_path):
    old = config()
    old["stage"]["gone"] = 3
    run, bench = write_run(tmp_path / "run", old), write_benchmark(tmp_path / "bench")
    rows = option_table([read_recorded(run), read_recorded(bench)])
    assert rows["stage.gone"] == ["3", "-"]
    assert rows["benchmark"] == ["-", "vram"]


def test_a_run_that_was_killed_tells_how_far_it_came(tmp_path):
    run = write_run(tmp_path / "run", config(train__steps=900), finished=False)
    page = shown(run, run)
    assert "not finished: step 40 of 900" in page.text
    assert {"last training loss", "4", "last validation loss, of a part", "4.6"} <= set(page.text)


def test_a_benchmark_tells_what_passes_and_what_is_open(tmp_path):
    bench = write_benchmark(tmp_path / "bench", other=0.4321)
    page = shown(bench, bench)
    assert [word for word in page.text if word in ("pass", "fail", "open")] == ["pass", "fail", "open"]
    assert {"speed is open: nothing ran", "0.4321", "0.123", "0.789"} <= set(page.text)
    picture = base64.b64encode((bench / "vram.png").read_bytes()).decode()
    assert ("img", "src", f"data:image/png;base64,{picture}") in page.attributes


def test_a_sweep_is_its_cells(tmp_path):
    sweep = tmp_path / "sweep"
    for number, rate in enumerate((0.1, 0.2, 0.3)):
        values = {"valid_loss": 4.0 + rate} if number < 2 else {"error": f"diverged {HOSTILE}"}
        status = "trained" if number < 2 else "failed"
        record_cell(sweep, number, [f"optim.lr={rate}"], values, status)
    for number, rate in enumerate((0.1, 0.2)):
        write_run(sweep / f"{number}-stage1-tiny", config(optim__lr=rate))
    # It failed before it had a metric.
    (sweep / "2-stage1-tiny").mkdir()
    page = shown(sweep, sweep)
    assert {"sweep sweep", "4.1", "4.2", "failed", f"0.3: diverged {HOSTILE}"} <= set(page.text)
    assert page.text.count("stage 1, tiny, optim.lr=0.1") > 3


def test_a_reused_cell_shows_the_curves_of_its_run(tmp_path):
    run, cell = write_run(tmp_path / "run", config()), tmp_path / "cell"
    cell.mkdir()
    result = json.loads((run / "result.json").read_text())
    (cell / "result.json").write_text(json.dumps({"reused_from": "../run", **result}))
    assert read_recorded(cell).metrics == read_recorded(run).metrics


def test_a_profiled_run_tells_its_memory(tmp_path):
    run = write_run(tmp_path / "run", config())
    (run / "memory.json").write_text(
        json.dumps({"unit": "bytes", "peak": {"parameters": 2_500_000, "total": 9}})
    )
    assert "2.5" in shown(run, run).text


def test_many_points_are_thinned(tmp_path):
    short, long = (write_run(tmp_path / str(n), config(), steps=n) for n in (1000, 8000))
    sizes = []
    for run in (short, long):
        shown(run, run)
        sizes.append((run / "report.html").stat().st_size)
    assert sizes[1] < 1.5 * sizes[0]


def refused(*arguments: object) -> None:
    assert run_here("muse.report", [*map(str, arguments)]) == 1


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda run: [file.unlink() for file in run.iterdir()], "is not the folder of a run"),
        (lambda run: (run / "run.json").write_text('{"config": '), "is not the folder of a run"),
        (lambda run: (run / "run.json").write_text("[]"), "is not the folder of a run"),
        (lambda run: (run / "result.json").write_text("[1]"), "is not the folder of a run"),
        (
            lambda run: (run / "metrics.jsonl").write_text("") or (run / "result.json").unlink(),
            "no metrics yet",
        ),
        (lambda run: (run / "report.html").write_text("mine"), "--force"),
        (lambda run: (run / "report.html").mkdir(), "is a folder"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_lost(tmp_path, capsys, spoil, told):
    run = write_run(tmp_path / "run", config())
    spoil(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused(run)
    printed = capsys.readouterr()
    assert told in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path, capsys):
    refused(tmp_path / "nowhere")
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "nowhere").exists()


def test_a_page_replaces_a_page_and_other_files_with_force_alone(tmp_path):
    run = write_run(tmp_path / "run", config(), finished=False)
    shown(run, run)
    (run / "metrics.jsonl").write_text('{"step": 99, "train/loss": 1.0}\n')
    assert "not finished: step 99 of 800" in shown(run, run).text
    other = tmp_path / "pages" / "other.html"
    refused(run, "--output", tmp_path / "run" / "metrics.jsonl")
    assert run_here("muse.report", [str(run), "--output", str(other)]) == 0
    assert GENERATOR in other.read_text()
    other.write_text("mine")
    refused(run, "--output", other)
    assert run_here("muse.report", [str(run), "--output", str(other), "--force"]) == 0
    assert GENERATOR in other.read_text()
    assert sorted(path.name for path in other.parent.iterdir()) == ["other.html"]
