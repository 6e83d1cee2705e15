"""Wall-clock times for logs. Events carry the time of the loop instead, which a recorded run replays."""

from __future__ import annotations

import datetime
from collections.abc import Callable

from fxtrain.core._checks import describe

WallClock = Callable[[], datetime.datetime]


def utc_now() -> datetime.datetime:
    """Returns the current date and time in UTC."""
    return datetime.datetime.now(datetime.UTC)


def timestamp(clock: WallClock) -> str:
    """Returns the time of a clock in ISO 8601, to the millisecond and with its time zone.

    Args:
        clock: Returns the current date and time, with a time zone.

    Raises:
        ValueError: The clock returns something else.

    Example:
        >>> timestamp(lambda: datetime.datetime(2024, 1, 1, 12, tzinfo=datetime.UTC))
        '2024-01-01T12:00:00.000+00:00'
    """
    now = clock()
    if getattr(now, "tzinfo", None) is None:
        raise ValueError(
            f"expected clock to return a datetime with a time zone, got {describe(now)}. Pass "
            "lambda: datetime.datetime.now(datetime.UTC)."
        )
    return now.isoformat(timespec="milliseconds")
