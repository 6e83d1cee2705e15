"""The parameters and modules of a state, as facts and tables for its summary."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from fxtrain import tree
from fxtrain.core import TrainState, Tree, dtype_name, format_bytes, pluralize, printable, truncate_middle

_T = TypeVar("_T")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a number between the dots of a name
_MAX_NAME_LENGTH = 48  # characters of a name in a table
RIGHT_ALIGNED = ("parameters", "share", "size", "tensors", "elements", "bytes")  # columns

Row = dict[str, str]
"""Cells by column."""


class Leaf(NamedTuple):
    """A parameter."""

    name: str  # dotted
    tensor: Tensor
    trainable: bool | None  # None if the state has no model


def leaves_of(state: TrainState) -> list[Leaf]:
    """Returns the parameters, in the order of the leaves of ``state.params``."""
    paths = [".".join(map(str, accessor.path)) for accessor in tree.accessors(state.params)]
    tensors: list[Tensor] = tree.leaves(state.params)
    masks = [None] * len(tensors) if state.model is None else tree.leaves(state.model.trainable)
    return [Leaf(*each) for each in zip(paths, tensors, masks, strict=True)]


def modules_of(state: TrainState) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the types of modules by dotted name, in model order, and the first name of tied parameters by each of
    their other names."""
    types: dict[str, str] = {}
    tied: dict[str, str] = {}

    def visit(model: Tree) -> None:
        first: dict[Tensor, str] = {}  # tensors are hashed by identity
        paths = [accessor.path for accessor in tree.accessors(model)]
        for path, part in zip(paths, tree.leaves(model), strict=True):
            if isinstance(part, nn.Module):
                for name, module in part.named_modules():
                    types[_joined(path, name)] = type(module).__name__
                for name, value in part.named_parameters(remove_duplicate=False):
                    known = first.setdefault(value, _joined(path, name))
                    if known != _joined(path, name):
                        tied[_joined(path, name)] = known

    if state.model is not None:
        state.model.call(state.params, state.buffers, visit, train=False)
    return types, tied


def _joined(path: Sequence[object], name: str) -> str:
    return ".".join([*map(str, path), *([name] if name else [])])


def which_trainable(leaves: list[Leaf]) -> str:
    """Returns ``"all"``, ``"some"`` or ``"frozen"``, or an empty string if it is unknown."""
    found = {leaf.trainable for leaf in leaves}
    if None in found or not found:
        return ""
    return "some" if len(found) > 1 else "all" if found == {True} else "frozen"


def dtypes_of(leaves: list[Leaf]) -> str:
    """Returns the names of the distinct dtypes, sorted."""
    return ", ".join(sorted({dtype_name(leaf.tensor.dtype) for leaf in leaves}))


def numel_of(leaves: Iterable[Leaf]) -> int:
    """Returns the number of elements in all leaves."""
    return sum(leaf.tensor.numel() for leaf in leaves)


def model_facts(state: TrainState, leaves: list[Leaf], tied: dict[str, str]) -> dict[str, str]:
    """Returns facts by label. Unknown ones are empty."""
    buffers = tree.leaves(state.buffers)
    in_buffers = sum(buffer.numel() for buffer in buffers)
    counts: Counter[str] = Counter()
    for leaf in leaves:
        counts[dtype_name(leaf.tensor.dtype)] += leaf.tensor.numel()
    several = ", ".join(f"{name} {count:,}" for name, count in counts.most_common())
    whole = f"{numel_of(leaves):,} in {pluralize(len(leaves), 'tensor')}"
    trainable = which_trainable(leaves)
    if trainable == "some":
        moving = numel_of(leaf for leaf in leaves if leaf.trainable)
        whole += f": {moving:,} trainable, {numel_of(leaves) - moving:,} frozen"
    elif trainable:
        whole += ", all trainable" if trainable == "all" else ", all frozen"
    parts = {name: tree.nbytes(getattr(state, name)) for name in ("params", "buffers", "opt_state", "slots")}
    named = [f"{name} {format_bytes(count)}" for name, count in parts.items() if count]
    everything = tree.nbytes(state)
    rest = everything - sum(parts.values())
    return {
        "runs": f"{len(state.step)}, counted together" if state.step.ndim else "",
        "parameters": whole,
        "tied": ", ".join(f"{other} is {name}" for other, name in tied.items()),
        "buffers": f"{in_buffers:,} in {pluralize(len(buffers), 'tensor')}" if buffers else "",
        "dtype": several if len(counts) > 1 else "".join(counts),
        "state": f"{format_bytes(everything)}: {', '.join([*named, f'other {format_bytes(rest)}'])}",
    }


class _Group(NamedTuple):
    """Modules in the same row. They differ only in the indices of their names."""

    name: str
    depth: int
    kind: str
    leaves: list[Leaf]
    number: int = 1  # number of modules


def tensor_rows(leaves: list[Leaf], rows: int) -> list[Row]:
    shown, rest = _split_rows(leaves, rows)
    table = [
        {
            "tensor": truncate_middle(leaf.name, _MAX_NAME_LENGTH),
            "shape": str(tuple(leaf.tensor.shape)),
            "dtype": dtype_name(leaf.tensor.dtype),
            "size": f"{leaf.tensor.numel():,}",
        }
        for leaf in shown
    ]
    if rest:
        table.append({"tensor": f"(and {len(rest)} more)", "shape": "", "dtype": "", "size": f"{numel_of(rest):,}"})
    return table


def module_rows(leaves: list[Leaf], modules: dict[str, str], depth: int, rows: int) -> list[Row]:
    if not leaves:
        return []
    groups = _by_module(leaves, modules, depth)
    if len(groups) > rows:
        groups = _merge_similar(groups)
    while len(groups) > rows and depth > 1:
        depth -= 1
        groups = [group for group in groups if group.depth <= depth]
    if len(groups) == 1 and not modules:
        return []  # a flat dict of parameters, which the panels already summarize
    shown, rest = _split_rows(groups, rows)
    if rest:
        top = min(group.depth for group in rest)  # deeper groups are part of these
        beyond = [leaf for group in rest if group.depth == top for leaf in group.leaves]
        shown.append(_Group(f"(and {sum(group.number for group in rest)} more)", 1, "", beyond))
    return [_module_row(group, numel_of(leaves)) for group in shown]


def _by_module(leaves: list[Leaf], modules: dict[str, str], depth: int) -> list[_Group]:
    """Returns a group for each module with parameters down to ``depth``, in model order."""
    members: dict[str, list[Leaf]] = {name: [] for name in ("", *modules)}
    for leaf in leaves:
        parts = leaf.name.split(".")
        for level in range(min(depth, len(parts) - 1) + 1):
            members.setdefault(".".join(parts[:level]), []).append(leaf)
    return [
        _Group(name, name.count(".") + 1 if name else 0, modules.get(name, ""), inside)
        for name, inside in members.items()
        if inside
    ]


def _merge_similar(groups: list[_Group]) -> list[_Group]:
    found: dict[tuple[object, ...], _Group] = {}
    for group in groups:
        starred = _NUMBER.sub("*", group.name)
        key = starred, group.kind, numel_of(group.leaves), dtypes_of(group.leaves), which_trainable(group.leaves)
        first = found.setdefault(key, group)
        if first is not group:
            found[key] = _Group(starred, group.depth, group.kind, [*first.leaves, *group.leaves], first.number + 1)
    return list(found.values())


def _module_row(group: _Group, whole: int) -> Row:
    count = numel_of(group.leaves)
    last, kind = group.name.rpartition(".")[2] or "(model)", group.kind
    if group.number > 1:
        kind = f"{group.number} x {kind}" if kind else f"{group.number} similar"
    return {
        "module": "  " * group.depth + truncate_middle(last, _MAX_NAME_LENGTH),
        "type": truncate_middle(kind, _MAX_NAME_LENGTH),
        "parameters": f"{count:,}",
        "share": f"{count / whole:.1%}" if whole else "",
        "trainable": which_trainable(group.leaves),
        "dtype": dtypes_of(group.leaves),
    }


def text_table(rows: Sequence[Row]) -> str:
    """Returns a table with borders, without its empty columns, or a note if clu cannot be imported."""
    if not rows:
        return ""
    try:
        from clu import parameter_overview  # imports jax, but initializes no backend
    except ImportError as error:
        return f"(no table, because clu cannot be imported: {error}; pip install clu)"
    rows = [{name: printable(cell) for name, cell in row.items()} for row in rows]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]  # without empty columns
    widest = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}
    aligned = [
        {name: row[name].rjust(widest[name]) if name in RIGHT_ALIGNED else row[name] for name in columns}
        for row in rows
    ]
    kind = dataclasses.make_dataclass("Row", columns)
    return parameter_overview.make_table([kind(**row) for row in aligned], column_names=columns)


def _split_rows(found: list[_T], rows: int) -> tuple[list[_T], list[_T]]:
    """Splits items into those to show and those to sum up in the last row."""
    return (found, []) if len(found) <= rows else (found[: rows - 1], found[rows - 1 :])
