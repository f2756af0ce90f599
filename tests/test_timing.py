import torch

from muse import timing
from muse.timing import quantile, times_in_turns


def test_functions_take_turns_and_a_time_is_the_mean_of_the_calls_of_a_round(monkeypatch):
    now, order = [0.0], []
    durations = {"a": [100.0, 3.0, 1.0], "b": [9.0, 9.0, 2.0, 4.0, 80.0, 20.0]}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def function(name):
        def call():
            now[0] += durations[name][order.count(name)]
            order.append(name)

        return call

    found = times_in_turns([function("a"), function("b")], 1, 2, torch.device("cpu"), [1, 2])
    assert order == ["a", "b", "b"] * 3
    assert found == [[3.0, 1.0], [3.0, 50.0]]


def test_quantile():
    assert [quantile([3.0, 1.0, 2.0], fraction) for fraction in (0.0, 0.5, 1.0)] == [1.0, 2.0, 3.0]
