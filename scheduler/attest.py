"""Whether an engine that woke is the one that went to sleep: 200 OK from a wake is not believed.

After its load, and after every wake, an idle engine answers one fixed question. Weights that came back wrong answer
with another token or with another probability (vLLM after a wake "returned healthy HTTP endpoints with corrupted
semantic output": zoedolan/Vybn#2944). Idle, because a batch of others changes the last digits.
"""

from __future__ import annotations

from scheduler.events import ProbeAnswered

NEAR = 0.05  # in the logarithm of the probability: above the noise of other kernels, far below that of other weights


def difference(before: ProbeAnswered, after: ProbeAnswered) -> str | None:
    """What is wrong with the second answer, or None."""
    if after.error:
        return after.error
    if after.token != before.token:
        return f"it said {before.token!r} before it slept and says {after.token!r} now"
    drift = abs(after.logprob - before.logprob)
    if not drift <= NEAR:  # also when it is not a number
        return f"the log-probability of {after.token!r} is off by {drift:.2g}"
    return None
