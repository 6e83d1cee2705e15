"""The units of a restore: a leaf, or one parameter's element of a vector over all parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fxtrain.checkpoint._leaf_table import Key, Leaf
from fxtrain.core import TrainState, matching
from fxtrain.tree import as_code, as_name

Keys = tuple[Key, ...]


class Part(NamedTuple):
    """A leaf, or an element of one.

    Args:
        path: Code that accesses the part from the root. An element's path ends with that of its parameter, in brackets.
        keys: The keys of the path.
        kind: The dtype and shape as text.
        leaf: The path of the leaf.
        leaf_kind: The leaf's dtype and shape as text.
        element: The index on the last axis of the leaf, or None for a whole leaf.
    """

    path: str
    keys: Keys
    kind: str
    leaf: str
    leaf_kind: str
    element: int | None = None

    @property
    def slot(self) -> Key | None:
        """The name of the slot that has the part, or None."""
        return self.keys[1] if len(self.keys) > 1 and self.keys[0] == "slots" else None


def parts_of(row: Leaf) -> list[Part]:
    """Returns the parts of one leaf, in the order of its elements."""
    path, keys = row["path"], tuple(key for _, key in row["entries"])
    kind = f"{row['dtype']}{row['shape']}"
    if "elements" not in row:
        return [Part(path, keys, kind, path, kind)]
    return [
        Part(path + as_code(tuple(element)), (*keys, *element), f"{row['dtype']}{row['shape'][:-1]}", path, kind, index)
        for index, element in enumerate(row["elements"])
    ]


class Names:
    """The parameters and buffers of a state and of a checkpoint, and the parts that belong to each.

    Optimizer state and averages in slots belong to the parameter whose path is part of theirs.

    Args:
        here: The parts of the state.
        there: The parts of the checkpoint.
    """

    def __init__(self, here: Iterable[Part], there: Iterable[Part]) -> None:
        self.here = _named(here)
        self.there = _named(there)
        self._names = {**self.here, **self.there}

    def chosen(self, patterns: str | Sequence[str] | None) -> set[str]:
        """Returns the names that match any of ``patterns``.

        Raises:
            ValueError: If a pattern matches no name.
        """
        names = list(dict.fromkeys(self._names.values()))
        return {names[i] for i in matching(names, patterns, "parameter or buffer")}

    def of(self, part: Part) -> str | None:
        """Returns the name of the parameter or buffer that ``part`` belongs to, or None."""
        keys = part.keys
        if keys[:1] in (("params",), ("buffers",)):
            return self._names.get(keys[1:])
        if keys[:1] not in (("opt_state",), ("slots",)):
            return None
        inner = keys[1:] if keys[0] == "opt_state" else keys[2:]
        runs = [inner[i:j] for i in range(len(inner)) for j in range(i + 1, len(inner) + 1)]
        known = [run for run in runs if run in self._names]
        return self._names[max(reversed(known), key=len)] if known else None


def _named(parts: Iterable[Part]) -> dict[Keys, str]:
    return {
        part.keys[1:]: as_name(part.keys[1:])
        for part in parts
        if part.keys[:1] in (("params",), ("buffers",)) and len(part.keys) > 1
    }


def slots_of_one_side(like: TrainState, there: Iterable[Part]) -> tuple[set[str], dict[str, list[Part]]]:
    """Returns the slots that only ``like`` has, and the slots that only the checkpoint has, with their parts."""
    own: dict[str, list[Part]] = {}
    for part in there:
        if isinstance(part.slot, str):
            own.setdefault(part.slot, []).append(part)
    return like.slots.keys() - own.keys(), {
        name: parts for name, parts in sorted(own.items()) if name not in like.slots
    }
