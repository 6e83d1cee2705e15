"""Patterns: names that are chosen as a shell chooses files, and put in order as people count."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

_SHOWN = 8


def matching(names: Sequence[str], patterns: str | Sequence[str] | None, what: str) -> list[int]:
    """The places of the names that match one of the patterns.

    Args:
        names: What there is.
        patterns: Those of a shell, ``"blocks.*.attn"``; one, several or none.
        what: What the names are of, in words.

    Raises:
        ValueError: If one matches nothing.

    Example:
        >>> matching(["body.w", "head.w", "head.b"], "head.*", "parameter")
        [1, 2]
        >>> matching(["body.w", "head.w"], "tail.*", "parameter")
        Traceback (most recent call last):
        ...
        ValueError: 'tail.*' matches no parameter; there are body.w, head.w: patterns are those of a shell, as ...
    """
    chosen = [patterns] if isinstance(patterns, str) else list(patterns or ())
    for pattern in chosen:
        if not fnmatch.filter(names, pattern):
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            raise ValueError(
                f"{pattern!r} matches no {what}; there are {shown}: patterns are those of a shell, as 'blocks.*.attn'."
            )
    return [i for i, name in enumerate(names) if any(fnmatch.fnmatchcase(name, pattern) for pattern in chosen)]


def by_number(name: str) -> list[tuple[int, str]]:
    """A key for sorting, by which layer 2 comes before layer 10.

    Example:
        >>> sorted(["blocks.10", "blocks.2"], key=by_number)
        ['blocks.2', 'blocks.10']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
