"""What the cores refuse. Whatever raises one of these has changed nothing.

Values that are wrong in themselves (negative, NaN, not an integer) raise the built-in `ValueError`, `TypeError` or
`OverflowError`; these here are for values that are wrong *now*, in the state that the core is in.
"""

from __future__ import annotations


class CoreError(Exception):
    """Any refusal of a core."""


class NeverFits(CoreError, ValueError):
    """The weight is above the whole capacity: it would wait for ever."""


class NotHeld(CoreError, LookupError):
    """Released what is not held: twice, or never granted."""


class NotWaiting(CoreError, LookupError):
    """Cancelled what does not wait: twice, granted already, expired, or never seen."""


class QueueFull(CoreError):
    """As many wait as may wait."""


class ClockWentBack(CoreError, ValueError):
    """`now` is earlier than the `now` of an earlier call. Pass a monotonic clock."""
