"""Selection of names by shell patterns, and natural sort order."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from fxtrain._torch_internals.dynamo import constant_in_dynamo
from fxtrain.core._checks import describe

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
        if not isinstance(pattern, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"expected patterns that match a {what} as strings, got {describe(patterns)}. Use a shell pattern such "
                "as 'blocks.*.attn'."
            )
        if not fnmatch.filter(names, pattern):
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            got, remedy = (
                (f"no match among {shown}", "Use a shell pattern such as 'blocks.*.attn'")
                if any(names)
                else ("a model without any", "Leave the pattern out")
            )
            raise ValueError(f"expected {pattern!r} to match a {what}, got {got}. {remedy}.")
    return [i for i, name in enumerate(names) if any(fnmatch.fnmatchcase(name, pattern) for pattern in chosen)]


@constant_in_dynamo
def matching_blocks(
    names: Sequence[str], patterns: str | Sequence[str] | None, what: str
) -> list[tuple[str, list[int]]]:
    """Returns the chosen names, each with the indices of the names that it stands for.

    A pattern selects the names that match it, each by itself. A name without wildcards that is a block, a prefix of
    names at a dot, selects the block as a whole, and so does a pattern that matches blocks only.

    Args:
        names: The names to select from.
        patterns: One shell pattern, several, or None.
        what: A noun for the named things, for errors.

    Raises:
        ValueError: If a pattern matches neither.

    Example:
        >>> names = ["layers.0.attn", "layers.0.mlp", "layers.1.mlp"]
        >>> matching_blocks(names, "layers.0.*", "layer")
        [('layers.0.attn', [0]), ('layers.0.mlp', [1])]
        >>> matching_blocks(names, ["layers.0", "layers.?"], "layer")
        [('layers.0', [0, 1]), ('layers.1', [2])]
    """
    blocks: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            blocks.setdefault(".".join(parts[:end]), []).append(index)
    chosen: dict[str, list[int]] = {}
    for pattern in [patterns] if isinstance(patterns, str) else list(patterns or ()):
        if pattern in blocks:
            chosen[pattern] = blocks[pattern]
        elif fnmatch.filter(names, pattern):
            chosen |= {names[i]: [i] for i in matching(names, pattern, what) if names[i] not in chosen}
        else:
            found = fnmatch.filter(blocks, pattern) or matching(names, pattern, what)  # which raises
            chosen |= {str(name): blocks[str(name)] for name in found}
    return list(chosen.items())


def by_number(name: str) -> list[tuple[int, str]]:
    """Returns a sort key that puts layer 2 before layer 10.

    Example:
        >>> sorted(["blocks.10", "blocks.2"], key=by_number)
        ['blocks.2', 'blocks.10']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def is_of_member(name: str) -> bool:
    """Whether a published name is that of one member of a batch of runs.

    Example:
        >>> is_of_member("train/loss/member_3"), is_of_member("train/loss/max")
        (True, False)
    """
    _, found, index = name.rpartition("/member_")
    return bool(found) and index.isdecimal()
