from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support.acceleration import batch, build, gradients, joined, relative_error
from torch.distributed._tools.mem_tracker import MemTracker

from muse.acceleration import Execution, SemanticCompressor
from muse.acceleration.semantic_compressor import SMALLEST_TENSOR, block_length, compress, decompress

FLOATS = [torch.float32, torch.bfloat16]
by_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


class Recorder(SemanticCompressor):
    """Notes what it is given and what it makes of it."""

    def __init__(self, ratio=0.3):
        super().__init__(ratio)
        self.packed = []

    def _pack(self, x):
        result = super()._pack(x)
        self.packed.append((x, result))
        return result

    def compressed(self):
        return [(x, result) for x, result in self.packed if not isinstance(result, torch.Tensor)]

    def left_alone(self):
        return [x for x, result in self.packed if result is x]


class Keep(torch.autograd.Function):
    """Saves a tensor; ``restored`` is what the backward pass is given of it."""

    @staticmethod
    def forward(ctx, leaf, x):
        ctx.save_for_backward(x)
        return leaf.sum()

    @staticmethod
    def backward(ctx, grad):
        (Keep.restored,) = ctx.saved_tensors
        return grad.expand(1), None


def restored(x, ratio=0.3):
    leaf = torch.zeros(1, requires_grad=True)
    with SemanticCompressor(ratio):
        out = Keep.apply(leaf, x)
    out.backward()
    return Keep.restored


def allowed_error(x, block):
    """Half a 127th of the largest magnitude among each ``block`` elements in the order of memory."""
    flat = x.detach().double().flatten()
    largest = F.pad(flat, (0, -len(flat) % block)).view(-1, block).abs().amax(1)
    # A little more, because a scale is rounded to float32.
    return (largest / 254 * (1 + 1e-4)).repeat_interleave(block)[: len(flat)].view(x.shape)


def rounding(x):
    """Of a restored value to the dtype of x."""
    return x.double().abs() * torch.finfo(x.dtype).eps


VALUES = {
    "normal": torch.randn,
    "zeros": torch.zeros,
    "constant": lambda n: torch.full((n,), -3.7),
    "one outlier": lambda n: torch.randn(n).index_fill(0, torch.tensor([n // 2]), 1e6),
    "mostly zeros": lambda n: torch.randn(n) * (torch.rand(n) < 0.02),
    "wide range": lambda n: torch.randn(n) * 10 ** (40 * torch.rand(n) - 20),
    "tiny": lambda n: 1e-30 * torch.randn(n),
    "huge": lambda n: 1e30 * torch.randn(n),
    "largest": lambda n: 3e38 * (2 * torch.rand(n) - 1),
}


# ---- The codes


@by_dtype
@pytest.mark.parametrize("size", [1, 31, 4096, 4097, 10_007])
@pytest.mark.parametrize("values", VALUES)
def test_error_is_at_most_half_a_code(values, size, dtype):
    x = VALUES[values](size).to(dtype)
    for block in (2, 32, 1024):
        codes, scales = compress(x, block)
        assert codes.dtype == torch.int8
        assert codes.shape == (size,)
        exact = codes.double() * scales.double().expand(-1, block).flatten()[:size]
        assert ((exact - x.double()).abs() <= allowed_error(x, block)).all()
        found = decompress(codes, scales, block, x.shape, dtype)
        assert found.dtype == dtype
        error = (found.double() - x.double()).abs()
        assert (error <= allowed_error(x, block) + rounding(found)).all()
        assert (found[x == 0] == 0).all()


@pytest.mark.parametrize("scale", [1e-36, 1e-37, 1e-38])
def test_error_is_at_most_half_a_code_next_to_the_smallest_float(scale):
    x = scale * torch.randn(4096)
    codes, scales = compress(x, 32)
    exact = codes.double() * scales.double().expand(-1, 32).flatten()
    # A scale may itself have few digits left.
    assert ((exact - x.double()).abs() <= allowed_error(x, 32) + 1e-42).all()


@by_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_hidden(bad, dtype):
    x = torch.randn(4096).to(dtype)
    x[70] = bad
    found = decompress(*compress(x, 32), 32, x.shape, dtype)
    assert not found[70].isfinite()
    assert found[:64].isfinite().all()
    assert found[96:].isfinite().all()


# ---- What is held of a tensor


@pytest.mark.parametrize("ratio", [0.26, 0.28125, 0.3, 0.5, 1.0])
@by_dtype
def test_restored_tensors_are_close(ratio, dtype):
    x = torch.randn(60, 90).to(dtype)
    found = restored(x, ratio)
    assert found.dtype == dtype
    error = (found.double() - x.double()).abs()
    assert (error <= allowed_error(x, block_length(ratio)) + rounding(found)).all()
    assert not torch.equal(found, x)


@by_dtype
@pytest.mark.parametrize(
    ("view", "dense"),
    [
        (lambda x: x, True),
        (lambda x: x.transpose(1, 2), True),
        (lambda x: x.permute(3, 0, 2, 1), True),
        (lambda x: x.permute(2, 3, 1, 0), True),
        (lambda x: x.flatten(), True),
        (lambda x: x[1:].transpose(0, 1), True),
        (lambda x: x[:, ::2].transpose(1, 2), False),
        (lambda x: x.unflatten(-1, (2, -1))[..., 1, :].transpose(1, 3), False),
        (lambda x: x[:, :, :, None, 3:].transpose(0, 4), False),
        (lambda x: x[:1].expand(5, -1, -1, -1), False),
    ],
)
def test_shape_and_strides_are_restored(view, dense, dtype):
    x = view(torch.randn(4, 6, 20, 16).to(dtype))
    found = restored(x)
    assert found.shape == x.shape
    if dense:
        assert found.stride() == x.stride()
    # Magnitudes as they are, so that no two elements can be mistaken for each other.
    assert (
        (found.double() - x.double()).abs() <= x.abs().max().double() / 254 * 1.001 + rounding(found)
    ).all()
    assert relative_error(found, x) < 0.01


@pytest.mark.parametrize("ratio", [0.251, 0.26, 0.28125, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(4, 1024), (64, 32, 8), (2, 3, 4096)], ids=str)
def test_ratio_is_not_exceeded(ratio, shape):
    with Recorder(ratio) as compressor:
        Keep.apply(torch.zeros(1, requires_grad=True), torch.randn(shape))
    (_, packed), = compressor.compressed()  # fmt: skip
    held = packed.codes.nbytes + packed.scales.nbytes
    assert (compressor.held, compressor.original) == (held, 4 * math.prod(shape))
    assert 0.25 < compressor.ratio <= ratio


@pytest.mark.parametrize("ratio", [0.251, 0.26, 0.28125, 0.5])
def test_ratio_is_not_exceeded_where_blocks_do_not_fit(ratio):
    with SemanticCompressor(ratio) as compressor:
        Keep.apply(torch.zeros(1, requires_grad=True), torch.randn(4097))
    assert compressor.ratio <= ratio


@pytest.mark.parametrize("ratio", [-1.0, 0.0, 0.1, 0.25, 1.0001, 2.0, math.nan, math.inf])
def test_impossible_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match=str(ratio)):
        SemanticCompressor(ratio)


def test_nothing_compressed_has_no_ratio():
    compressor = SemanticCompressor()
    assert compressor.ratio is None
    with compressor:
        torch.ones(5, requires_grad=True).sin()
    assert compressor.ratio is None


# ---- What is compressed


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(5000),
        torch.arange(5000) % 2 == 0,
        torch.zeros(100, 100, dtype=torch.uint8),
        torch.randn(SMALLEST_TENSOR - 1),
        torch.randn(1),
        torch.randn(0),
        torch.randn(5000, dtype=torch.complex64),
    ],
    ids=lambda x: f"{x.dtype} {x.numel()}",
)
def test_integers_and_small_tensors_are_untouched(x):
    found = restored(x)
    assert found.dtype == x.dtype
    assert torch.equal(found, x)
    assert found.data_ptr() == x.data_ptr()


def test_the_smallest_tensor_that_is_compressed():
    x = torch.randn(SMALLEST_TENSOR)
    assert not torch.equal(restored(x), x)


def weights_of(model):
    """Of each matrix, what autograd may save of it."""
    forms = []
    for parameter in model.parameters():
        if parameter.numel() >= SMALLEST_TENSOR:
            for dtype in FLOATS:
                value = parameter.detach().to(dtype)
                forms += [value, value.t()]
    return forms


def is_one_of(x, forms):
    return any(x.dtype == f.dtype and x.shape == f.shape and torch.equal(x, f) for f in forms)


@pytest.mark.parametrize("products", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_weights_are_not_compressed(products, fused):
    model, (inputs, _) = build(d_model=64, d_ff=96), batch()
    execution = Execution(attention=fused, products=products)
    execution.apply(model)
    with Recorder() as compressor, execution.autocast(inputs.device):
        model.features(inputs)
    forms = weights_of(model)
    assert not any(is_one_of(x, forms) for x, _ in compressor.compressed())
    # Of four maps in each of two blocks, the weight is needed for the gradient of the input.
    saved = {x.data_ptr() for x in compressor.left_alone() if is_one_of(x, forms)}
    assert len(saved) == 8
    assert {x.dtype for x in compressor.left_alone() if is_one_of(x, forms)} == {
        torch.bfloat16 if products else torch.float32
    }
    # In a block at least: two norms' inputs, those of the four maps, GELU's, and q, k and v.
    assert len({id(packed) for _, packed in compressor.compressed()}) >= 2 * 9


@pytest.mark.parametrize(
    "form",
    [
        lambda w: w,
        lambda w: w.t(),
        lambda w: w.view(-1),
        lambda w: w.bfloat16(),
        lambda w: w.bfloat16().t(),
        lambda w: w.t().bfloat16().transpose(0, 1),
    ],
)
def test_views_and_casts_of_a_parameter_are_untouched(form):
    x = form(torch.nn.Parameter(torch.randn(100, 100)))
    found = restored(x)
    assert torch.equal(found, x)
    assert found.data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    "form",
    [lambda w: w * 1, lambda w: w.sin().t(), lambda w: (w + w).bfloat16(), lambda w: (w @ w).view(-1)],
)
def test_what_is_computed_from_a_parameter_is_compressed(form):
    x = form(torch.nn.Parameter(torch.randn(100, 100)))
    assert not torch.equal(restored(x), x)


# ---- Tensors that are saved twice


def test_a_tensor_saved_twice_is_held_once():
    x = torch.randn(80, 80)
    a, b = (torch.randn(80, 80, requires_grad=True) for _ in range(2))
    with Recorder() as compressor:
        out = (a * x).sum() + (b * x).sum() + (a * x).sin().sum()
    saved = [packed for y, packed in compressor.compressed() if y.data_ptr() == x.data_ptr()]
    assert len(saved) == 3
    assert len({id(packed) for packed in saved}) == 1
    other = [packed for y, packed in compressor.compressed() if y.data_ptr() != x.data_ptr()]
    assert len(other) == 1
    assert compressor.original == 2 * x.nbytes
    assert compressor.held == sum(p.codes.nbytes + p.scales.nbytes for p in (saved[0], other[0]))
    out.backward()
    assert relative_error(b.grad, x) < 0.01


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda x: x[:100], lambda x: x[100:]),
        (lambda x: x[:100], lambda x: x[:100].t()),
        (lambda x: x[:100], lambda x: x[:100].reshape(50, 200)),
        (lambda x: x[:100], lambda x: x[:100].view(torch.int32).view(torch.float32) * 1),
        (lambda x: x[::2], lambda x: x[1::2]),
        (lambda x: x[::2], lambda x: x[:100]),
    ],
)
def test_views_of_one_tensor_are_told_apart(first, second):
    x = torch.randn(200, 100)
    views = first(x), second(x)
    leaves = [torch.zeros_like(view).requires_grad_() for view in views]
    with SemanticCompressor() as compressor:
        out = sum((leaf * view).sum() for leaf, view in zip(leaves, views, strict=True))
    out.backward()
    for leaf, view in zip(leaves, views, strict=True):
        assert relative_error(leaf.grad, view) < 0.01
    assert compressor.original == sum(view.nbytes for view in views)


def test_views_in_other_dtypes_are_told_apart():
    halves = torch.randn(100, 100).bfloat16()
    views = halves, halves.view(torch.float16)
    leaves = [torch.zeros_like(view).requires_grad_() for view in views]
    with SemanticCompressor():
        out = sum((leaf * view).sum().double() for leaf, view in zip(leaves, views, strict=True))
    out.backward()
    for leaf, view in zip(leaves, views, strict=True):
        assert leaf.grad.dtype == view.dtype
        assert relative_error(leaf.grad, view) < 0.02


def test_a_tensor_changed_in_place_is_held_anew():
    x, weights = torch.randn(80, 80), torch.zeros(2, 80, 80, requires_grad=True)
    before = x.clone()
    with SemanticCompressor():
        first = (weights[0] * x).sum()
        x.neg_()
        second = (weights[1] * x).sum()
    (first + second).backward()
    assert relative_error(weights.grad[0], before) < 0.01
    assert relative_error(weights.grad[1], -before) < 0.01


def test_a_new_tensor_in_the_place_of_a_freed_one_is_not_mistaken_for_it():
    weights = torch.zeros(50, 64, 64, requires_grad=True)
    places, out = set(), torch.zeros(())
    with SemanticCompressor() as compressor:
        for i, weight in enumerate(weights):
            x = torch.full((64, 64), i + 1.0)
            places.add(x.data_ptr())
            out = out + (weight * x).sum()
            del x
    assert len(places) < 50, "no memory was used twice"
    out.backward()
    expected = torch.arange(1.0, 51)[:, None, None].expand_as(weights)
    torch.testing.assert_close(weights.grad, expected, rtol=1e-5, atol=0)
    assert compressor.original == 50 * 4 * 64 * 64


def test_what_was_held_in_one_pass_is_not_taken_for_that_of_the_next():
    """A buffer written anew between the passes, where autograd does not notice."""
    weight, buffer = torch.zeros(64, 64, requires_grad=True), torch.zeros(64, 64)
    compressor = SemanticCompressor()
    for value in (1.0, 2.0):
        buffer.data.fill_(value)
        with compressor:
            out = (weight * buffer).sum()
        (found,) = torch.autograd.grad(out, weight)
        torch.testing.assert_close(found, buffer)
    assert compressor.original == 2 * buffer.nbytes


# ---- A model under compression


@pytest.mark.parametrize(
    "execution",
    [Execution(), Execution(attention=True, loss=True), Execution(attention=True, products=True)],
    ids=["plain", "fused", "half precision products"],
)
@pytest.mark.parametrize("ratio", [0.26, 0.5])
def test_forward_pass_stays_and_the_gradient_is_close(execution, ratio):
    model, (inputs, targets) = build(d_model=64), batch()
    execution.apply(model)
    expected = execution.training_loss(model, inputs, targets)
    wanted = gradients(model, expected)
    with SemanticCompressor(ratio), execution.autocast(inputs.device):
        features = model.features(inputs)
    with execution.autocast(inputs.device):
        assert torch.equal(features, model.features(inputs))
    compressor = SemanticCompressor(ratio)
    loss = execution.training_loss(model, inputs, targets, saving=compressor)
    assert torch.equal(loss, expected)
    found = gradients(model, loss)
    # The head lies outside of the compression and sees the same features.
    for name in ("head.weight", "head.bias", "norm.bias"):
        assert torch.equal(found[name], wanted[name])
    error = relative_error(joined(found), joined(wanted))
    assert 1e-5 < error < 0.02
    for name in wanted:
        if name.endswith("weight") and "blocks" in name:
            assert not torch.equal(found[name], wanted[name]), name
            assert relative_error(found[name], wanted[name]) < 0.04, name
    assert 0.25 < compressor.ratio <= ratio


def test_errors_of_the_gradient_are_smaller_in_smaller_blocks():
    model, data = build(d_model=64), batch()
    wanted = joined(gradients(model, Execution().training_loss(model, *data)))
    errors = []
    for ratio in (0.251, 0.28125, 0.5):
        loss = Execution().training_loss(model, *data, saving=SemanticCompressor(ratio))
        errors.append(relative_error(joined(gradients(model, loss)), wanted))
    assert errors == sorted(errors, reverse=True)


def test_a_compressor_is_used_for_many_steps():
    """With an update between them the second step is that of the new parameters."""
    model, compressor, held = build(), SemanticCompressor(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        data = batch()
        wanted = joined(gradients(model, Execution().training_loss(model, *data)))
        optimizer.zero_grad()
        Execution().training_loss(model, *data, saving=compressor).backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert 0 < relative_error(found, wanted) < 0.02
        optimizer.step()
        held.append(compressor.held)
    assert held == [held[0], 2 * held[0], 3 * held[0]]


def test_repeated_backward_is_bitwise_equal():
    model, data = build(), batch()
    loss = Execution().training_loss(model, *data, saving=SemanticCompressor())
    parameters = list(model.parameters())
    first, second = (torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def memory_between_passes(model, data, compress):
    """Bytes of all tensors when the forward pass is over and the backward pass has not begun."""
    model = copy.deepcopy(model)
    tracker = MemTracker()
    tracker.track_external(model)
    saving = SemanticCompressor(0.26) if compress else None
    with tracker:
        loss = Execution(attention=True, loss=True).training_loss(model, *data, saving=saving)
        found = sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot("current").values())
    loss.backward()
    return found


def test_memory_is_lower():
    model, data = build(d_model=64, d_ff=128), batch(32)
    plain, compressed = (memory_between_passes(model, data, compress) for compress in (False, True))
    with Recorder(0.26) as compressor:
        model.features(data[0])
    saved = compressor.original - compressor.held
    assert saved > 0.5 * plain
    assert plain - compressed > 0.8 * saved


def test_activations_are_freed_when_they_are_compressed():
    """What a backward pass needs is not kept beside its codes."""
    weight = torch.zeros(64, 64, requires_grad=True)
    x = torch.randn(64, 64)
    watch = torch.multiprocessing.reductions.StorageWeakRef(x.untyped_storage())
    with SemanticCompressor():
        out = (weight * x).sum()
        del x
        assert watch.expired()
    out.backward()


# ---- The context


def test_nothing_is_compressed_outside():
    compressor, x = SemanticCompressor(), torch.randn(80, 80)
    weight = torch.zeros(80, 80, requires_grad=True)
    before = (weight * x).sum()
    with compressor:
        pass
    after = (weight * x).sum()
    for out in (before, after):
        assert torch.equal(torch.autograd.grad(out, weight)[0], x)
    assert compressor.original == 0


def test_an_error_inside_leaves_nothing_behind():
    compressor, x = SemanticCompressor(), torch.randn(80, 80)
    weight = torch.zeros(80, 80, requires_grad=True)
    with pytest.raises(ValueError, match="inside"), compressor:  # noqa: PT012
        (weight * x).sum()
        raise ValueError("inside")
    held = compressor.held
    (found,) = torch.autograd.grad((weight * x).sum(), weight)
    assert torch.equal(found, x)
    assert compressor.held == held > 0
    with compressor:
        out = (weight * x).sum()
    assert compressor.held == 2 * held
    assert 0 < relative_error(torch.autograd.grad(out, weight)[0], x) < 0.01
