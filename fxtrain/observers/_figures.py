"""Readable formats for metrics, throughput, durations and sizes."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """Formats a metric in a few digits, with a width that changes little.

    Example:
        >>> [number(value) for value in (2.31456, 0.04, 123.456, 81234.0, 0.00012, float("nan"))]
        ['2.3146', '0.0400', '123.46', '81234', '1.20e-04', 'nan']
    """
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if size and not 1e-3 <= size < 1e6:
        return f"{value:.2e}"
    return f"{value:.{4 if size < 10 else 3 if size < 100 else 2 if size < 1000 else 0}f}"


def scaled(value: float) -> str:
    """Formats a value with three significant digits and an SI prefix.

    Example:
        >>> [scaled(value) for value in (0.52, 8.0, 45210.0, 1.25e6)]
        ['0.52', '8.00', '45.2k', '1.25M']
    """
    thousands = 0
    while abs(value) >= 999.5 and thousands < 4:
        value, thousands = value / 1000, thousands + 1
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}{('', 'k', 'M', 'G', 'T')[thousands]}"


def duration(seconds: float) -> str:
    """Formats a duration as hours, minutes and seconds, with a fraction below ten seconds.

    Example:
        >>> [duration(seconds) for seconds in (3.21, 75, 3661, 90061)]
        ['3.2 s', '1:15', '1:01:01', '25:01:01']
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(count: float) -> str:
    """Formats a number of bytes in binary units.

    Example:
        >>> [size(count) for count in (12, 49_400_000, 3 * 2**40)]
        ['12 B', '47.1 MiB', '3.0 TiB']
    """
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"
