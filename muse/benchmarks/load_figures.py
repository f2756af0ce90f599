"""What recorded times of a load say: figures of pure functions, None where there is nothing to tell."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from muse.benchmarks.load import Answered
from muse.measure.timing import quantile

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
OK, TOO_MANY = 200, 429
# A rate is beyond the knee where the 95th percentile is so many times that of the lowest rate.
KNEE = 3.0

Figures = dict[str, float | None]


def percentiles(seconds: Sequence[float], name: str = "") -> Figures:
    """Milliseconds that 50, 95 and 99 % of the times are below, as ``p50_ms`` after a name."""
    return {
        f"{name}{key}_ms": 1e3 * quantile(list(seconds), fraction) if seconds else None
        for key, fraction in QUANTILES.items()
    }


def good(answered: Sequence[Answered]) -> list[Answered]:
    """Those that are answers."""
    return [one for one in answered if one.status == OK]


def span(answered: Sequence[Answered]) -> float:
    """Seconds from the first question to the end of the last answer."""
    return max(one.ended for one in answered) - min(one.due for one in answered)


def load_figures(spells: Sequence[Sequence[Answered]], streamed: bool = False) -> Figures:
    """Counts, throughput and percentiles of a load.

    Args:
        spells: of the load, between which other things happened.
        streamed: whether the tokens' own times are known.

    Returns:
        ``questions``, ``errors`` (no answer), ``wrong`` (another answer than expected),
        ``tokens_per_second`` and ``answers_per_second`` from the first question of a spell to its last
        answer, milliseconds of whole requests (``p50_ms`` and so on), of a stream also to the first token
        (``first_...``) and between tokens (``between_...``), and how late questions were sent
        (``late_p95_ms``).
    """
    every = [one for spell in spells for one in spell]
    answers = good(every)
    seconds = sum(span(spell) for spell in spells if spell)
    figures: Figures = {
        "questions": len(every),
        "errors": len(every) - len(answers),
        "wrong": sum(one.right is False for one in answers),
        "tokens_per_second": sum(len(one.tokens) for one in answers) / seconds if seconds else None,
        "answers_per_second": len(answers) / seconds if seconds else None,
        **percentiles([one.seconds for one in answers]),
        "late_p95_ms": percentiles([one.sent - one.due for one in every])["p95_ms"],
    }
    if streamed:
        figures |= percentiles([one.tokens[0] - one.due for one in answers if one.tokens], "first_")
        gaps = [after - before for one in answers for before, after in pairwise(one.tokens)]
        figures |= percentiles(gaps, "between_")
    return figures


def tokens_per_second(answered: Sequence[Answered], start: float, end: float) -> float | None:
    """Tokens of answers that were made from ``start`` on and before ``end``."""
    made = sum(start <= time < end for one in good(answered) for time in one.tokens)
    return made / (end - start) if end > start else None


def overload_figures(answered: Sequence[Answered]) -> Figures:
    """Of a load with refusals: throughput from the first of them to the last question, and times.

    Returns:
        ``tokens_per_second``, None where nothing was refused; ``refused``; ``refused_p95_ms``, from when a
        question was due to its refusal; ``errors``, which are neither answers nor refusals; ``wrong``.
    """
    refusals = [one for one in answered if one.status == TOO_MANY]
    first, last = min((one.ended for one in refusals), default=None), max(one.due for one in answered)
    return {
        "questions": len(answered),
        "refused": len(refusals),
        "errors": len(answered) - len(refusals) - len(good(answered)),
        "wrong": sum(one.right is False for one in good(answered)),
        "tokens_per_second": None if first is None else tokens_per_second(answered, first, last),
        **percentiles([one.seconds for one in refusals], "refused_"),
        "late_p95_ms": percentiles([one.sent - one.due for one in answered])["p95_ms"],
    }


def drift(answered: Sequence[Answered]) -> float | None:
    """By which share the 95th percentile of the last third of a load is above that of its first third."""
    begin, end = min(one.due for one in answered), max(one.due for one in answered)
    third = (end - begin) / 3
    first = percentiles([one.seconds for one in good(answered) if one.due < begin + third])["p95_ms"]
    last = percentiles([one.seconds for one in good(answered) if one.due >= end - third])["p95_ms"]
    return last / first - 1 if first and last is not None else None


def growth(values: Sequence[float | None]) -> float | None:
    """By which share the median of the last third of values is above that of the first third."""
    known = [value for value in values if value is not None]
    third = len(known) // 3
    return median(known[-third:]) / median(known[:third]) - 1 if third else None


def knee(points: Sequence[tuple[float, float | None]]) -> float | None:
    """The highest rate up to which 95th percentiles are within ``KNEE`` times that of the lowest rate.

    Args:
        points: rates and 95th percentiles.
    """
    found = None
    lowest = min(points, key=lambda point: point[0], default=(0.0, None))[1]
    for rate, percentile in sorted(points, key=lambda point: point[0]):
        if lowest is None or percentile is None or percentile > KNEE * lowest:
            break
        found = rate
    return found
