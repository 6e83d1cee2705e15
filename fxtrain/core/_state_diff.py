"""The differences between two training states, leaf by leaf."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fxtrain.core._formats import dtype_name, pluralize, printable
from fxtrain.core._html import html_view, left_out, table, view
from fxtrain.core._leaf_values import is_freed, leaf_shape, leaf_values
from fxtrain.core._pytrees import NAMESPACE, ops
from fxtrain.core._record import Record
from fxtrain.core._types import Tree

_MAX_SHOWN = 40  # leaves


class LeafDiff(NamedTuple):
    """How a leaf of one state differs from that of another.

    Args:
        path: The path of the leaf, as code.
        kind: What differs: the ``"structure"`` if only one of the states has the leaf, its ``"shape"``, its ``"dtype"``
            or a ``"value"``.
        this: The leaf in the first state: its values if there are few, its shape or dtype, or ``"missing"``.
        other: The leaf in the other state.
        largest: The largest absolute difference between values; NaN if one of them is; None if values are not compared.
        elements: The number of elements that differ.
    """

    path: str
    kind: Literal["structure", "shape", "dtype", "value"]
    this: str
    other: str
    largest: float | None = None
    elements: int = 0


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class StateDiff(Record):
    """The differences between two states, from ``state.diff(other)``. It is false if there are none.

    Args:
        leaves: The leaves that differ.
        compared: The number of leaves that at least one of the states has.

    Example:
        >>> StateDiff((LeafDiff("state.step", "value", "3", "5", 2.0, 1),), compared=12)
        1 of 12 leaves differs
          state.step  3  5  by 2
    """

    leaves: tuple[LeafDiff, ...]
    compared: int

    def __bool__(self) -> bool:
        return bool(self.leaves)

    def __repr__(self) -> str:
        rows = [[leaf.path, leaf.this, leaf.other, _amount(leaf)] for leaf in self.leaves[:_MAX_SHOWN]]
        widths = [max(len(row[column]) for row in rows) for column in range(4)] if rows else []
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        if len(self.leaves) > _MAX_SHOWN:
            lines.append(f"... and {len(self.leaves) - _MAX_SHOWN} more")
        return "\n  ".join([self._head(), *map(printable, lines)])

    @html_view
    def _repr_html_(self) -> str:
        rows = [(leaf.path, leaf.this, leaf.other, _amount(leaf)) for leaf in self.leaves[:_MAX_SHOWN]]
        rest = left_out(len(self.leaves) - _MAX_SHOWN, "leaf", "leaves")
        shown = table(("leaf", "this", "other", "difference"), rows) if rows else ""
        return view("Difference of two states", shown, rest, note=self._head())

    def _head(self) -> str:
        whole = pluralize(self.compared, "leaf", "leaves")
        if not self.leaves:
            return f"no difference in {whole}"
        return f"{len(self.leaves):,} of {whole} {'differs' if len(self.leaves) == 1 else 'differ'}"


def state_diff(this: Tree, other: Tree) -> StateDiff:
    """Returns the differences between the leaves of two trees, in the order of the first, then of the other."""
    mine, others = _by_path(this), _by_path(other)
    found = [diff for path, leaf in mine.items() if (diff := leaf_diff(path, leaf, others.get(path)))]
    found += [LeafDiff(path, "structure", "missing", _shown(leaf)) for path, leaf in others.items() if path not in mine]
    return StateDiff(tuple(found), compared=len({**mine, **others}))


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    """Returns which elements of two tensors of one shape and dtype are equal. NaN equals NaN, and 0.0 is not -0.0."""
    if a.is_complex():
        return same_bits(torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())).all(-1)
    if not a.is_floating_point():
        return a == b
    if a.itemsize == 1:  # float8 has no comparisons
        a, b = a.float(), b.float()
    return torch.where(a.isnan(), b.isnan(), (a == b) & (a.signbit() == b.signbit()))


def _by_path(tree: Tree) -> dict[str, Any]:
    accessors, leaves, _ = ops.tree_flatten_with_accessor(tree, namespace=NAMESPACE)
    return {accessor.codify("state"): leaf for accessor, leaf in zip(accessors, leaves, strict=True)}


def leaf_diff(path: str, a: Any, b: Any) -> LeafDiff | None:
    """Returns how a leaf of one state differs from that of another, which is None if it is missing there."""
    if b is None:
        return LeafDiff(path, "structure", _shown(a), "missing")
    if a.shape != b.shape:
        return LeafDiff(path, "shape", _shown(a), _shown(b))
    if a.dtype != b.dtype:
        return LeafDiff(path, "dtype", dtype_name(a.dtype), dtype_name(b.dtype))
    for leaf in (a, b):
        if leaf.is_meta or is_freed(leaf):
            raise ValueError(
                f"expected two states with values, got {path} {'on meta' if leaf.is_meta else 'with freed memory'}. "
                "Compare states that hold their tensors, such as copies from state.copy()."
            )
    a, b = a.detach(), b.detach().to(a.device)
    if a.layout != torch.strided or b.layout != torch.strided:
        a, b = a.to_dense(), b.to_dense()
    differs = ~same_bits(a, b)
    count = int(differs.sum())
    if not count:
        return None
    wide = torch.complex128 if a.is_complex() else torch.float64 if a.is_floating_point() else torch.int64
    # On the host, because some accelerators lack float64.
    largest = (a[differs].cpu().to(wide) - b[differs].cpu().to(wide)).abs().max().item()
    shown, others = leaf_values([a, b])
    return LeafDiff(path, "value", shown or _shown(a), others or _shown(b), largest, count)


def _shown(leaf: Tensor) -> str:
    return f"{dtype_name(leaf.dtype)} {leaf_shape(leaf)}"


def _amount(leaf: LeafDiff) -> str:
    if leaf.largest is None:
        return leaf.kind
    return f"by {'at most ' if leaf.elements > 1 else ''}{leaf.largest:.3g}" + (
        f" in {leaf.elements:,} elements" if leaf.elements > 1 else ""
    )
