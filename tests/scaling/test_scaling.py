"""The cost model against the code: what it counts is counted, nothing is timed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from muse.benchmarks.model import benchmark_model, random_training_step
from muse.benchmarks.vram import measure_memory
from muse.config import BenchConfig, BenchmarkConfig, ModelConfig, StageConfig, WidthConfig
from muse.measure.matrix_products import COMPLEX_ATTENTION, ProductRecorder
from muse.measure.operations import InsideOperations
from muse.measure.peak_memory import peak_memory
from muse.models import build_model, count_parameters
from muse.options import changed
from muse.processes.ranks import local
from muse.scaling.__main__ import main
from muse.scaling.counts import forward_flops, parameters, shapes, step_flops
from muse.scaling.memory import memory
from muse.scaling.prediction import Machine, predict
from muse.scaling.ranks import padded, traffic
from muse.training.optim import ModelOptimizer
from muse.training.parallel import ParallelLoss

CPU = torch.device("cpu")
WIDTH = WidthConfig(d_model=64, layers=2, heads=4, kv_heads=2, d_ff=160)
PLACE = ["--card", "h200", "--mfu", "0.4", "--network-gbs", "50"]


def build(number="1", width=WIDTH, windows=2, seq_len=320, vocab=512, **stage) -> BenchConfig:
    """A benchmark of a small model; windows are longer than those whose scores a CPU keeps."""
    stage = {
        "precision": "fp32" if number == "0" else "bf16",
        "activation": "swiglu" if number == "0" else "split_gelu",
        **stage,
    }
    return BenchConfig(
        stage=StageConfig(number=number, **stage),
        model=ModelConfig(name="test", vocab_size=vocab, seq_len=seq_len, real=width, complex=width),
        benchmark=BenchmarkConfig(name="vram", batch_size=windows, seq_len=seq_len),
    )


MODELS = [
    {"number": "0"},
    {"number": "0", "activation": "gelu", "tied": False},
    {"number": "1"},
    {"number": "1", "norm": "layer", "activation": "mod_swish", "tied": False},
    {"number": "1", "activation": "mod_relu", "score": "magnitude"},
    {"number": "1", "score": "phase"},
    {"number": "2"},
    {"number": "2", "ode_steps": 3, "integrator": "leapfrog"},
    {"number": "2", "context": False},
    {"number": "2", "context": False, "confinement": 0.0, "flows": 1},
    {"number": "2", "potential": "duffing"},
    {"number": "2", "gradient": "reversible"},
    {"number": "2", "gradient": "checkpoint", "ode_steps": 2},
    {"number": "2", "gradient": "backprop"},
]
KOOPMAN = [{"number": "3", "koopman": koopman} for koopman in ("none", "replace", "add")]
KOOPMAN += [
    {"number": "3", "koopman": "replace", form: False} for form in ("koopman_angles", "koopman_selective")
]
MERA = [
    {"number": "3", "mera": "replace"},
    {"number": "3", "mera": "add", "mera_levels": 3},
    {"number": "3", "mera": "replace", "mera_every": 1, "koopman": "replace"},
]
DIALECTIC = [
    {
        "number": "3",
        "koopman": "replace",
        "dialectic": dialectic,
        "dialectic_candidates": k,
        "dialectic_rounds": n,
    }
    for dialectic, k, n in (("mlp", 5, 1), ("mlp", 9, 3), ("hamiltonian", 16, 2))
]
STAGE_3 = [*KOOPMAN, *MERA, *DIALECTIC]
# Three blocks do not fill parts of two.
DEEP = dataclasses.replace(WIDTH, layers=3)
COMPUTED_AGAIN = [
    *({"number": number, "trunk": "reversible", "width": DEEP} for number in "012"),
    {"number": "2", "trunk": "reversible", "gradient": "checkpoint", "width": DEEP},
    *({"number": number, "recompute": "block", "width": DEEP} for number in "012"),
    *({"number": number, "recompute": "block", "recompute_blocks": 2, "width": DEEP} for number in "012"),
    {"number": "0", "recompute": "block", "activation": "gelu", "width": DEEP},
    {"number": "0", "recompute": "block", "dropout": 0.1, "width": DEEP},
    {"number": "2", "recompute": "block", "potential": "duffing", "width": DEEP},
    {"number": "2", "recompute": "block", "recompute_blocks": 2, "gradient": "backprop", "width": DEEP},
    {"number": "2", "recompute": "block", "gradient": "checkpoint", "ode_steps": 2, "width": DEEP},
]
COMPUTED_AGAIN += [{**MERA[0], "trunk": "reversible"}, {**MERA[2], "recompute": "block"}]
LOOPS = [
    *({"number": number, "loops": 2} for number in "012"),
    {"number": "0", "loops": 2, "recompute": "block", "recompute_blocks": 2, "width": DEEP},
]


@pytest.mark.parametrize("options", [*MODELS, *STAGE_3, {"number": "1", "mixer": "none"}], ids=str)
@pytest.mark.parametrize("size", [{}, {"d_model": 48, "layers": 3, "kv_heads": 4, "d_ff": 100}], ids=str)
def test_parameters_are_those_of_the_model(options, size):
    config = build(width=dataclasses.replace(WIDTH, **size), **options)
    model = build_model(config.stage, config.model, 300)
    assert parameters(config.stage, config.model, 300) == count_parameters(model)


def test_the_seeds_model_has_their_number_of_parameters():
    width = WidthConfig(d_model=512, layers=6, heads=8, kv_heads=8, d_ff=1344)
    config = build(width=width, seq_len=1024, mixer="none")
    assert parameters(config.stage, config.model, 50257) == 80_937_553


@pytest.mark.slow
@pytest.mark.parametrize("options", [*MODELS, *COMPUTED_AGAIN, *STAGE_3, *LOOPS], ids=str)
def test_flops_of_a_step_are_those_of_the_products_in_it(options):
    config = build(windows=1, **options)
    _, step = random_training_step(config, benchmark_model(config, CPU), CPU)
    with ProductRecorder() as recorder, InsideOperations(closed=COMPLEX_ATTENTION):
        step()

    def counted(products):
        return sum(product.flops() * count for product, count in products.items()) / 320

    expected = step_flops(config.stage, config.model, 512, 320)
    assert counted(recorder.attention_products) == pytest.approx(expected.attention)
    assert counted(recorder.products) == pytest.approx(expected.maps + expected.forces + expected.head)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_selection_takes_the_head_for_all_tokens_and_thrice_for_those_it_keeps(share):
    config = changed(build("1", windows=1), optim={"selection": "high", "selection_share": share})
    _, step = random_training_step(config, benchmark_model(config, CPU), CPU)
    with ProductRecorder() as recorder, InsideOperations(closed=COMPLEX_ATTENTION):
        step()
    counted = sum(product.flops() * count for product, count in recorder.products.items()) / 320
    expected = step_flops(config.stage, config.model, 512, 320, config.optim.kept_share)
    assert counted == pytest.approx(expected.maps + expected.head)


@pytest.mark.parametrize("number", ["0", "1", "2"])
def test_flops_of_a_forward_pass_are_those_that_torch_counts(number):
    config = build(number, windows=1, precision="fp32", width=dataclasses.replace(WIDTH, kv_heads=4))
    model = benchmark_model(config, CPU)
    counter = FlopCounterMode(display=False)
    # torch knows no FLOPs of a CPU's fused attention, and the plain one takes all keys.
    with counter, torch.no_grad(), InsideOperations(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 320, dtype=torch.int64))
    expected = forward_flops(config.stage, config.model, 512, 320)
    assert counter.get_total_flops() / 320 == pytest.approx(expected.total + expected.attention, rel=0.01)


MEASURED = [
    {"number": "0"},
    {"number": "0", "precision": "bf16", "width": dataclasses.replace(WIDTH, layers=4)},
    {"number": "1"},
    {"number": "1", "seq_len": 640},
    {"number": "1", "seq_len": 128, "windows": 8},
    {"number": "1", "width": dataclasses.replace(WIDTH, d_model=128, d_ff=320)},
    {"number": "1", "width": dataclasses.replace(WIDTH, layers=6)},
    {"number": "1", "vocab": 20_000},
    {"number": "1", "dropout": 0.1, "precision": "fp32"},
    {"number": "2"},
    {"number": "2", "seq_len": 640},
    {"number": "2", "width": dataclasses.replace(WIDTH, d_model=128)},
    {"number": "2", "width": dataclasses.replace(WIDTH, layers=6)},
    {"number": "2", "context": False, "precision": "fp32"},
    {"number": "2", "gradient": "reversible"},
    {"number": "2", "gradient": "checkpoint", "ode_steps": 4},
    {"number": "2", "gradient": "backprop"},
    {"number": "2", "gradient": "backprop", "ode_steps": 4},
    *(
        {"number": number, "trunk": "reversible", "width": dataclasses.replace(WIDTH, layers=layers)}
        for number in "012"
        for layers in (2, 6)
    ),
    # The largest phase is the backward pass of an attention, and of flows.
    {"number": "1", "trunk": "reversible", "seq_len": 640, "windows": 4},
    {"number": "1", "trunk": "reversible", "seq_len": 128, "windows": 8, "vocab": 128},
    {"number": "2", "trunk": "reversible", "precision": "fp32"},
    {"number": "2", "trunk": "reversible", "gradient": "backprop"},
    {"number": "2", "trunk": "reversible", "gradient": "checkpoint", "ode_steps": 4},
    *({"number": number, "recompute": "block", "width": DEEP} for number in "012"),
    *({"number": number, "recompute": "block", "recompute_blocks": 2, "width": DEEP} for number in "012"),
    {"number": "1", "recompute": "block", "recompute_blocks": 2, "seq_len": 640, "width": DEEP},
    {"number": "1", "recompute": "block", "recompute_blocks": 2, "precision": "fp32", "width": DEEP},
    {"number": "2", "recompute": "block", "recompute_blocks": 2, "seq_len": 640, "width": DEEP},
    {"number": "2", "recompute": "block", "gradient": "backprop", "width": DEEP},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", MEASURED, ids=str)
def test_memory_is_within_a_tenth_of_what_is_measured(options):
    config = build(**options)
    shape = config.benchmark.seq_len, config.benchmark.batch_size
    measured = measure_memory(config, CPU)
    expected = memory(config.stage, config.model, config.model.vocab_size, *shape, device="cpu")
    for name in ("parameters", "optimiser", "gradients"):
        assert getattr(expected, name) == pytest.approx(1e9 * measured[name], rel=1e-6)
    # Copies of the potential's weights are left out of backprop.
    tolerance = 0.03 if config.stage.gradient == "backprop" else 1e-3
    assert expected.activations == pytest.approx(1e9 * measured["activations"], rel=tolerance)
    assert expected.peak == pytest.approx(1e9 * measured["peak"], rel=0.1)


def test_memory_of_exact_does_not_grow_with_the_steps_and_that_of_backprop_does():
    def activations(gradient, steps):
        config = build("2", gradient=gradient, ode_steps=steps, integrator="blanes_moan_rkn4")
        return memory(config.stage, config.model, 512, 320, 2).activations

    assert activations("exact", 1) == activations("exact", 40)
    assert activations("checkpoint", 10) < activations("backprop", 10)
    assert activations("backprop", 10) > 5 * activations("backprop", 1)


def test_memory_does_not_grow_with_the_depth_of_a_reversible_trunk_but_for_parameters():
    def sizes(layers):
        config = build("2", width=dataclasses.replace(WIDTH, layers=layers), vocab=64, trunk="reversible")
        found = memory(config.stage, config.model, 64, 640, 4)
        return found.activations, found.peak - found.parameters - found.optimiser - found.gradients

    assert sizes(2)[0] == sizes(48)[0]
    assert sizes(2)[1] == pytest.approx(sizes(48)[1])


class Collectives(TorchDispatchMode):
    """Counts what is gathered and summed, in bytes of the whole tensor."""

    def __init__(self):
        super().__init__()
        self.bytes = 0
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        whole = {"_allgather_base_": 0, "_reduce_scatter_base_": 1}.get(func.overloadpacket.__name__)
        if whole is not None:
            self.bytes += args[whole].nbytes
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def pretended_ranks():
    """Starts a group in which this is the first of many ranks, and the others are pretended."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def start(ranks):
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())

    yield start
    dist.destroy_process_group()


def sharded_step(config):
    """A sharded model, its optimiser, and a function that takes a training step."""
    model = build_model(config.stage, config.model, config.model.vocab_size)
    loss = ParallelLoss(model, "fsdp")
    optimizer = ModelOptimizer(model, config.optim)
    tokens = torch.zeros(config.benchmark.batch_size, config.benchmark.seq_len, dtype=torch.int64)

    def step(number):
        model.zero_grad(set_to_none=True)
        with loss.gradients_summed(last=True):
            loss(tokens, tokens).backward()
        optimizer.attach_gradients()
        optimizer.gradient_norm()
        optimizer.step(number)

    return model, optimizer, step


SHARDED_AGAIN = [
    {"number": "1", "trunk": "reversible"},
    {"number": "2", "recompute": "block", "recompute_blocks": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", [*({"number": number} for number in "012"), *SHARDED_AGAIN], ids=str)
@pytest.mark.parametrize("ranks", [3, 8, 1000])
def test_what_fsdp_sends_and_holds(pretended_ranks, options, ranks):
    pretended_ranks(ranks)
    config = build(windows=1, seq_len=8, **options)
    model, _, step = sharded_step(config)
    with Collectives() as seen:
        step(0)
    size = 4 if config.stage.number == "0" else 2
    expected = traffic(shapes(config.stage, config.model, 512), size, "fsdp", ranks)
    assert expected.sent == pytest.approx(seen.bytes * (ranks - 1) / ranks)
    assert expected.collectives == seen.count
    held = memory(config.stage, config.model, 512, 8, 1, "cpu", "fsdp", ranks).parameters
    # The first rank has no empty rows.
    assert held == sum(local(parameter).nbytes for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"number": "1"}, {"number": "2"}, *SHARDED_AGAIN], ids=str)
def test_memory_of_a_rank_of_fsdp(pretended_ranks, options):
    pretended_ranks(8)
    config = build(vocab=4096, **options)
    model, optimizer, step = sharded_step(config)
    step(0)
    model.zero_grad(set_to_none=True)
    optimizer.attach_gradients()
    with peak_memory(CPU, model, optimizer.state_tensors()) as meter:
        step(1)
        peak = meter.peak()
    expected = memory(config.stage, config.model, 4096, 320, 2, "cpu", "fsdp", 8)
    assert expected.peak == pytest.approx(peak, rel=0.1)


def test_planes_that_ranks_do_not_divide_are_gathered_as_many_planes():
    assert padded((2, 512, 64), 64) == 2 * 512 * 64
    assert padded((2, 512, 64), 1000) == 1000 * 512 * 64
    assert padded((50257, 2, 4), 1000) == 51_000 * 8
    assert padded((7,), 8) == 8


def test_all_reduce_sends_the_gradients_nearly_twice():
    config = build("1")
    found, count = shapes(config.stage, config.model, 512), parameters(config.stage, config.model, 512)
    assert traffic(found, 2, "ddp", 2).sent == 2 * count
    assert traffic(found, 2, "ddp", 1000).sent == pytest.approx(2 * 2 * count * 0.999)
    assert traffic(found, 2, "ddp", 1).sent == 0


def predicted(ranks, batch_size=64, parallel="ddp", **machine):
    config = build("1", seq_len=1024)
    place = Machine(141e9, 1e15, 5e14, 0.5, 4e11, 5e10, 8, 0.0)
    place = dataclasses.replace(place, **machine)
    return predict(config.stage, config.model, batch_size, 1, parallel, ranks, place)


def test_each_limit_is_named():
    assert predicted(8).limits == ()
    assert predicted(48).limits[0] == "batch"
    assert predicted(8, memory=1e6).limits == ("memory",)
    assert predicted(8, link=1e6).limits == ("communication",)
    assert "uneven shards" in predicted(1000, 1000, "fsdp").limits


def test_a_prediction_is_compute_and_communication():
    one, eight = predicted(1), predicted(8)
    assert one.communication == 0
    assert eight.compute == pytest.approx(one.compute / 8)
    assert eight.apart == eight.compute + eight.communication
    slow = predicted(8, latency=1e-3)
    assert slow.communication - eight.communication == pytest.approx(14e-3)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs ``python -m muse.scaling`` in this process: exit status or message, and what it printed."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["muse.scaling", *arguments])
        status = 0
        try:
            main()
        except SystemExit as ended:
            status = ended.code
        return status, capsys.readouterr().out

    return run


def test_the_command_prints_what_it_assumes_and_a_row_for_each_number_of_ranks(command):
    status, out = command("stage=2", "model=tiny", "--ranks", "1,8,1000", *PLACE, "hardware.parallel=fsdp")
    assert status == 0
    assert "data sheet of h200" in out
    assert "989 TFLOPS" in out
    config = build("2", width=WidthConfig(d_model=96, layers=4, heads=4, kv_heads=4, d_ff=384))
    assert f"{parameters(config.stage, config.model, 4096):,} parameters" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line[:1].isdigit()}
    assert rows["1"].endswith("none")
    assert "batch" in rows["1,000"]


def test_the_command_counts_a_selection(command):
    tables = [command(f"optim.selection={kind}", *PLACE)[1] for kind in ("none", "random")]
    assert tables[0] != tables[1]


@pytest.mark.parametrize("number", ["1", "2"])
def test_the_deep_model_fits_a_card_with_65536_tokens_by_its_trunk(command, number):
    def limits(*options):
        place = ["--ranks", "1", "--card", "h100", *PLACE[2:]]
        _, out = command(f"stage={number}", "model=deep", *options, *place)
        return next(line for line in out.splitlines() if line.startswith("1 ")).split()[-1]

    assert limits("--windows", "4", "stage.trunk=reversible") == "none"
    assert limits("--windows", "32", "stage.trunk=reversible") == "none"
    assert limits("--windows", "32") == "memory"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["stage=3a", *PLACE], "stage=3a"),
        (["modl=tiny", *PLACE], "modl"),
        (["stage.precision=bf16-mixed", *PLACE], "choose one of fp32, bf16"),
        (["stage=2", "stage.gradient=checkpoint", "stage.recompute=block", *PLACE], "stage.gradient=exact"),
        (["--ranks", "0", *PLACE], "--ranks 0"),
        (["--mfu", "2", "--card", "h200", "--network-gbs", "50"], "--mfu 2"),
        (["--mfu", "0.4", "--network-gbs", "50"], "--memory-gb is not given"),
    ],
)
def test_wrong_options_are_one_sentence(command, arguments, told):
    status, _ = command(*arguments)
    assert status.startswith("error: ")
    assert told in status
    assert "\n" not in status
