import pytest

from muse.report.metrics import FILE
from muse.train_run import lines_before


def write(run, text):
    run.mkdir()
    (run / FILE).write_text(text)


@pytest.mark.parametrize(("step", "kept"), [(1, [1]), (2, [1, 2, 2]), (3, [1, 2, 2, 3])])
def test_a_continued_run_logs_no_line_twice_and_misses_none(tmp_path, step, kept):
    """The evaluation of step 2 came before its checkpoint, that of the last step comes after it."""
    lines = [(1, "train/loss"), (2, "train/loss"), (2, "valid/loss"), (3, "train/loss"), (3, "valid/loss")]
    write(tmp_path / "old", "".join(f'{{"step": {n}, "{key}": 1.0}}\n' for n, key in lines))
    assert [line["step"] for line in lines_before(tmp_path / "old", step, last_step=3)] == kept
