import torch

from muse.measure.passes import Passes, time_passes


def test_both_passes_of_each_call_are_timed_in_every_round():
    x = torch.randn(3, requires_grad=True)
    calls = {"sine": Passes(torch.sin, (x,)), "two": Passes(lambda x: (x.exp(), 2 * x), (x,))}
    times = time_passes(calls, warmup=1, repeats=2, device=torch.device("cpu"))
    assert list(times) == list(calls)
    assert all(set(parts) == {"forward", "training"} for parts in times.values())
    assert all(len(own) == 2 and min(own) > 0 for parts in times.values() for own in parts.values())


def test_a_backward_pass_reaches_every_input_and_leaves_no_gradient():
    reached = []
    x, y = (torch.randn(3, requires_grad=True) for _ in range(2))
    for leaf in (x, y):
        leaf.register_hook(lambda gradient: reached.append(gradient.shape))
    Passes(torch.mul, (x, y)).training()
    assert reached == [x.shape, y.shape]
    assert x.grad is y.grad is None
