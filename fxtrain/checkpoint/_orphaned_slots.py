"""Unclaimed: the memory of callbacks that are not there, kept until they come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optree
from torch import Tensor

from fxtrain.checkpoint._table import code_of
from fxtrain.core import NAMESPACE, ops


class Unclaimed(dict[str, Tensor]):
    """The memory of a callback that is not there, by the code of each leaf's path below its slot.

    It is kept and saved again under the same paths, so the callback finds it when it comes back.
    """


class _CodeEntry(optree.PyTreeEntry):
    def codify(self, /, node: str = "") -> str:
        return f"{node}{self.entry}"


ops.register_pytree_node(
    Unclaimed,
    lambda node: (list(node.values()), tuple(node), tuple(node)),
    lambda paths, leaves: Unclaimed(zip(paths, leaves, strict=True)),
    path_entry_type=_CodeEntry,
    namespace=NAMESPACE,
)


def rebuild(rows: Sequence[tuple[list[list[Any]], Tensor]]) -> Any:
    """A tree from leaves and the rest of their paths: dictionaries and lists, or ``Unclaimed`` where there were
    classes, which are not stored, and where lists have elements without leaves."""
    try:
        return _nested(rows)
    except (_NotPlainError, RecursionError):
        return Unclaimed({code_of(entries): leaf for entries, leaf in rows})


class _NotPlainError(Exception):
    """The rows are not those of dictionaries and full lists."""


def _nested(rows: Sequence[tuple[list[list[Any]], Tensor]]) -> Any:
    if len(rows) == 1 and not rows[0][0]:
        return rows[0][1]
    kinds = {entries[0][0] if entries else "leaf" for entries, _ in rows}
    if kinds not in ({"key"}, {"index"}):
        raise _NotPlainError
    groups: dict[str, list[tuple[list[list[Any]], Tensor]]] = {}  # by code, because True and 1 are equal
    for entries, leaf in rows:
        groups.setdefault(code_of(entries[:1]), []).append((entries, leaf))
    built = {group[0][0][0][1]: _nested([(entries[1:], leaf) for entries, leaf in group]) for group in groups.values()}
    if len(built) != len(groups) or (kinds == {"index"} and sorted(built) != list(range(len(built)))):
        raise _NotPlainError
    return [built[index] for index in range(len(built))] if kinds == {"index"} else built
