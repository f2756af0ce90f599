"""TensorBoard's files as TensorBoard reads them."""

from __future__ import annotations

import io
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from muse.config import LoggerConfig, RunConfig, StageConfig
from muse.errors import ConfigError
from muse.report.metrics import MetricsLog, read_metrics, require_trackers
from muse.report.tensorboard_tracker import FOLDER

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
record_writer = pytest.importorskip("tensorboard.summary.writer.record_writer")
CONFIG = RunConfig(stage=StageConfig(dropout=0.25), logger=LoggerConfig(tensorboard=True))


def read(run: Path):
    """What TensorBoard shows of a run."""
    shown = event_accumulator.EventAccumulator(
        str(run / FOLDER), size_guidance={"scalars": 0, "images": 0, "tensors": 0}
    )
    return shown.Reload()


def curve(run: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(run).Scalars(tag)]


def test_every_line_is_there_as_soon_as_it_is_logged_under_the_names_of_the_file(tmp_path, monkeypatch):
    write = record_writer.RecordWriter.write
    # A slow disk: TensorBoard writes in a thread of its own.
    monkeypatch.setattr(record_writer.RecordWriter, "write", lambda *given: time.sleep(0.05) or write(*given))
    log = MetricsLog(tmp_path, CONFIG)
    for step in (1, 2):
        log(step, {"train/loss": 1 / step, "flow/blocks_0_flow_1/energy": 3.0})
        assert curve(tmp_path, "train/loss") == [(s, 1 / s) for s in range(1, step + 1)]
    log(2, {"valid/loss": math.inf})
    log.close()
    names = {key for line in read_metrics(tmp_path) for key in line} - {"step"}
    assert set(read(tmp_path).Tags()["scalars"]) == names
    assert curve(tmp_path, "valid/loss") == [(2, math.inf)]


def test_the_configuration_is_there_from_the_beginning(tmp_path):
    log = MetricsLog(tmp_path, CONFIG)
    (event,) = read(tmp_path).Tensors("config/text_summary")
    assert "\n  dropout: 0.25\n" in event.tensor_proto.string_val[0].decode()
    log.close()


def test_at_the_end_plots_single_values_and_hyperparameters_are_there(tmp_path):
    from tensorboard.plugins.hparams import metadata

    picture = tmp_path / "loss.png"
    Image.new("RGB", (20, 10), (255, 0, 127)).save(picture)
    log = MetricsLog(tmp_path, CONFIG)
    log(3, {"valid/loss": 2.0, "train/loss": 1.0, "ppl": 7.0})
    log.add_results(
        {"ppl": 7.0, "steps": 4, "name": "x", "valid": {"loss": 2.0}}, [picture, tmp_path / "missing.png"]
    )
    log.close()
    shown = read(tmp_path)
    (image,) = shown.Images("loss")
    assert (image.step, image.width, image.height) == (3, 20, 10)
    with Image.open(io.BytesIO(image.encoded_image_string)) as opened:
        assert opened.convert("RGB").getpixel((5, 5)) == (255, 0, 127)
    assert curve(tmp_path, "steps") == [(3, 4.0)]
    # It was a metric already.
    assert curve(tmp_path, "ppl") == [(3, 7.0)]
    assert set(shown.Tags()["scalars"]) == {"valid/loss", "train/loss", "ppl", "steps"}
    content = shown.summary_metadata
    start = metadata.parse_session_start_info_plugin_data(
        content["_hparams_/session_start_info"].plugin_data.content
    )
    assert start.hparams["stage.dropout"].number_value == 0.25
    assert start.hparams["model.real.d_model"].number_value == 96
    assert start.hparams["stage.tied"].string_value == "true"
    assert start.hparams["optim.betas"].string_value == "[0.9, 0.95]"
    assert start.hparams["data.path"].string_value == "null"
    experiment = metadata.parse_experiment_plugin_data(content["_hparams_/experiment"].plugin_data.content)
    assert {info.name.tag for info in experiment.metric_infos} == {"valid/loss", "ppl", "steps"}


def test_a_run_that_goes_on_has_whole_curves(tmp_path):
    earlier = [{"step": 1, "train/loss": 4.0}, {"step": 2, "train/loss": 3.0, "valid/ppl": None}]
    log = MetricsLog(tmp_path, CONFIG, earlier)
    assert curve(tmp_path, "train/loss") == [(1, 4.0), (2, 3.0)]
    log(3, {"train/loss": 2.0})
    log.close()
    assert curve(tmp_path, "train/loss") == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert read(tmp_path).Tags()["scalars"] == ["train/loss"]


def test_a_run_that_begins_again_in_its_folder_has_every_step_once(tmp_path):
    lines = [{"step": 1, "train/loss": 4.0}, {"step": 2, "train/loss": 3.0}]
    first = MetricsLog(tmp_path, CONFIG)
    for line in [*lines, {"step": 3, "train/loss": 9.0}]:
        first(line["step"], {"train/loss": line["train/loss"]})
    first.close()
    second = MetricsLog(tmp_path, CONFIG, lines)
    second(3, {"train/loss": 2.0})
    second.close()
    assert curve(tmp_path, "train/loss") == [(1, 4.0), (2, 3.0), (3, 2.0)]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_breaks_on_the_way_is_one_message_and_the_run_goes_on(tmp_path, capfd):
    log = MetricsLog(tmp_path, CONFIG)
    log(1, {"train/loss": 1.0})
    shutil.rmtree(tmp_path / FOLDER)
    for step in (2, 3):
        log(step, {"train/loss": 1.0})
    log.add_results({"loss": 1.0}, [])
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    message = capfd.readouterr().err
    assert message.startswith("TensorBoard is left out (")
    assert message.count("\n") == 1
    assert not (tmp_path / FOLDER).exists()


def test_what_does_not_start_is_one_message_and_the_run_goes_on(tmp_path, capsys):
    (tmp_path / FOLDER).write_text("a file in its place")
    log = MetricsLog(tmp_path, CONFIG)
    log(1, {"train/loss": 1.0})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    message = capsys.readouterr().err
    assert message.startswith("TensorBoard is left out (")
    assert message.count("\n") == 1


def test_without_the_package_one_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    require_trackers(LoggerConfig(csv=True))
    with pytest.raises(
        ConfigError, match=r"^logger=tensorboard needs .* pip install -e \"\.\[tensorboard\]\""
    ):
        require_trackers(LoggerConfig(tensorboard=True))


KILLED = """
import os, signal, sys
from pathlib import Path
from muse.config import LoggerConfig, RunConfig
from muse.report.metrics import MetricsLog
log = MetricsLog(Path(sys.argv[1]), RunConfig(logger=LoggerConfig(tensorboard=True, csv=True)))
for step in range(1, 30):
    log(step, {"train/loss": 1.0, **({"valid/loss": 2.0} if step == 20 else {})})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_has_lost_nothing_that_it_logged(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [step for step, _ in curve(tmp_path, "train/loss")] == list(range(1, 30))
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 30
