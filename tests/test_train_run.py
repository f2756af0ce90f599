import dataclasses
import json

import pytest

from muse.config import DataConfig, HardwareConfig, RunConfig
from muse.errors import ConfigError
from muse.provenance import identity, provenance
from muse.report.metrics import FILE
from muse.train_run import RUN_FILE, _summary, _table, lines_before, run_to_resume
from muse.training.evaluate import Evaluation
from muse.training.trainer import TrainResult


def write(run, text):
    run.mkdir()
    (run / FILE).write_text(text)


@pytest.mark.parametrize(("step", "kept"), [(1, [1]), (2, [1, 2, 2]), (3, [1, 2, 2, 3])])
def test_a_continued_run_logs_no_line_twice_and_misses_none(tmp_path, step, kept):
    """The evaluation of step 2 came before its checkpoint, that of the last step comes after it."""
    lines = [(1, "train/loss"), (2, "train/loss"), (2, "valid/loss"), (3, "train/loss"), (3, "valid/loss")]
    write(tmp_path / "old", "".join(f'{{"step": {n}, "{key}": 1.0}}\n' for n, key in lines))
    assert [line["step"] for line in lines_before(tmp_path / "old", step, last_step=3)] == kept


def test_a_run_is_continued_if_it_has_a_checkpoint_whatever_became_of_other_files(tmp_path):
    config = RunConfig(data=DataConfig(name="stdlib"), output_root=str(tmp_path), resume="auto")
    runs = [tmp_path / "train" / "tiny" / name for name in ("first", "second", "without a checkpoint")]
    for run in runs:
        (run / "checkpoints" / "step_00000004").mkdir(parents=True)
        (run / "checkpoints" / "best").write_text("step_00000009")
        (run / RUN_FILE).write_text(json.dumps({"identity": identity(config)}))
    (runs[2] / "checkpoints" / "step_00000004").rmdir()
    assert run_to_resume(config) == runs[1]
    config.resume = str(runs[0])
    assert run_to_resume(config) == runs[0]
    # Without its description it may lack metrics of the run that it continued, too.
    (runs[0] / RUN_FILE).unlink()
    for run in (runs[0], runs[2]):
        config.resume = str(run)
        with pytest.raises(ConfigError, match="holds no checkpoint"):
            run_to_resume(config)


def test_a_table_has_a_dash_and_a_reason_for_a_perplexity_that_does_not_exist(tmp_path):
    words = Evaluation(2.0, 7.4, 99.5, 1.5, 1000, None)
    none = Evaluation(2.0, 7.4, None, 1.5, 1000, "words of 41 bytes on average are none")
    result = TrainResult(1, words, none, 1, 1, 1.0, 1.0, None, None)
    _, _, valid, test, *reasons = _table(result).splitlines()
    assert valid.split()[3] == "99.5"
    assert test.split()[3] == "-"
    assert reasons == ["test has no perplexity per word: words of 41 bytes on average are none"]
    assert _summary(result)["test"]["word_ppl_reason"] == "words of 41 bytes on average are none"


def test_a_cell_of_a_sweep_is_not_that_of_other_hardware(tmp_path):
    config = RunConfig(data=DataConfig(name="stdlib"), output_root=str(tmp_path), resume="auto")
    runs = {}
    for threads in (1, 2):
        run = runs[threads] = tmp_path / "train" / f"threads {threads}"
        (run / "checkpoints" / "step_00000004").mkdir(parents=True)
        there = dataclasses.replace(config, hardware=HardwareConfig(threads=threads))
        (run / RUN_FILE).write_text(json.dumps(provenance(there)))
    for threads, own in ((1, runs[1]), (2, runs[2]), (None, None)):
        config.hardware = HardwareConfig(threads=threads)
        assert run_to_resume(config, same_hardware=True) == own
        # A training alone goes on wherever it is.
        assert run_to_resume(config) == runs[2]
    config.resume = str(runs[1])
    assert run_to_resume(config, same_hardware=True) == runs[1]
