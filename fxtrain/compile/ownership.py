"""Ownership: which memory of a state nobody but the state has.

A step that is given a state may write the next one over it, leaf by leaf, where that is so. What somebody else can
still see, through a container, a leaf or a view of one, is copied first and left as it is: nothing is ever overwritten
that can be read afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxtrain import tree

# How often a thing is referred to that one container holds, and the list that is asked; and how often a storage is used
# that one tensor has. Both are found out here, because they depend on how Python and torch count.
_holder = [object()]
_REFERENCES = max(map(sys.getrefcount, [_holder[0]]))
_storage_uses: Any = getattr(torch._C, "_storage_Use_Count", lambda storage: -1)
_probe = torch.empty(1)
_USES = max(1, _storage_uses(_probe.untyped_storage()._cdata))  # where torch cannot count, all is taken for shared


def is_sole(leaves: list[Tensor], containers: list[Any], written: Sequence[int]) -> bool:
    """Whether nobody else holds any of these, which were reached from one state and are held by these two lists.

    Views are looked for of the leaves that are to be written only.
    """
    return (
        max(map(sys.getrefcount, leaves), default=0) <= _REFERENCES
        and max(map(sys.getrefcount, containers), default=0) <= _REFERENCES
        and all([_storage_uses(leaf.untyped_storage()._cdata) == _USES for leaf in [leaves[i] for i in written]])  # noqa: C419 - faster
    )


def shared(leaves: list[Tensor], containers: list[Any]) -> list[bool]:
    """For each leaf whether somebody else holds it too: itself, a view of it, or a container above it."""
    references = list(map(sys.getrefcount, leaves))
    held = [count > _REFERENCES for count in map(sys.getrefcount, containers)]
    exposed = {
        id(leaf)
        for container, elsewhere in zip(containers, held, strict=True)
        if elsewhere
        for leaf in tree.leaves(container)
    }
    return [
        count > _REFERENCES or id(leaf) in exposed or _storage_uses(leaf.untyped_storage()._cdata) != _USES
        for leaf, count in zip(leaves, references, strict=True)
    ]


def is_foreign(leaf: Tensor) -> bool:
    """Whether its memory is not torch's own: an array of numpy's, or a mapped file, that somebody else may have."""
    return not leaf.untyped_storage().resizable()
