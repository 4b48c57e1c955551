"""How long answers get where nobody sets a limit: a quantile of a model's past answers, the recent ones weighing more.

It decides how many requests are let into an engine at once, never whether one is refused. The 80th percentile: many
requests together need about their mean, so a higher one would leave the KV cache idle; a lower one makes the engine
throw out requests in the middle and compute them again, which costs more than an idle block.
"""

from __future__ import annotations

from math import log2

QUANTILE = 0.8
FIRST_TOKENS = 512  # until something is known; it counts as much as
FIRST_COUNT = 8.0  # so many answers
STEPS = 4  # buckets in a doubling: a quantile is exact to 19 %
BUCKETS = 24 * STEPS + 1  # up to 16 million tokens
GROWTH = 1.01  # each answer weighs so much more than the one before: half of the weight is in the last 70
MOST = 1e12  # then all weights are made small again
LOOK_EVERY = 8


class ExpectedOutput:
    """`tokens` is the expected length of an answer. `add` is O(1) amortised."""

    __slots__ = ("_added", "_counts", "_sum", "_weight", "tokens")

    def __init__(self) -> None:
        self._counts = [0.0] * BUCKETS
        self._counts[_bucket(FIRST_TOKENS)] = self._sum = FIRST_COUNT
        self._weight = 1.0
        self._added = 0
        self.tokens = FIRST_TOKENS

    def add(self, tokens: int) -> None:
        """An answer of so many tokens has ended, and nobody had set it a limit."""
        self._weight *= GROWTH
        self._counts[_bucket(tokens)] += self._weight
        self._sum += self._weight
        self._added += 1
        if self._added % LOOK_EVERY == 0:
            self._look()

    def _look(self) -> None:
        if self._weight > MOST:
            self._counts = [count / self._weight for count in self._counts]
            self._sum, self._weight = sum(self._counts), 1.0
        below, bucket = self._counts[0], 0
        while below < QUANTILE * self._sum and bucket < BUCKETS - 1:
            bucket += 1
            below += self._counts[bucket]
        self.tokens = round(2.0 ** (bucket / STEPS))


def _bucket(tokens: int) -> int:
    """The first whose upper edge, 2^(bucket / STEPS), reaches so many tokens."""
    return min(BUCKETS - 1, -int(-STEPS * log2(tokens) // 1)) if tokens > 1 else 0
