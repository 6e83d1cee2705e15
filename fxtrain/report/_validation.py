"""Validates JSON values and converts them to the types that the report draws.

Each validator returns the converted value, or raises a ``ValueError`` that describes the value.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import TypeGuard

import numpy as np

from fxtrain.core import truncate

MAX_STEP = 2**50
"""The largest step, which leaves room for exact ticks between steps in float64."""

_FILE_OF_TABLE = re.compile(r"\d{8,}(?:\.r\d+)?-\d+\.(?:png|gif|mp4|wav)", re.ASCII)  # in the folder of the table
_MAX_NUMBER = 40  # characters of a number written as a string
_MAX_NAME = 1000  # characters
MAX_WORDS = 1000  # characters of a value in a table
_MAX_DEPTH = 20  # levels of a nested configuration
_MAX_COUNT = 2.0**53  # larger integers are not exact in float64
_MAX_EDGE = 1e300  # differences of larger edges overflow


def parsed(content: bytes) -> object:
    """Parses JSON. Characters truncated by a crash become replacement characters.

    Raises:
        ValueError: If the content is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(content.decode("utf-8", "replace"))
    except RecursionError:
        raise ValueError("expected JSON, got values nested too deeply") from None
    except ValueError as error:
        # error.msg omits the position. A plain ValueError comes from the interpreter's limit on digits.
        what = error.msg if isinstance(error, json.JSONDecodeError) else "a number with too many digits"
        raise ValueError(
            f"expected JSON, got {truncate(content[:40].decode(errors='replace'), 30)!r} ({what})"
        ) from None


def decoded(content: bytes) -> str:
    """Decodes UTF-8.

    Raises:
        ValueError: If the content is not text.
    """
    if b"\0" in content:
        raise ValueError("expected text, got zero bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in UTF-8, got an invalid byte at {error.start:,}") from None


def mapping(value: object) -> dict[str, object]:
    """Validates a JSON object."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {named(value)}")
    return value


def listed(value: object) -> list[object]:
    """Validates a JSON array."""
    if not isinstance(value, list):
        raise ValueError(f"expected a list, got {named(value)}")
    return value


def step(value: object) -> int:
    """Validates a step, an integer from 0 to ``MAX_STEP``."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_STEP:
        raise ValueError(f"expected a step, an integer from 0 to 2**50, got {named(value)}")
    return value


def number(value: object) -> float:
    """Converts a number, or a string such as ``"nan"``, because JSON has neither NaN nor infinity."""
    if isinstance(value, int | float) or (isinstance(value, str) and len(value) <= _MAX_NUMBER):
        try:
            return float(value)
        except OverflowError:
            assert isinstance(value, int)
            return math.inf if value > 0 else -math.inf  # as 1e400 is parsed
        except ValueError:
            pass
    raise ValueError(f"expected a number, got {named(value)}")


def text(value: object) -> str:
    """Validates a string."""
    if not isinstance(value, str):
        raise ValueError(f"expected a string, got {named(value)}")
    return value


def name(value: str) -> str:
    """Validates a name of at most a thousand characters."""
    if len(value) > _MAX_NAME:
        raise ValueError(f"expected a name of at most {_MAX_NAME:,} characters, got {len(value):,}")
    return value


def seconds(value: object) -> float:
    """Converts a duration, a finite number of at least 0."""
    found = number(value)
    if not 0 <= found < math.inf:
        raise ValueError(f"expected seconds, 0 or more, got {found}")
    return found


def counts(value: object) -> np.ndarray:
    """Converts counts to a float64 [n] array with finite values of at least 0."""
    return _between(value, 0.0, _MAX_COUNT, "counts")


def edges(value: object, buckets: int) -> np.ndarray:
    """Converts the edges of ``buckets`` buckets to an increasing float64 [buckets + 1] array."""
    found = _between(value, -_MAX_EDGE, _MAX_EDGE, "edges")
    if len(found) != buckets + 1 or not (np.diff(found) > 0).all():
        raise ValueError(f"expected {buckets + 1} increasing edges of {buckets} buckets, got {named(value)}")
    return found


def square(value: object, side: int) -> np.ndarray:
    """Converts rows of counts to a float64 [side, side] array."""
    rows = [counts(row) for row in listed(value)]
    if len(rows) != side or any(len(row) != side for row in rows):
        raise ValueError(f"expected {side} rows of {side} counts, got {named(value)}")
    return np.stack(rows)


def _between(value: object, low: float, high: float, what: str) -> np.ndarray:
    found = np.array([number(each) for each in listed(value)], dtype=np.float64)
    if not len(found) or not ((found >= low) & (found <= high)).all():
        raise ValueError(f"expected finite {what} from {low:g} to {high:g}, got {named(value)}")
    return found


def is_file_of_table(cell: object) -> TypeGuard[str]:
    """Returns whether a cell is the name of an image, video or sound in the folder of its table."""
    return isinstance(cell, str) and len(cell) < 256 and _FILE_OF_TABLE.fullmatch(cell) is not None


def words(value: object) -> str:
    """Returns a scalar or a list of scalars as text of bounded length.

    Example:
        >>> words(0.1), words(["train.py", 3]), words([[1]]), words(None)
        ('0.1', 'train.py 3', '(a list)', '')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return truncate(
            " ".join("(a list)" if isinstance(each, list) else words(each) for each in value[:100]), MAX_WORDS
        )
    return "(an object)" if isinstance(value, Mapping) else truncate(str(value), MAX_WORDS)


def named(value: object) -> str:
    """Describes a value for an error message, by type or by its shortened text."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return truncate(repr(value[:40]) if isinstance(value, str) else words(value), 40)


def flattened(values: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yields the leaves of nested objects as text, with their keys joined by ``/``. Skips None.

    Example:
        >>> list(flattened({"optim": {"lr": 0.1}, "steps": 5}))
        [('optim/lr', '0.1'), ('steps', '5')]
    """
    waiting: list[tuple[str, object, int]] = [("", values, 0)]  # a stack, because recursion depth is limited
    while waiting:
        path, value, depth = waiting.pop()
        if isinstance(value, Mapping) and depth < _MAX_DEPTH:
            inside = [(f"{path}/{key}" if path else key, each, depth + 1) for key, each in value.items()]
            waiting += reversed(inside)
        elif value is not None:
            yield truncate(path, 200), words(value)
