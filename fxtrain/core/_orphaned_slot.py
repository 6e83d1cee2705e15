"""The restored state of a callback that is not attached yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import optree
from torch import Tensor

from fxtrain.core._checks import describe
from fxtrain.core._pytrees import NAMESPACE, ops
from fxtrain.core._types import Tree


class OrphanedSlot(dict[str, Tensor]):
    """The state of a callback that is not attached, by the code of each leaf's path below its slot.

    It is saved under the same paths as before, so the callback's state is restored when it is attached again.
    """

    def rebuilt(self, name: str, like: Tree) -> Tree:
        """Returns the state as a tree with the structure of ``like``.

        Args:
            name: The name of the slot.
            like: The initial state of the callback.

        Raises:
            ValueError: If the paths, shapes or dtypes differ.
        """
        accessors, leaves, structure = ops.tree_flatten_with_accessor(like, namespace=NAMESPACE)
        codes = [accessor.codify("") for accessor in accessors]
        expected, got = _described(dict(zip(codes, leaves, strict=True))), _described(self)
        if expected != got:
            raise ValueError(
                f"expected the restored slot {name!r} to have {expected}, as its callback has, got {got}. Attach the "
                "callback with the arguments of the saved run, or restore with extra='drop'."
            )
        return ops.tree_unflatten(structure, [self[code] for code in codes])


def _described(leaves: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{code.lstrip('.')} {describe(leaf)}" for code, leaf in sorted(leaves.items()))


class _CodeEntry(optree.PyTreeEntry):
    def codify(self, /, node: str = "") -> str:
        return f"{node}{self.entry}"


def _flatten(node: OrphanedSlot) -> tuple[list[Tensor], tuple[str, ...], tuple[str, ...]]:
    return list(node.values()), tuple(node), tuple(node)


def _unflatten(codes: tuple[str, ...], leaves: Iterable[Tensor]) -> OrphanedSlot:
    return OrphanedSlot(zip(codes, leaves, strict=True))


ops.register_pytree_node(OrphanedSlot, _flatten, _unflatten, path_entry_type=_CodeEntry, namespace=NAMESPACE)
