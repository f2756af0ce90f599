import csv
import json

from muse.benchmarks.sweep import add_cell, swept_options


def test_every_cell_is_in_the_summary_also_one_that_failed(tmp_path):
    add_cell(tmp_path, ["stage='1'", "benchmark.seq_len=8"], {"vram_gb": 1.0}, "measured")
    add_cell(tmp_path, ["stage='1'", "benchmark.seq_len=16"], {"error": "out of memory"}, "failed")
    cells = add_cell(tmp_path, ["stage='1'", "benchmark.seq_len=32"], {"vram_gb": 2.0}, "reused")
    assert swept_options(cells) == ["benchmark.seq_len"]
    assert json.loads((tmp_path / "summary.json").read_text()) == cells
    rows = list(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    assert [(row["benchmark.seq_len"], row["status"], row["vram_gb"]) for row in rows] == [
        ("8", "measured", "1.0"),
        ("16", "failed", ""),
        ("32", "reused", "2.0"),
    ]
    assert rows[1]["error"] == "out of memory"
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_over_words_is_plotted_in_the_order_given(tmp_path):
    for norm, value in (("rms", 2.0), ("layer", 1.0)):
        add_cell(tmp_path, [f"stage.norm={norm}"], {"ppl": value}, "measured")
    assert (tmp_path / "summary.png").exists()
