from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from muse.layers import ComplexAttention, MeraRouter, MeraState, mera
from muse.layers.mera import BLOCK, READ, disentangled, levels_read, newest, read_shape
from muse.planar import to_complex

D, HEADS = 6, 2


def router(dtype=torch.float64, levels=4, d_model=D, heads=HEADS):
    """A router none of whose parameters is at its start."""
    built = MeraRouter(d_model, heads, levels)
    with torch.no_grad():
        for parameter in (built.disentanglers, built.isometries, built.router.bias):
            parameter.add_(0.5 * torch.randn_like(parameter))
    return built.to(dtype)


def states(length, batch=2, d_model=D, dtype=torch.float64):
    return torch.randn(batch, length, 2, d_model).to(dtype)


def last_node(position, level):
    return newest(torch.tensor(position), torch.tensor(level)).item()


def by_definition(layer, z):
    """Node after node and token after token, in complex numbers."""
    leaves, gate = to_complex(layer.projection(z)).chunk(2, -1)
    theta, g = layer.disentanglers.chunk(2, -1)
    phi, a, b = layer.isometries.chunk(3, -1)

    @functools.cache
    def node(level, k):
        if level == 0:
            return leaves[:, k]
        below = level - 1
        left, right = (
            torch.exp(1j * angle) * size
            for angle, size in ((a[below], phi[below].cos()), (b[below], phi[below].sin()))
        )
        return left * after(below, 2 * k) + right * after(below, 2 * k + 1)

    def after(level, k):
        """A node as disentanglers leave it."""
        if k == 0:
            return node(level, 0)
        cos, sin, turn = theta[level].cos(), theta[level].sin(), torch.exp(1j * g[level])
        if k % 2:
            return cos * node(level, k) + turn * sin * node(level, k + 1)
        return cos * node(level, k) - turn.conj() * sin * node(level, k - 1)

    out = []
    for t in range(z.shape[1]):
        logits = layer.router(z[:, t].flatten(-2)).unflatten(-1, (HEADS, layer.levels + 1, READ))
        there = {
            (level, j): node(level, last_node(t, level) - j).unflatten(-1, (HEADS, -1))
            for level in range(layer.levels + 1)
            for j in range(READ)
            if last_node(t, level) >= j
        }
        weights = torch.stack([logits[:, :, level, j] for level, j in there], -1).softmax(-1)
        read = torch.stack(list(there.values()), -1) * weights[:, :, None]
        gelu = torch.complex(F.gelu(gate[:, t].real), F.gelu(gate[:, t].imag))
        out.append(read.sum(-1).flatten(-2) * gelu)
    return torch.stack(out, 1) @ torch.complex(*layer.output.weight).mT


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 30, 31, 45])
def test_output_is_that_of_the_formula(length):
    layer, z = router(), states(length)
    torch.testing.assert_close(to_complex(layer(z)), by_definition(layer, z))


def test_every_parameter_is_trained_and_there_are_about_as_many_as_in_attention():
    layer = router(levels=3)
    layer(states(40)).square().sum().backward()
    assert all((p.grad != 0).any(-1).all() for p in layer.parameters())
    router_, attention = MeraRouter(96, 4, 11), ComplexAttention(96, 4)
    counts = [sum(p.numel() for p in part.parameters()) for part in (router_, attention)]
    assert 1 < counts[0] / counts[1] < 1.1


def test_a_disentangler_is_unitary_and_an_isometry_keeps_the_norm():
    layer = router(torch.float32)
    turns, halves = layer.turns(), layer.halves()
    x, y = torch.randn(2, 5, HEADS, 9, 2, D // HEADS)
    for turn, half in zip(turns, halves, strict=True):
        left, right = disentangled(x, y, turn)
        norm = sum(part.double().square().sum(-2) for part in (left, right))
        torch.testing.assert_close(norm, sum(p.double().square().sum(-2) for p in (x, y)), rtol=1e-6, atol=0)
        lengths = half.double().square().sum((0, -2))
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-6, atol=0)


def test_angles_at_the_start_hardly_disentangle_and_weigh_both_nodes_of_a_pair_alike():
    layer = MeraRouter(96, 4, 3)
    assert layer.disentanglers[:, :96].abs().max() < 0.6
    sizes = layer.halves().square().sum(-2)
    torch.testing.assert_close(sizes, torch.full_like(sizes, 0.5))


def cone(layer, level, k, length):
    """The leaves that a node depends on."""
    leaves = torch.randn(1, HEADS, length, 2, D // HEADS, dtype=torch.float64, requires_grad=True)
    nodes, first = layer.tree(leaves)[level]
    (grad,) = torch.autograd.grad(nodes[:, :, k - first].sum(), leaves)
    return grad.abs().sum((0, 1, 3, 4)).nonzero().flatten().tolist()


def test_a_node_is_read_as_soon_as_its_cone_has_ended_and_no_sooner():
    layer = router()
    for level in range(5):
        for k in range(3):
            last = cone(layer, level, k, 100)[-1]
            assert last_node(last, level) == k
            assert last_node(last - 1, level) == k - 1
            # Without the delay, where its own tokens end, it would leak: its neighbour's are in it.
            assert last > 2**level * (k + 1) - 1 or level == 0


def test_what_a_token_reads_holds_all_of_its_past():
    for t in range(300):
        own = {
            token
            for level in range(8)
            for k in range(max(0, last_node(t, level) - READ + 1), last_node(t, level) + 1)
            for token in range(2**level * k, 2**level * (k + 1))
        }
        assert own == set(range(t + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_sees_a_later_one(dtype):
    layer, z = router(dtype), states(70, dtype=dtype)
    with torch.no_grad():
        before = layer(z)
        for position in range(70):
            other = z.clone()
            other[:, position:] = torch.randn_like(z[:, position:])
            after = layer(other)
            assert torch.equal(after[:, :position], before[:, :position])
            assert not torch.equal(after[:, position], before[:, position])


@pytest.mark.parametrize("sizes", [[1] * 100, [7, 1, 1, 3, 60, 1, 1, 20, 6], [2, 90, 8], [33, *[1] * 67]])
@pytest.mark.parametrize("levels", [2, 8])
def test_part_by_part(sizes, levels):
    layer, z = router(levels=levels), states(100)
    cache = layer.new_cache(100)
    assert cache == MeraState()
    with torch.no_grad():
        outs = [layer(part, cache) for part in z.split(sizes, 1)]
        torch.testing.assert_close(torch.cat(outs, 1), layer(z), rtol=0, atol=1e-10)
    assert cache.length == 100


@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_the_state_grows_by_a_level_where_the_text_doubles(chunk):
    layer, z = router(levels=6), states(200)
    cache, node = layer.new_cache(200), z[:, :1].untyped_storage().nbytes() // 200
    with torch.no_grad():
        for seen, part in zip(range(chunk, 201, chunk), z.split(chunk, 1), strict=False):
            layer(part, cache)
            # Level l has its first node at token 2^(l + 1) - 2.
            assert len(cache.levels) == min(6, (seen + 1).bit_length() - 2) + 1
            for kept in cache.levels:
                # Two nodes each, and no view of more.
                assert kept.recent.untyped_storage().nbytes() == READ * node
                assert kept.pending.untyped_storage().nbytes() <= 2 * node


def test_what_blocks_read_is_counted(monkeypatch):
    layer = router(levels=5)
    for length in (2, 3, 14, 15, 16, 30, 31, 62, 63, 64, 127, 300):
        seen = []
        monkeypatch.setattr(mera, "matmul", lambda left, right: seen.append(left.shape) or left @ right)
        layer(states(length))
        blocks, nodes = read_shape(length, 5)
        assert tuple(seen[0][2:]) == (blocks, BLOCK, nodes)


def test_gradients_are_those_of_the_map():
    layer = router(levels=2)
    parameters = dict(layer.named_parameters())

    def mapped(z, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (z,))

    assert torch.autograd.gradcheck(mapped, (states(18, batch=1).requires_grad_(), *parameters.values()))


def test_what_is_read_by_level_is_told_by_router():
    model = torch.nn.Sequential(torch.nn.Identity(), MeraRouter(D, HEADS, 5))
    assert levels_read(model) == {}
    model(states(20, dtype=torch.float32))
    assert levels_read(model) == {}
    model.eval()
    with torch.no_grad():
        model[1].router.weight.zero_()
        model(states(20, dtype=torch.float32))
    told = levels_read(model)
    assert list(told) == [f"mera/1/level_{level}" for level in range(4)]
    # Alike for all that are there: up to 2 of each level.
    shares = torch.zeros(4)
    for t in range(20):
        there = torch.tensor([max(0, min(READ, last_node(t, level) + 1)) for level in range(4)])
        shares += there / there.sum() / 20
    torch.testing.assert_close(torch.tensor(list(told.values())), shares)


@pytest.mark.slow
def test_the_whole_graph_is_captured_and_means_the_same():
    layer, z = router(torch.float32), states(40, dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        out = function(z)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
