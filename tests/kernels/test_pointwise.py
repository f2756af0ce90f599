"""What norms, activations and rotary positions have in common."""

from __future__ import annotations

import math

import pytest
import torch
from support.pointwise import DTYPES, OPERATIONS, case, results, scattered, table_of, turned
from support.rounding import assert_as_accurate

from kernels import chunks, complex_activation, complex_norm, complex_rotary
from kernels.complex_activation import ACTIVATIONS
from kernels.complex_norm import add_complex_rms_norm
from kernels.complex_rotary import split_heads
from kernels.launch import TARGETS, compiling_for

FOLDERS = [complex_norm, complex_activation, complex_rotary]
# With 1 real number at a time each token is a chunk of its own; 40 leaves an incomplete last chunk.
CHUNKS = [1, 40, 2**18]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_value_and_gradients_are_those_of_the_definition(name, chunk, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    function, plain, leaves = case(name)
    for actual, expected in zip(results(function, leaves), results(plain, leaves), strict=True):
        torch.testing.assert_close(actual, expected)


SIZES = [(1, 1), (3, 63), (7, 65)]


# Every two of these choices meet.
@pytest.mark.parametrize(
    ("name", "dtype", "sizes"),
    [(name, DTYPES[k], SIZES[(n + k) % 3]) for n, name in enumerate(OPERATIONS) for k in range(3)],
)
def test_accuracy(name, dtype, sizes):
    function, plain, leaves = case(name, *sizes, dtype=dtype)
    exact = results(plain, leaves, torch.float64)
    assert_as_accurate(results(function, leaves), lambda: results(plain, leaves), exact)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_do_not_change_a_bit(name, dtype, monkeypatch):
    # Whole vectors in every chunk: the last few numbers may go through other code of torch.
    function, _, leaves = case(name, length=9, width=16, dtype=dtype)
    with torch.no_grad():
        whole = function(*leaves)
        monkeypatch.setattr(chunks, "CHUNK", 70)
        apart = function(*leaves)
    whole, apart = (x if isinstance(x, tuple) else (x,) for x in (whole, apart))
    assert all(map(torch.equal, whole, apart))


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ACTIVATIONS])
def test_gradcheck(name):
    function, _, leaves = case(name, length=3, width=4)
    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("name", OPERATIONS)
def test_registration(name):
    """opcheck of the forward op and, on what the former returned, of the backward op."""
    # Statistics are float32 then: a dtype other than that of the state.
    leaves = [leaf.requires_grad_() for leaf in case(name, dtype=torch.bfloat16)[2]]
    z, *rest = leaves
    check = torch.library.opcheck
    if name == "rms_norm":
        check(complex_norm._complex_rms_norm, (z, *rest, 1e-6))
        rstd = complex_norm._complex_rms_norm(z, *rest, 1e-6)[1]
        check(complex_norm._complex_rms_norm_backward, (z.detach(), z.detach(), rest[0].detach(), rstd, None))
    elif name == "add_rms_norm":
        check(complex_norm._add_complex_rms_norm, (*leaves, 1e-6))
        total, normal, rstd = (x.detach() for x in complex_norm._add_complex_rms_norm(*leaves, 1e-6))
        check(complex_norm._complex_rms_norm_backward, (normal, total, rest[1].detach(), rstd, z.detach()))
    elif name == "layer_norm":
        check(complex_norm._complex_layer_norm, (*leaves, 1e-6))
        statistics = complex_norm._complex_layer_norm(*leaves, 1e-6)[1]
        arguments = (z.detach(), z.detach(), rest[0].detach(), statistics, 1e-6)
        check(complex_norm._complex_layer_norm_backward, arguments)
    elif name in ACTIVATIONS:
        offset, slope = (*rest, None, None)[:2]
        check(complex_activation._complex_activation, (z, name, offset, slope))
        parameters = (None if p is None else p.detach() for p in (offset, slope))
        check(complex_activation.complex_activation_backward, (z.detach(), z.detach(), name, *parameters))
    elif name == "split_heads":
        table = table_of(6, 5).float()
        check(complex_rotary._complex_split_heads, (z, table, 3, 2))
        parts = (x.detach() for x in split_heads(z, table, 3, 2))
        check(complex_rotary._complex_split_heads_backward, (*parts, table))
    else:
        check(complex_rotary._complex_rotate, (z, table_of(6, 5).float(), name == "rotate_back"))


@pytest.mark.slow
def test_compiles_in_one_graph():
    cases = [case(name, dtype=torch.float32) for name in OPERATIONS]
    leaves = [leaf for *_, own in cases for leaf in own]

    def everything(*leaves):
        outputs, rest = [], list(leaves)
        for function, _, own in cases:
            output = function(*(rest.pop(0) for _ in own))
            outputs += output if isinstance(output, tuple) else (output,)
        return tuple(x * 2 for x in outputs)

    compiled = torch.compile(everything, fullgraph=True)
    for actual, expected in zip(results(compiled, leaves), results(everything, leaves), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_repeated_backward_is_bitwise_equal(name):
    function, _, leaves = case(name, length=40, width=33, dtype=torch.float32)
    assert all(map(torch.equal, results(function, leaves), results(function, leaves)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_input_need_not_be_contiguous(name):
    function, _, leaves = case(name)
    for actual, expected in zip(results(function, scattered(leaves)), results(function, leaves), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradient_need_not_be_contiguous(name):
    function, _, leaves = case(name)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # The gradient of a sum is one number seen as a tensor.
    expected = torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs], retain_graph=True)
    got = torch.autograd.grad(sum(x.sum() for x in outputs), leaves)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_tokens(name):
    function, _, leaves = case(name, batch=0)
    out, *_, last = results(function, leaves)
    assert out.numel() == 0
    assert (last == 0).all()


@pytest.mark.parametrize(
    "name", [name for name in OPERATIONS if name not in ("rotate", "rotate_back", "split_gelu")]
)
def test_refuses_a_second_derivative(name):
    """The backward passes take statistics as constants, so a second derivative would be wrong."""
    function, _, leaves = case(name)
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def second_derivative():
        out = function(*leaves)
        out = out[-2] if isinstance(out, tuple) else out
        (gradient, *_) = torch.autograd.grad(out.pow(3).sum(), leaves, create_graph=True, allow_unused=True)
        gradient.square().sum().backward()

    if name == "add_rms_norm":
        z, branch, gain = leaves
        loss = add_complex_rms_norm(z, branch, gain)[1].pow(3).sum()
        (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
        with pytest.raises(RuntimeError):
            gradient.square().sum().backward()
    else:
        with pytest.raises(RuntimeError):
            second_derivative()


def saved_bytes(function, leaves):
    """Bytes kept for the backward pass beyond the leaves, by storage."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaves = [leaf.requires_grad_() for leaf in leaves]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for leaf in leaves:
        kept.pop(leaf.untyped_storage().data_ptr(), None)
    own = {x.untyped_storage().data_ptr() for x in outputs}
    return sum(size for at, size in kept.items() if at not in own)


@pytest.mark.parametrize(
    ("name", "bytes_a_token"),
    [("rms_norm", 4), ("add_rms_norm", 4), ("layer_norm", 20), *((kind, 0) for kind in ACTIVATIONS)],
)
def test_keeps_a_few_numbers_a_token(name, bytes_a_token):
    function, _, leaves = case(name, length=32, width=64, dtype=torch.bfloat16)
    assert saved_bytes(function, leaves) == 2 * 32 * bytes_a_token


@pytest.mark.parametrize("name", ["rms_norm", "mod_relu", "mod_swish"])
@pytest.mark.parametrize("angle", [0.3, math.pi / 2, 3.0])
def test_turns_with_its_input(name, angle):
    function, _, (z, *parameters) = case(name)
    torch.testing.assert_close(
        function(turned(z, angle), *parameters), turned(function(z, *parameters), angle)
    )


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_pinned_configurations_cover_every_width(target):
    for kernel, table in (pair for folder in FOLDERS for pair in folder.triton_code.PINNED.table.items()):
        for bits in ("16", "32"):
            widths = {int(width): options for width, options in table[target.name][bits].items()}
            assert list(widths) == ([1024, 4096, 8192] if "norm" in kernel else [1])
            for width, options in widths.items():
                assert options["TILE"] >= (width if "norm" in kernel else options["COLUMNS"])
                assert ("PROGRAMS" in options) == ("backward" in kernel)


def test_every_kernel_is_compiled_ahead_of_time():
    seen = set()

    def compiler(kernel, arguments, options):
        seen.add(kernel.__name__)
        widths.add(options.get("BLOCK_D"))

    widths = set()
    with compiling_for(TARGETS[0], compiler), torch.device("meta"):
        for call in (call for folder in FOLDERS for call in folder.triton_code.compile_cases().values()):
            call()
    kernels = {name for folder in FOLDERS for name in vars(folder.triton_code) if name.endswith("_kernel")}
    assert seen == kernels
    assert {1024, 4096, 8192} <= widths
