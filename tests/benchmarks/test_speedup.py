import copy
import dataclasses
import json
import math
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.commands import default_stage

from muse.acceleration import Execution, KernelOptimizer, kernel_optimizer
from muse.acceleration import plan as plans
from muse.acceleration.plan import Plan, find_plan, memory_of_update
from muse.acceleration.training import StackTraining, batch_of
from muse.benchmarks import decoding, speedup, suite
from muse.benchmarks.speedup import (
    DECODE_KEYS,
    PLAIN,
    measure_speedup_memory,
    measure_speedup_pairs,
    measure_speedup_run,
)
from muse.benchmarks.suite import check_benchmark, settled
from muse.config import (
    BenchConfig,
    BenchmarkConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    StackConfig,
    StageConfig,
    TokenizerConfig,
    WidthConfig,
)
from muse.errors import ConfigError, RunError
from muse.launch import bench as bench_run

CPU = torch.device("cpu")
WIDTH = WidthConfig(d_model=32, layers=2, heads=2, kv_heads=2, d_ff=64)


@pytest.fixture
def speedup_config(tmp_path):
    """A comparison that takes a second; options of the parts are replaced by name."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} says {n * n}, and line {n % 7} does not\n" for n in range(3000)))

    def build(stack=None, accumulation=1, lr=1e-3, **benchmark):
        benchmark = {
            "name": "speedup", "batch_size": 4, "train_steps": 20, "repeats": 2, "warmup": 0, **benchmark,
        }  # fmt: skip
        config = BenchConfig(
            stage=StageConfig(number="3a", precision="fp32", activation="gelu", tied=False),
            model=ModelConfig(name="test", vocab_size=300, seq_len=32, real=WIDTH, complex=WIDTH),
            data=DataConfig(name="text", path=str(text), cache=str(tmp_path / "cache")),
            tokenizer=TokenizerConfig(vocab_size=300),
            optim=OptimConfig(
                lr=lr, weight_decay=0.01, schedule="constant", warmup=0, accumulation=accumulation
            ),
            benchmark=BenchmarkConfig(**benchmark),
            stack=stack or StackConfig(level=1),
            seed=42,
            output_root=str(tmp_path / "out"),
        )
        return settled(config, "speedup")

    return build


def started(config):
    return speedup._start(config, CPU)


def test_a_rerun_has_the_losses_of_the_run_bit_for_bit(speedup_config):
    config = speedup_config(train_steps=8)
    first, second, other = (
        measure_speedup_run(dataclasses.replace(config, seed=seed), CPU) for seed in (42, 42, 43)
    )
    assert first["losses_hash"] == second["losses_hash"] != other["losses_hash"]
    assert (first["loss"], first["valid_loss"]) == (second["loss"], second["valid_loss"])


@pytest.fixture
def kept_threads(monkeypatch):
    """A number of threads that is kept and read but not used: threads would wait for a busy processor."""
    chosen = [1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: chosen.__setitem__(0, count))


@pytest.mark.usefixtures("kept_threads")
@pytest.mark.parametrize("measure", [measure_speedup_run, measure_speedup_pairs, measure_speedup_memory])
def test_chosen_threads_do_not_outlive_the_measurement(speedup_config, measure, monkeypatch):
    # The next measurement in this process would look for a plan of another machine, and make other choices.
    threads = torch.get_num_threads()
    monkeypatch.setattr(plans, "_measured_plan", lambda *_: Plan(Execution(threads=threads + 1), seconds=1.0))
    during = []
    gradients = StackTraining.gradients

    def noting(training, numbers):
        during.append(torch.get_num_threads())
        gradients(training, numbers)

    monkeypatch.setattr(StackTraining, "gradients", noting)
    measure(speedup_config(train_steps=2), CPU)
    assert threads + 1 in during
    assert torch.get_num_threads() == threads


def test_the_stack_learns_what_the_plain_training_learns(speedup_config):
    plain, stack = (measure_speedup_run(speedup_config(s), CPU) for s in (PLAIN, StackConfig(level=2)))
    assert plain["curve"][-1][0] == 20
    assert plain["loss"] < math.log(300) - 0.5
    assert abs(plain["loss"] - stack["loss"]) < 0.05
    assert abs(plain["valid_loss"] - stack["valid_loss"]) < 0.05
    assert plain["curve"][0][1] == pytest.approx(stack["curve"][0][1], abs=0.01)


def test_times_are_complete_and_the_result_is_json(speedup_config):
    result = measure_speedup_run(speedup_config(), CPU)
    json.dumps(result, allow_nan=False)
    parts = ("tuning", "training", "evaluation", "sampling")
    assert result["seconds"] == pytest.approx(sum(result[f"{part}_seconds"] for part in parts))
    assert all(result[f"{part}_seconds"] > 0 for part in parts)
    assert result["seconds"] <= result["wall_seconds"] + result["tuning_seconds"]
    assert result["decode_equal"] is result["decode_equal_unguessed"] is True
    assert result["decode_texts_equal"] == result["decode_texts"] == 8
    assert result["decode_gap"] is None
    assert result["nan_count"] == result["inf_count"] == 0
    assert result["checkpoint_loads"] is True
    assert Path(result["texts"]["checkpoint"]).is_dir()
    assert result["texts"]["sample"].startswith("line")
    assert 0 < result["grad_norm_min"] <= result["grad_norm_max"] <= result["norm_max"]


@pytest.mark.parametrize("compiles", [True, False])
def test_compilation_is_told_apart_and_counts_in_the_total(speedup_config, monkeypatch, compiles):
    """Also that of an attempt which did not lead to compiled code."""

    real, compiling = time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: real() + compiling[0])

    def slow(function):
        first = iter([1000.0])

        def call(*arguments, **options):
            compiling[0] += next(first, 0.0)
            return function(*arguments, **options)

        return call

    plan = Plan(Execution(compile=compiles), seconds=5.0, compile_seconds=3.0)
    monkeypatch.setattr(torch, "compile", slow)
    monkeypatch.setattr(speedup, "find_plan", lambda *_: plan)
    result = measure_speedup_run(speedup_config(train_steps=3), CPU)
    # Each of the two blocks is compiled in the first batch.
    in_training = result["compile_seconds"] - 3.0
    assert in_training > 1000 if compiles else in_training == 0
    assert result["tuning_seconds"] == 5
    assert result["training_seconds"] > in_training
    assert result["seconds"] > 5.0 + in_training


def test_an_update_from_two_batches_is_that_of_one_twice_as_large(speedup_config):
    two, one = speedup_config(accumulation=2), speedup_config(batch_size=8)
    models = []
    for config, batches in ((two, 4), (one, 2)):
        config, data, model = started(config)
        # In float32 AdamW makes whole steps of gradients that are rounding errors.
        training = StackTraining(config, data, model.double(), Execution())
        for numbers in (range(batches // 2), range(batches // 2, batches)):
            training.take(numbers)
        assert len(training.optimizer.norms) == 2
        models.append(model)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(a, b, atol=1e-8)


def test_an_epoch_that_ends_within_an_update_has_the_weights_before_it(speedup_config, monkeypatch):
    """Of 20 batches ten epochs end after two each, and every third one with an update of three batches."""
    seen = []

    def evaluated(training):
        seen.append((len(training.optimizer.norms), training.model.embedding.weight.sum().item()))
        return 1.0

    monkeypatch.setattr(speedup, "_evaluated", evaluated)
    result = measure_speedup_run(speedup_config(PLAIN, accumulation=3), CPU)
    assert [updates for updates, _ in seen] == [2 * epoch // 3 for epoch in range(1, 11)]
    assert len(result["curve"]) == 20
    assert (result["updates"], len({weights for _, weights in seen})) == (6, 7)


def test_plain_updates_are_those_of_pytorch(speedup_config):
    """Written out as one would without the stack."""
    config, data, model = started(speedup_config(PLAIN, accumulation=2))
    other = copy.deepcopy(model.double())
    training = StackTraining(config, data, model, Execution())
    adamw = Execution().build_optimizer(other, config.optim)
    for update in range(3):
        numbers = range(2 * update, 2 * update + 2)
        training.take(numbers)
        for inputs, targets in (batch_of(config, data, number) for number in numbers):
            loss = F.cross_entropy(other(inputs).flatten(0, 1).float(), targets.flatten())
            (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), config.optim.clip)
        adamw.step()
        adamw.zero_grad()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-8)


def test_batches_beyond_the_last_update_change_nothing(speedup_config):
    result = measure_speedup_run(speedup_config(PLAIN, accumulation=8, train_steps=10), CPU)
    assert result["updates"] == 1


def test_choices_are_kept_for_reruns(speedup_config, monkeypatch):
    config, data, model = started(speedup_config())
    plan = find_plan(config, data, model)
    assert plan.seconds > 0
    assert {decision.name for decision in plan.decisions} >= {"attention", "loss", "optimizer", "compression"}

    def choose(*arguments):
        raise AssertionError("measured again")

    monkeypatch.setattr(KernelOptimizer, "choose", choose)
    assert find_plan(config, data, model) == plan
    again = dataclasses.replace(config, benchmark=dataclasses.replace(config.benchmark, rerun=True))
    other = dataclasses.replace(config, stack=StackConfig(level=2))
    for changed in (again, other):
        with pytest.raises(AssertionError, match="measured again"):
            find_plan(changed, data, model)


def test_a_plan_that_compiles_is_not_used_once_the_compiler_is_gone(speedup_config, monkeypatch):
    """The training goes on without compilation and says so."""

    def no_compiler(*arguments, **options):
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(kernel_optimizer, "COMPILE_SECONDS", -math.inf)
    monkeypatch.setattr(plans, "find_compiler", lambda _: "/bin/compiler")
    config, data, model = started(speedup_config(StackConfig(level=3)))
    plan = find_plan(config, data, model)
    (path,) = Path(config.data.cache).glob("plans/*.json")
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"execution": kept["execution"] | {"compile": True}}))
    assert find_plan(config, data, model).execution == dataclasses.replace(plan.execution, compile=True)

    monkeypatch.setattr(plans, "find_compiler", lambda _: None)
    result = measure_speedup_run(config, CPU)
    (decision,) = (d for d in result["decisions"] if d["name"] == "compile")
    assert decision["kept"] is False
    assert decision["why"] == "left off: cannot compile here: no compiler found"
    assert result["updates"] == 20

    monkeypatch.setattr(plans, "find_compiler", lambda _: "/bin/compiler")
    assert find_plan(config, data, model).execution.compile


@pytest.mark.usefixtures("kept_threads")
def test_a_plan_with_other_threads_is_found_again(speedup_config, monkeypatch):
    monkeypatch.setattr(kernel_optimizer, "_other_threads", lambda _: [2])
    monkeypatch.setattr(kernel_optimizer, "NOISE", -math.inf)
    config, data, model = started(speedup_config(StackConfig(level=1)))
    assert find_plan(config, data, model).execution.threads == 2
    assert torch.get_num_threads() == 1


def test_a_plan_that_does_not_compile_needs_no_compiler(speedup_config, monkeypatch):
    config, data, model = started(speedup_config(StackConfig(level=2)))
    plan = find_plan(config, data, model)
    monkeypatch.setattr(plans, "find_compiler", lambda _: None)
    assert find_plan(config, data, model) == plan


def test_a_damaged_plan_is_measured_anew(speedup_config):
    config, data, model = started(speedup_config())
    plan = find_plan(config, data, model)
    (path,) = Path(config.data.cache).glob("plans/*.json")
    path.write_text(path.read_text()[:40])
    assert find_plan(config, data, model).decisions[-1] == plan.decisions[-1]


@pytest.mark.parametrize(("memory_mb", "compressed"), [(0.1, True), (1000.0, False)])
def test_compression_is_used_where_memory_is_short(speedup_config, memory_mb, compressed):
    config, data, model = started(speedup_config(StackConfig(level=0, memory_mb=memory_mb)))
    plan = find_plan(config, data, model)
    assert plan.compress is compressed
    assert plan.decisions[-1].kept is compressed
    assert f"stack.memory_mb={memory_mb:.0f}" in plan.decisions[-1].why


def test_compression_on_request_leaves_compilation_out(speedup_config):
    config, data, model = started(speedup_config(StackConfig(level=3, compression="on")))
    plan = find_plan(config, data, model)
    assert plan.compress
    assert "compile" not in {decision.name for decision in plan.decisions}


def test_memory_falls_with_compression_and_counts_parameters_gradients_and_moments(speedup_config):
    config, data, model = started(speedup_config())
    parameters = sum(p.nbytes for p in model.parameters())
    plain, compressed = (
        memory_of_update(config, data, started(config)[2], Plan(Execution(), compress))
        for compress in (False, True)
    )
    assert 4 * parameters < compressed < plain


def test_what_compression_costs_is_told(speedup_config):
    measured = measure_speedup_memory(speedup_config(), CPU)
    assert measured["ratio"] <= 0.3
    assert 0 < measured["gradient_error"] < 0.05
    assert measured["compressed_mb"] < measured["uncompressed_mb"] == measured["stack_mb"]
    assert measured["uncompiled"] is False


@pytest.fixture
def counted(monkeypatch):
    """A stack that compiles, and the plans whose memory is counted: 1 MB, compiled 2 MB."""
    plans = []

    def peak(config, data, model, plan):
        plans.append(plan)
        return 2e6 if plan.execution.compile else 1e6

    monkeypatch.setattr(speedup, "memory_of_update", peak)
    monkeypatch.setattr(speedup, "find_plan", lambda *_: Plan(Execution(loss=True, compile=True)))
    return plans


def test_memory_of_compiled_code_is_not_counted_on_a_cpu_and_that_is_said(speedup_config, counted):
    measured = measure_speedup_memory(speedup_config(), CPU)
    assert measured["uncompiled"] is True
    assert measured["stack_mb"] == 1
    assert not any(plan.execution.compile for plan in counted)


def test_memory_of_compiled_code_is_that_of_the_stack_where_it_can_be_counted(
    speedup_config, counted, monkeypatch
):
    execution = Execution(loss=True, compile=True)
    assert speedup.countable(execution, torch.device("cuda")) == execution
    assert speedup.countable(execution, CPU) == Execution(loss=True)
    monkeypatch.setattr(speedup, "countable", lambda execution, _: execution)
    measured = measure_speedup_memory(speedup_config(), CPU)
    assert measured["uncompiled"] is False
    assert (measured["stack_mb"], measured["uncompressed_mb"]) == (2, 1)
    assert counted[-1] == Plan(execution)


@pytest.mark.parametrize("compiles", [True, False])
def test_memory_that_decides_on_compression_says_if_it_is_without_compilation(
    speedup_config, monkeypatch, compiles
):
    chosen = Execution(loss=True, compile=compiles)
    monkeypatch.setattr(KernelOptimizer, "choose", lambda *_: (chosen, []))
    plan = find_plan(*started(speedup_config()))
    assert plan.execution == chosen
    assert plan.decisions[-1].why.endswith("; counted without compilation") is compiles


def test_pairs_are_of_the_same_batches(speedup_config):
    measured = measure_speedup_pairs(speedup_config(repeats=5), CPU)
    assert measured["pairs"] == 5
    assert measured["saved_p20"] <= measured["saved"] <= measured["saved_p80"] < 1


def test_a_training_that_diverges_is_one_sentence(speedup_config):
    with pytest.raises(RunError, match=r"not finite in batch \d+.*optim.lr"):
        measure_speedup_run(speedup_config(PLAIN, lr=1e30), CPU)


def test_guessed_tokens_are_held_against_plain_greedy_decoding(speedup_config, monkeypatch):
    """Not against the same engine without guesses, which might be wrong as well."""
    greedy, texts = decoding.greedy_decode, []

    def other(model, prompt, tokens):
        ids = greedy(model, prompt, tokens)
        texts.append(prompt)
        # The first call warms up; of the texts two come out otherwise.
        return ids if len(texts) not in (3, 5) else [*ids[:-1], (ids[-1] + 1) % 300]

    monkeypatch.setattr(decoding, "greedy_decode", other)
    result = measure_speedup_run(speedup_config(), CPU)
    assert result["decode_equal"] is False
    assert result["decode_texts_equal"] == result["decode_texts"] - 2 == 6
    assert result["decode_equal_unguessed"] is True
    assert 0 < result["decode_gap"] < 2


def test_what_is_not_finite_is_counted_in_losses_norms_and_parameters(speedup_config):
    config, data, model = started(speedup_config())
    training = StackTraining(config, data, model, Execution())
    assert speedup._not_finite(training, [1.0]) == {"nan_count": 0, "inf_count": 0}
    training.optimizer.norms = [math.inf]
    next(model.parameters()).data[0, :3] = math.nan
    assert speedup._not_finite(training, [math.nan, 1.0, -math.inf]) == {"nan_count": 4, "inf_count": 2}


def test_training_goes_on_until_the_loss_is_reached(speedup_config, monkeypatch):
    monkeypatch.setattr(speedup, "LONGEST", 60)
    config = speedup_config(PLAIN)
    easy, hard = (measure_speedup_run(config, CPU, until=until)["target_step"] for until in (5.4, 0.0))
    curve = measure_speedup_run(config, CPU)["curve"]
    assert hard is None
    assert 10 <= easy <= 60
    if easy <= len(curve):
        assert sum(loss for _, loss in curve[easy - 10 : easy]) / 10 <= 5.4


@pytest.mark.parametrize(("target", "step"), [(5.0, 12), (0.5, None)])
def test_a_training_that_does_not_go_on_says_when_the_loss_was_reached(
    speedup_config, monkeypatch, target, step
):
    falling = [6.0] * 10 + [1.0] * 10

    def gradients(training, numbers):
        training.losses += [falling[number] for number in numbers]
        training.seconds += [1.0 for _ in numbers]

    monkeypatch.setattr(StackTraining, "gradients", gradients)
    monkeypatch.setattr(StackTraining, "update", lambda _: None)
    monkeypatch.setattr(speedup, "TARGET_LOSS", target)
    assert measure_speedup_run(speedup_config(PLAIN), CPU)["target_step"] == step


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"level": 4}, "stack.level=4 is not known; choose one of 0, 1, 2, 3"),
        ({"ratio": 0.2}, "stack.ratio=0.2 is not possible"),
        ({"ratio": 0.9}, "stack.ratio=0.9 is not possible"),
        ({"compression": "yes"}, "stack.compression=yes"),
        ({"memory_mb": 0.0}, "stack.memory_mb=0.0"),
        ({"speculation_warmup": -1}, "stack.speculation_warmup=-1"),
    ],
)
def test_wrong_options_are_one_sentence(options, told):
    with pytest.raises(ConfigError) as raised:
        StackConfig(**options)
    assert told in str(raised.value)


@pytest.mark.parametrize(("number", "name"), [("3a", "vram"), ("1", "speedup"), ("3a", "perplexity")])
def test_stages_and_benchmarks_that_do_not_go_together(speedup_config, tmp_path, number, name):
    config = speedup_config()
    stage = config.stage if number == "3a" else StageConfig()
    config = dataclasses.replace(config, stage=stage, benchmark=BenchmarkConfig(name=name))
    with pytest.raises(ConfigError, match=f"benchmark={name} does not go with stage={number}"):
        bench_run.run_benchmark(config, tmp_path)


@pytest.mark.parametrize("name", ["speedup", "all"])
@pytest.mark.parametrize(("steps", "accumulation"), [(0, 1), (0, 8), (7, 8)])
def test_a_training_without_an_update_is_refused(speedup_config, tmp_path, name, steps, accumulation):
    config = speedup_config(accumulation=accumulation, train_steps=steps, name=name)
    told = (
        f"benchmark.train_steps={steps} is too small for benchmark=speedup; it must be at least "
        f"optim.accumulation={accumulation}, the batches of one update"
    )
    with pytest.raises(ConfigError) as raised:
        bench_run.run_benchmark(config, tmp_path)
    assert str(raised.value) == told


def test_one_update_is_enough_and_other_benchmarks_need_none(speedup_config):
    check_benchmark(speedup_config(accumulation=8, train_steps=8), ())
    check_benchmark(speedup_config(accumulation=8, train_steps=0, name="kernels"), ())
    config = dataclasses.replace(speedup_config(train_steps=0, name="all"), stage=StageConfig())
    check_benchmark(config, ())


RUN = {
    "seconds": 100.0,
    "tuning_seconds": 0.0,
    "compile_seconds": 0.0,
    "tokens_per_second": 1000.0,
    "loss": 6.5,
    "valid_loss": 6.6,
    "grad_norm_min": 1e-3,
    "grad_norm_max": 1.0,
    "nan_count": 0,
    "inf_count": 0,
    "checkpoint_loads": True,
    "parameters": 10,
    "curve": [(1, 7.0), (2, 6.5)],
    "decisions": [],
}
STACK = {
    **RUN,
    "seconds": 60.0,
    "tuning_seconds": 9.0,
    "compile_seconds": 4.0,
    "tokens_per_second": 1500.0,
    "loss": 6.51,
    "decode_ratio": 3.0,
    "decode_plain": 100.0,
    "decode_speculative": 300.0,
    "decode_equal": True,
    "decode_texts": 8,
    "decode_texts_equal": 8,
    "decode_gap": None,
    "decode_equal_unguessed": True,
    "target_step": 90,
    "decisions": [
        {"name": "attention", "kept": True, "why": "kept"},
        {"name": "loss", "kept": False, "why": "left off"},
    ],
}
MEMORY = {
    "plain_mb": 600.0,
    "stack_mb": 400.0,
    "uncompressed_mb": 400.0,
    "compressed_mb": 300.0,
    "compressed": False,
    "uncompiled": False,
    "ratio": 0.28,
    "gradient_error": 1e-3,
    "time_ratio": 1.3,
}
PAIRS = {"saved": 0.4, "saved_p20": 0.38, "saved_p80": 0.42, "plain_ms": 50.0, "stack_ms": 30.0}


def report_of(monkeypatch, config, memory=None, pairs=None, change=None, **stack):
    """The report of made-up measurements, each as ``change(name, config, found)`` returns it."""

    def answer(name, config):
        if name == "speedup memory":
            return {**MEMORY, **(memory or {})}
        if name == "speedup pairs":
            return {**PAIRS, **(pairs or {})}
        return RUN if config.stack == PLAIN else {**STACK, **stack}

    def measure(name, config):
        found = answer(name, config)
        return found if change is None else change(name, config, found)

    monkeypatch.setattr(suite, "measure_isolated", measure)
    return suite.run_suite(config, Path("unused"), default_stage)


def test_everything_passes_when_it_does(speedup_config, monkeypatch):
    values = report_of(monkeypatch, speedup_config(accumulation=8)).values
    assert values["all_pass"] is True
    assert values["speedup_pct"] == pytest.approx(40)
    assert values["speedup_pct_accumulation_1"] == pytest.approx(40)
    assert values["loss_diff"] == pytest.approx(0.01)
    assert (values["stack_tuning_seconds"], values["stack_compile_seconds"]) == (9.0, 4.0)
    assert values["throughput_improvement_pct"] == pytest.approx(50)


def test_checkpoints_are_found_from_the_folder_of_the_results(speedup_config, monkeypatch):
    def change(name, config, found):
        if name in ("speedup memory", "speedup pairs"):
            return found
        return {**found, "texts": {"checkpoint": f"{config.output_root}/checkpoints/step_00000008"}}

    details = report_of(monkeypatch, speedup_config(accumulation=8, ablation=True), change=change).details
    found = {
        run["texts"]["checkpoint"]
        for part in ("speedup", "speedup ablation")
        for run in details[part].values()
    }
    assert {"plain-8/checkpoints/step_00000008", "stack-1/checkpoints/step_00000008"} <= found
    assert "ablation/all-three/checkpoints/step_00000008" in found


def test_each_setting_has_its_own_keys(speedup_config, monkeypatch):
    def change(name, config, found):
        return {**found, "decode_plain": 1.0, "loss": 2.0} if config.optim.accumulation == 1 else found

    values = report_of(monkeypatch, speedup_config(accumulation=8), change=change).values
    assert (values["decode_plain"], values["decode_plain_accumulation_1"]) == (100.0, 1.0)
    assert (values["stack_loss"], values["stack_loss_accumulation_1"]) == (6.51, 2.0)
    assert {f"{key}_accumulation_1" for key in ("speedup_pct", *DECODE_KEYS)} <= set(values)


@pytest.mark.parametrize(("step", "within"), [(20, True), (21, False)])
def test_the_batch_at_which_the_loss_is_reached_is_of_each_setting(speedup_config, monkeypatch, step, within):
    """Few updates do not reach it and have no criterion of it, but a key and why it is null."""

    def change(name, config, found):
        return {**found, "target_step": None} if config.optim.accumulation == 8 else found

    report = report_of(monkeypatch, speedup_config(accumulation=8), change=change, target_step=step)
    values = report.values
    assert (values["target_step"], values["target_within_run"]) == (None, False)
    assert values["target_step_accumulation_1"] == step
    assert values["target_within_run_accumulation_1"] is within
    assert set(report.unjudged) == {"target_step"}
    told = "20 batches, 8 batches an update, do not take the loss to 6.0, and only the training with"
    assert report.unjudged["target_step"].startswith(told)
    assert [row[1:] for row in report.criteria if row[0].startswith("batch at")] == [(step, "any", True)]
    assert values["all_pass"] is True


def test_few_updates_that_reach_the_loss_say_where(speedup_config, monkeypatch):
    report = report_of(monkeypatch, speedup_config(accumulation=8), target_step=9)
    assert (report.values["target_step"], report.values["target_within_run"]) == (9, True)
    assert report.unjudged == {}


@pytest.mark.parametrize(
    "changed",
    [
        {"seconds": 76.0},
        {"pairs": {"saved": 0.24}},
        {"tokens_per_second": 1190.0},
        {"valid_loss": 6.66},
        {"loss": 6.4},
        {"grad_norm_min": 1e-7},
        {"grad_norm_max": 1e4},
        {"checkpoint_loads": False},
        {"nan_count": 1},
        {"inf_count": 1},
        {"decode_equal": False},
        {"target_step": None},
        {"memory": {"stack_mb": 500.0}},
        {"memory": {"ratio": 0.31}},
    ],
    ids=str,
)
def test_each_criterion_can_fail(speedup_config, monkeypatch, changed):
    report = report_of(monkeypatch, speedup_config(), **changed)
    assert report.values["all_pass"] is False
    assert [passed for *_, passed in report.criteria].count(False) == 1


@pytest.mark.parametrize("uncompiled", [True, False])
def test_memory_without_compilation_is_called_so(speedup_config, monkeypatch, uncompiled):
    report = report_of(monkeypatch, speedup_config(), memory={"uncompiled": uncompiled})
    assert report.values["peak_memory_uncompiled"] is uncompiled
    told = "the stack without compilation" if uncompiled else "the stack"
    assert f"peak memory with {told} [MB]" in [title for title, *_ in report.criteria]


@pytest.mark.parametrize("failing", ["speedup", "speedup until learned", "speedup pairs", "speedup memory"])
def test_a_run_that_fails_leaves_its_keys_null(speedup_config, monkeypatch, failing):
    config = speedup_config(ablation=True)
    complete = report_of(monkeypatch, config)

    def change(name, config, found):
        if name == failing:
            raise RunError("it broke")
        return found

    report = report_of(monkeypatch, config, change=change)
    assert set(report.values) == set(complete.values)
    assert [title for title, *_ in report.criteria] == [title for title, *_ in complete.criteria]
    assert None in {passed for *_, passed in report.criteria}
    assert report.values["all_pass"] is None
    assert set(report.failures.values()) == {"it broke"}
    assert (report.values["speedup_pct"] is None) is (failing in ("speedup", "speedup until learned"))
    assert (report.values["peak_memory_mb"] is None) is (failing == "speedup memory")


def test_the_ablation_says_what_does_not_pay(speedup_config, monkeypatch, capsys):
    def measure(name, config):
        if name == "speedup memory":
            return MEMORY
        if name == "speedup pairs":
            return PAIRS
        stack = config.stack
        time = 100.0 - 40 * (stack.level > 0) + 15 * (stack.compression == "on") - 5 * stack.speculation
        return {**STACK, "seconds": time}

    monkeypatch.setattr(suite, "measure_isolated", measure)
    report = suite.run_suite(speedup_config(ablation=True), Path("unused"), default_stage)
    saved = report.values["ablation_saved"]
    assert saved["plain"] == 0
    assert saved["KernelOptimizer alone"] == pytest.approx(0.4)
    assert saved["SemanticCompressor alone"] == pytest.approx(-0.15)
    assert saved["without SemanticCompressor"] == pytest.approx(0.45)
    assert len(saved) == 8
    assert report.values["ablation_pays"] == {
        "KernelOptimizer": True, "SemanticCompressor": False, "InferenceScalingEngine": True,
    }  # fmt: skip
    assert report.values["left_off"] == ["loss"]
    told = capsys.readouterr().out
    assert "KernelOptimizer pays" in told
    assert "SemanticCompressor does not pay" in told
    assert "InferenceScalingEngine pays" in told
    assert "left off by the stack itself: loss" in told


def test_a_part_that_pays_only_alone_does_not_pay(speedup_config, monkeypatch):
    def change(name, config, found):
        stack = config.stack
        both = stack.level > 0 and stack.speculation
        time = 100.0 - 40 * (stack.level > 0) - 5 * stack.speculation + 10 * both
        return {**found, "seconds": time}

    pays = report_of(monkeypatch, speedup_config(ablation=True), change=change).values["ablation_pays"]
    assert pays == {"KernelOptimizer": True, "SemanticCompressor": False, "InferenceScalingEngine": False}


def test_a_part_without_a_run_has_no_verdict(speedup_config, monkeypatch, capsys):
    def change(name, config, found):
        stack = config.stack
        if name == "speedup" and (stack.level, stack.compression, stack.speculation) == (0, "off", True):
            raise RunError("it broke")
        return found

    pays = report_of(monkeypatch, speedup_config(ablation=True), change=change).values["ablation_pays"]
    assert [part for part, verdict in pays.items() if verdict is None] == ["InferenceScalingEngine"]
    assert "InferenceScalingEngine: not measured" in capsys.readouterr().out


def test_a_stack_that_did_not_run_left_nothing_off_that_is_known(speedup_config, monkeypatch, capsys):
    def change(name, config, found):
        if name == "speedup until learned":
            raise RunError("it broke")
        return found

    assert report_of(monkeypatch, speedup_config(ablation=True), change=change).values["left_off"] is None
    assert "left off by the stack itself: not measured" in capsys.readouterr().out
