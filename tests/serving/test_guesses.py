from __future__ import annotations

from muse.serving.guesses import Guesses


def test_what_followed_the_last_tokens_before_may_follow_again():
    seen = [1, 2, 3, 4, 1, 2]
    guesses = Guesses(seen)
    assert guesses.next(3) == [3, 4, 1]
    # Two tokens before one, and of them the last time.
    seen += [9, 5, 2, 8, 1, 2]
    assert guesses.next(3) == [9, 5, 2]
    seen += [7, 5]
    assert guesses.next(1) == [2]


def test_a_text_that_repeats_itself_goes_on_so():
    assert Guesses([4, 4]).next(3) == [4, 4, 4]
    assert Guesses([9, 4, 5, 4, 5]).next(5) == [4, 5, 4, 5, 4]


def test_what_was_not_there_before_is_not_guessed():
    assert Guesses([1]).next(3) == []
    assert Guesses([1, 2, 3]).next(3) == []
    assert Guesses([1, 1]).next(0) == []
