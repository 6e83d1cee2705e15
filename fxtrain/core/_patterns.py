"""Selection of names by shell patterns, and natural sort order."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from fxtrain._torch_internals.dynamo import constant_in_dynamo

_SHOWN = 8


@constant_in_dynamo  # which cannot trace fnmatch
def matching(names: Sequence[str], patterns: str | Sequence[str] | None, what: str) -> list[int]:
    """Returns the indices of the names that match at least one pattern.

    Args:
        names: The names to select from.
        patterns: One shell pattern such as ``"blocks.*.attn"``, several, or None.
        what: A noun for the named things, for errors.

    Raises:
        ValueError: If a pattern matches nothing.

    Example:
        >>> matching(["body.w", "head.w", "head.b"], "head.*", "parameter")
        [1, 2]
        >>> matching(["body.w", "head.w"], "tail.*", "parameter")
        Traceback (most recent call last):
        ...
        ValueError: expected 'tail.*' to match a parameter, got no match among body.w, head.w. Use a shell pattern ...
    """
    chosen = [patterns] if isinstance(patterns, str) else list(patterns or ())
    for pattern in chosen:
        if not fnmatch.filter(names, pattern):
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            raise ValueError(
                f"expected {pattern!r} to match a {what}, got no match among {shown}. Use a shell pattern such as "
                "'blocks.*.attn'."
            )
    return [i for i, name in enumerate(names) if any(fnmatch.fnmatchcase(name, pattern) for pattern in chosen)]


def by_number(name: str) -> list[tuple[int, str]]:
    """Returns a sort key that puts layer 2 before layer 10.

    Example:
        >>> sorted(["blocks.10", "blocks.2"], key=by_number)
        ['blocks.2', 'blocks.10']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
