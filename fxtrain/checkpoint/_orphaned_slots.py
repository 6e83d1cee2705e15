"""Rebuilds slots of callbacks that a restored state does not have, so that later checkpoints keep them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fxtrain.checkpoint._leaf_table import PathEntry, code_of
from fxtrain.core import Tree
from fxtrain.core._orphaned_slot import OrphanedSlot


def rebuild(rows: Sequence[tuple[list[PathEntry], Tensor]]) -> Tree:
    """Returns a tree of dictionaries and lists, or an ``OrphanedSlot`` where these cannot represent the paths.

    A checkpoint stores neither classes nor list elements without leaves.

    Args:
        rows: For each leaf its entries below the slot, and its value.
    """
    try:
        return _nested(rows)
    except (_NotPlainError, RecursionError):
        return OrphanedSlot({code_of(entries): leaf for entries, leaf in rows})


class _NotPlainError(Exception):
    """The rows need more than dictionaries and complete lists."""


def _nested(rows: Sequence[tuple[list[PathEntry], Tensor]]) -> Tree:
    if len(rows) == 1 and not rows[0][0]:
        return rows[0][1]
    kinds = {entries[0][0] if entries else "leaf" for entries, _ in rows}
    if kinds not in ({"key"}, {"index"}):
        raise _NotPlainError
    groups: dict[str, list[tuple[list[PathEntry], Tensor]]] = {}  # keyed by code, because True == 1
    for entries, leaf in rows:
        groups.setdefault(code_of(entries[:1]), []).append((entries, leaf))
    built = {group[0][0][0][1]: _nested([(entries[1:], leaf) for entries, leaf in group]) for group in groups.values()}
    if len(built) != len(groups) or (kinds == {"index"} and sorted(built) != list(range(len(built)))):
        raise _NotPlainError
    return [built[index] for index in range(len(built))] if kinds == {"index"} else built
