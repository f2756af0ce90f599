import torch

from muse.measure.timing import quantile, times_in_turns


def test_functions_take_turns_and_a_time_is_the_mean_of_the_calls_of_a_round(timed_calls):
    calls, order = timed_calls({"a": [100.0, 3.0, 1.0], "b": [9.0, 9.0, 2.0, 4.0, 80.0, 20.0]})
    found = times_in_turns(calls, 1, 2, torch.device("cpu"), [1, 2])
    assert order == ["a", "b", "b"] * 3
    assert found == [[3.0, 1.0], [3.0, 50.0]]


def test_quantile():
    assert [quantile([3.0, 1.0, 2.0], fraction) for fraction in (0.0, 0.5, 1.0)] == [1.0, 2.0, 3.0]
