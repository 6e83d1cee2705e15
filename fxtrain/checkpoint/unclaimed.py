"""Unclaimed: the memory of callbacks that are not there, kept until they come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optree
from torch import Tensor

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
    classes, which are not stored."""
    if len(rows) == 1 and not rows[0][0]:
        return rows[0][1]
    if any(kind == "attribute" for entries, _ in rows for kind, _ in entries):
        return Unclaimed({_code(entries): leaf for entries, leaf in rows})
    groups: dict[Any, list[tuple[list[list[Any]], Tensor]]] = {}
    for entries, leaf in rows:
        groups.setdefault(entries[0][1], []).append((entries[1:], leaf))
    built = {key: rebuild(group) for key, group in groups.items()}
    return [built[i] for i in sorted(built)] if rows[0][0][0][0] == "index" else built


def _code(entries: list[list[Any]]) -> str:
    def one(kind: str, key: Any) -> str:
        if kind == "attribute":
            return key if isinstance(key, str) and key[:1] in ".[" else f".{key}"
        return f"[{key!r}]"

    return "".join(one(kind, key) for kind, key in entries)
