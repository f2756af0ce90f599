"""bench.py as a user types it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from support.commands import commands_here
from support.configs import SMALL_MODEL, write_text
from support.processes import ROOT

SMALL = [*SMALL_MODEL, "logger=none", "hardware=cpu"]


@dataclass
class Done:
    """How a command ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def options_of(folder, arguments, small):
    return [*arguments, f"output_root={folder}", f"data.cache={folder}/cache", *small]


def bench_apart(folder, *arguments):
    """bench.py as a process, whose measurements have processes of their own."""
    command = [sys.executable, "bench.py", *options_of(folder, arguments, SMALL)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def bench(monkeypatch, capfd):
    """bench.py in this process."""
    command = commands_here(monkeypatch, ROOT)

    def run(folder, *arguments, small=SMALL):
        status = command("bench.py", options_of(folder, arguments, small))
        return Done(status, *capfd.readouterr())

    return run


def passes_of(result):
    """Whether each criterion passes, by its name, of a result in which all were measured."""
    passes = {row["criterion"]: row["pass"] for row in result["criteria"]}
    assert result["failures"] == result["unjudged"] == {}
    assert set(passes.values()) <= {True, False}
    assert result["all_pass"] is all(passes.values())
    return passes


@pytest.mark.slow
def test_all_benchmarks_leave_a_result_with_provenance_plots_and_a_table(tmp_path, bench):
    text = write_text(tmp_path, 1000)
    done = bench(
        tmp_path, "stage=1", "benchmark=all", "data=text", f"data.path={text}", "benchmark.train_steps=2",
        "benchmark.inputs=3", "benchmark.repeats=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("bench/*/*/result.json")
    result = json.loads(path.read_text())
    assert result["ppl"] > 1
    passes = passes_of(result)
    assert passes["NaN and Inf in 3 random inputs"] is result["stability_pass"] is True
    assert passes["perplexity / stage 0 (2 steps in this run)"] is (result["ppl_ratio"] <= 1.03)
    assert len(passes) == 5
    assert result["details"]["perplexity"]["stage 0 fp32"]["trained"] == "2 steps in this run"
    assert result["versions"]["torch"]
    assert result["config"]["model"]["vocab_size"] == 300
    assert {p.name for p in path.parent.glob("*.png")} == {"vram.png", "throughput.png", "perplexity.png"}
    assert "criterion" in done.stdout
    assert (path.parent / "metrics.jsonl").stat().st_size > 0


@pytest.mark.slow
def test_all_benchmarks_of_stage_2(tmp_path, bench):
    text = write_text(tmp_path, 1000)
    done = bench(
        tmp_path, "stage=2", "benchmark=all", "data=text", f"data.path={text}", "benchmark.train_steps=2",
        "benchmark.batch_size=2", "benchmark.seq_len=16", "benchmark.ode_steps=6", "benchmark.inputs=3",
        "benchmark.repeats=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("bench/*/*/result.json")
    result = json.loads(path.read_text())
    assert result["reconstruction_error"] == 0
    assert result["fallback_count"] == 0
    assert result["max_drift"] < 5e-5 < result["max_drift_leapfrog"]
    memory = result["details"]["vram"]
    assert memory["exact"]["activations"] < memory["backprop"]["activations"]
    assert abs(result["parameters_apart"]) < 0.03
    passes = passes_of(result)
    for criterion in (
        "reconstruction error", "fallbacks", "peak memory, exact [GB]", "gradient error of the worst mode",
        "energy drift, untrained", "energy drift, trained", "parameters / stage 1 - 1",
    ):  # fmt: skip
        assert passes[criterion] is True, criterion
    assert result["energy_pass"] is (result["monotonic_violation"] is False)
    plots = {"vram.png", "energy.png", "perplexity.png"}
    assert {p.name for p in path.parent.glob("*.png")} == plots
    assert "energy drift, trained" in done.stdout


@pytest.mark.slow
def test_a_sweep_survives_a_failing_cell_and_a_rerun_skips_finished_ones(tmp_path, bench):
    sweep = ["-m", "stage=1", "benchmark=stability", "benchmark.inputs=2", "benchmark.seq_len=0,8"]
    first = bench_apart(tmp_path, *sweep)
    assert first.returncode == 1
    assert "benchmark.seq_len=0" in first.stderr
    assert "Traceback" not in first.stderr
    (summary,) = tmp_path.glob("bench/sweep/*/summary.json")
    assert [cell["status"] for cell in json.loads(summary.read_text())] == ["failed", "measured"]
    assert (summary.parent / "summary.csv").exists()
    assert (summary.parent / "summary.png").exists()

    second = bench(tmp_path, *sweep)
    assert "already measured" in second.stdout
    newest = max(tmp_path.glob("bench/sweep/*/summary.json"), key=lambda path: path.stat().st_mtime_ns)
    assert newest != summary
    assert [cell["status"] for cell in json.loads(newest.read_text())] == ["failed", "reused"]


@pytest.mark.slow
def test_the_kernels_are_measured_beside_their_alternatives(tmp_path, bench):
    done = bench(
        tmp_path, "benchmark=kernels", "benchmark.batch_size=1", "benchmark.seq_len=300",
        "benchmark.repeats=1", "benchmark.warmup=0", "benchmark.ode_steps=2", "benchmark.compile=false",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("bench/*/*/result.json")
    result = json.loads(path.read_text())
    assert result["kernels_correct"] is True
    passes = passes_of(result)
    assert passes.pop("every operation is correct") is True
    worst = [result[f"kernels_{name}_ratio"] for name in ("worst", "sdpa")]
    assert list(passes.values()) == [ratio >= 0.95 for ratio in worst]
    assert result["attention_real_float32_sdpa_ratio"] > 0
    assert result["symplectic_flow_bfloat16_eager_ratio"] > 0
    rows = result["details"]["kernels"]
    assert len(rows) == 37
    assert all(row["alternatives"]["ours"]["peak_gb"] > 0 for row in rows.values())
    assert (path.parent / "kernels.png").read_bytes().startswith(b"\x89PNG")
    assert "rms norm, bfloat16:" in done.stdout
    assert "no operation slower than plain eager" in done.stdout
    # All but the path of the folder fits a terminal.
    assert [line for line in done.stdout.splitlines() if len(line) > 120 and str(tmp_path) not in line] == []


def test_a_wrong_value_is_one_sentence(tmp_path, bench):
    done = bench(tmp_path, "benchmark.warmup=-1")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "error: benchmark.warmup=-1 is too small; it must be at least 0"
    )


@pytest.mark.parametrize(("benchmark", "stages"), [("energy", "2 or 3"), ("adjoint", "2")])
def test_a_benchmark_of_the_flow_needs_one(tmp_path, bench, benchmark, stages):
    done = bench(tmp_path, "stage=1", f"benchmark={benchmark}")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        f"error: benchmark={benchmark} is about the flow; it needs stage={stages}"
    )


def test_a_sweep_over_steps_that_the_benchmark_does_not_take_is_refused(tmp_path, bench):
    done = bench(tmp_path, "stage=2", "benchmark=vram", "stage.ode_steps=1")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "error: stage.ode_steps changes nothing in benchmark=vram, whose flow has benchmark.ode_steps; give "
        "that one"
    )


@pytest.mark.slow
def test_the_stack_of_stage_3a_and_a_rerun_of_it(tmp_path, bench):
    text = write_text(tmp_path, 1000)
    arguments = [
        "stage=3a", "benchmark=speedup", "data=text", f"data.path={text}", "benchmark.train_steps=10",
        "benchmark.batch_size=8", "benchmark.repeats=1", "optim.accumulation=1", "benchmark.seq_len=32",
    ]  # fmt: skip
    losses = []
    for _ in range(2):
        done = bench(tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
        path = max(tmp_path.glob("bench/*/*/result.json"), key=lambda found: found.stat().st_mtime_ns)
        result = json.loads(path.read_text())
        assert result["seed"] == 42
        assert result["config"]["optim"]["schedule"] == "constant"
        assert result["checkpoints_pass"] is True
        passes = passes_of(result)
        for criterion in (
            "final losses apart", "NaN and Inf", "smallest gradient norm", "largest gradient norm",
            "checkpoints load", "texts that decode to the tokens of plain greedy decoding",
        ):  # fmt: skip
            assert passes[f"{criterion}, 1 batch an update"] is True, criterion
        assert passes["time saved, whole run, 1 batch an update"] is (result["speedup_pct"] >= 25)
        assert {p.name for p in path.parent.glob("*.png")} == {"speedup.png"}
        assert "loss/stack, 1 batch an update" in (path.parent / "metrics.jsonl").read_text()
        assert "attention: " in done.stdout
        losses.append([run["losses_hash"] for run in result["details"]["speedup"].values()])
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_an_ablation_says_which_part_pays(tmp_path, bench):
    text = write_text(tmp_path, 1000)
    done = bench(
        tmp_path, "stage=3a", "benchmark=speedup", "benchmark.ablation=true", "data=text",
        f"data.path={text}", "benchmark.train_steps=4", "benchmark.batch_size=4", "benchmark.repeats=1",
        "benchmark.warmup=0", "optim.accumulation=1", "benchmark.seq_len=32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("bench/*/*/result.json")
    result = json.loads(path.read_text())
    saved, pays = result["ablation_saved"], result["ablation_pays"]
    assert set(pays) == {"KernelOptimizer", "SemanticCompressor", "InferenceScalingEngine"}
    for part, verdict in pays.items():
        both = saved[f"{part} alone"] > 0 and saved["all three"] > saved[f"without {part}"]
        assert verdict is both, part
        assert f"{part} {'pays' if verdict else 'does not pay'}: alone it saves" in done.stdout
    runs = result["details"]["speedup ablation"]
    assert set(runs) == set(saved)
    assert all(run["updates"] == 4 for run in runs.values())
    decisions = {name: {d["name"]: d["kept"] for d in run["decisions"]} for name, run in runs.items()}
    assert decisions["SemanticCompressor alone"] == {"compression": True}
    assert "attention" in decisions["KernelOptimizer alone"]
    assert "decode_ratio" in runs["InferenceScalingEngine alone"]
    assert "decode_ratio" not in runs["without InferenceScalingEngine"]
    # So small a step fits into memory, and compiling cannot pay in four.
    assert {"compression", "compile"} <= set(result["left_off"])
    assert f"left off by the stack itself: {', '.join(result['left_off'])}" in done.stdout


@pytest.mark.slow
def test_the_simple_and_the_scaled_transformer_side_by_side_on_synthetic_data(tmp_path, bench, monkeypatch):
    # Their losses are not looked at, and models of their own size take long.
    monkeypatch.setattr("muse.benchmarks.speedup.EVALUATED_TOKENS", 128)
    done = bench(
        tmp_path, "-m", "stage=3a", "benchmark=speedup", "model=simple,scaled", "data=synthetic",
        "benchmark.train_steps=2", "benchmark.batch_size=2", "benchmark.repeats=1", "benchmark.warmup=0",
        "optim.accumulation=1", "stack.level=0", "stack.speculation=false",
        small=["model.vocab_size=300", "model.seq_len=16", "logger=none", "hardware=cpu"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("bench/sweep/*/summary.json")
    simple, scaled = json.loads(path.read_text())
    assert [cell["options"]["model"] for cell in (simple, scaled)] == ["simple", "scaled"]
    for key in ("parameters", "plain_memory_mb"):
        assert scaled[key] > 1.5 * simple[key] > 0, key
    for key in ("plain_update_ms", "plain_seconds"):
        assert min(scaled[key], simple[key]) > 0, key
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("parameters ")]
    assert float(rows[-1][-1]) == pytest.approx(scaled["parameters"] / simple["parameters"], rel=1e-3)
    assert (path.parent / "summary.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("stack.level=4", "stack.level=4"),
        ("stack.ratio=0.1", "stack.ratio=0.1"),
        ("benchmark=vram", "stage=3a"),
    ],
)
def test_wrong_options_of_the_stack_are_one_sentence(tmp_path, bench, argument, told):
    done = bench(tmp_path, "stage=3a", "benchmark=speedup", argument)
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
