"""Ownership: which memory of a state nobody but the state has.

A step that is given a state may write the next one over it, leaf by leaf, where that is so. What somebody else can
still see, through a container, a leaf or a view of one, is copied first and left as it is: nothing is ever overwritten
that can be read afterwards.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxtrain import tree

_storages = functools.partial(map, Tensor.untyped_storage)
_addresses = functools.partial(map, operator.attrgetter("_cdata"))
_uses: Any = functools.partial(map, getattr(torch._C, "_storage_Use_Count", lambda address: -1))
_references: Any = functools.partial(map, sys.getrefcount)

# How often a thing is referred to that one container holds, and the list that is asked; how often a storage is, and how
# often it is used, that one tensor has. All are found out here, because they depend on how Python and torch count.
_probe = [torch.empty(1)]
_SOLE = max(_references([_probe[0]]))
_SOLE_STORAGE = max(_references(list(_storages(_probe))))
_SOLE_USE = max(1, *_uses(_addresses(_storages(_probe))))  # where torch cannot count, all is taken for shared


def is_sole(leaves: list[Tensor], containers: list[Any], written: Sequence[int]) -> bool:
    """Whether nobody else holds any of these, which were reached from one state and are held by these two lists.

    Views are looked for of the leaves that are to be written only.
    """
    if max(_references(leaves), default=0) > _SOLE or max(_references(containers), default=0) > _SOLE:
        return False
    storages = list(_storages([leaves[index] for index in written]))
    return max(_references(storages), default=0) <= _SOLE_STORAGE and list(_uses(_addresses(storages))) == [
        _SOLE_USE
    ] * len(storages)


def shared(leaves: list[Tensor], containers: list[Any]) -> list[bool]:
    """For each leaf whether somebody else holds it too: itself, a view of it, or a container above it."""
    references = list(_references(leaves))
    held = [count > _SOLE for count in _references(containers)]
    exposed = {
        id(leaf)
        for container, elsewhere in zip(containers, held, strict=True)
        if elsewhere
        for leaf in tree.leaves(container)
    }
    storages = list(_storages(leaves))
    in_use = [
        holders > _SOLE_STORAGE or uses != _SOLE_USE
        for holders, uses in zip(_references(storages), _uses(_addresses(storages)), strict=True)
    ]
    return [
        count > _SOLE or id(leaf) in exposed or seen
        for leaf, count, seen in zip(leaves, references, in_use, strict=True)
    ]


def is_foreign(leaf: Tensor) -> bool:
    """Whether its memory is not torch's own: an array of numpy's, or a mapped file, that somebody else may have."""
    return not leaf.untyped_storage().resizable()
