"""Translates an optimizer's parameter groups to masks and partitions by parameter name."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from fxtrain.equivalents._expressions import NoEquivalentError

_FREEZE = "fx.optim.set_to_zero()"


class Group(NamedTuple):
    """One parameter group and its translation."""

    expression: str
    undecayed: str  # the expression with a weight decay of 0
    weight_decay: float
    options: Mapping[str, Any]  # as in optimizer.param_groups


class _Member(NamedTuple):
    name: str | None
    ndim: int


def partitioned(groups: list[Group], model: object, *, has_mask: bool) -> str:
    """Returns one expression for all groups.

    Args:
        groups: At least one group.
        model: The module that holds the parameters, a dict of modules, or None if it is unknown.
        has_mask: Whether the optimizer takes a mask of the parameters that decay.

    Raises:
        NoEquivalentError: If the groups differ and their parameters have no names.
    """
    names = {id(value): name for name, value in _named(model)}
    trained = {name for name, value in _named(model) if value.requires_grad}
    members: dict[str, list[_Member]] = {}
    decays: dict[str, float] = {}
    for group in groups:
        given = group.options.get("param_names") or [None] * len(group.options["params"])
        found = [
            _Member(names.get(id(param), name), param.ndim)
            for param, name in zip(group.options["params"], given, strict=True)
        ]
        members.setdefault(group.expression, []).extend(found)
        decays[group.expression] = group.weight_decay
    left = trained - {member.name for found in members.values() for member in found}
    members = {expression: found for expression, found in members.items() if found}
    if left and all(member.name for found in members.values() for member in found):
        members[_FREEZE] = [_Member(name, -1) for name in sorted(left)]
    if len(members) <= 1:
        return next(iter(members), groups[0].expression)
    if has_mask and len(members) == 2 and not left and len({group.undecayed for group in groups}) == 1:
        decayed, plain = sorted(members, key=lambda each: -decays[each])
        if decays[plain] == 0 and "fx.optim.from_torch" not in decayed:
            predicate = _predicate(members[decayed], members[plain])
            return f"{decayed.removesuffix(')')}, mask=lambda path, leaf: {predicate})"
    # The largest group takes all parameters that no predicate selects.
    ranked = sorted(members.items(), key=lambda item: len(item[1]))
    labels = {key: "frozen" if key == _FREEZE else f"group {index}" for index, key in enumerate(members)}
    choice = repr(labels[ranked[-1][0]])
    for index in reversed(range(len(ranked) - 1)):
        expression, found = ranked[index]
        others = [member for _, more in ranked[index + 1 :] for member in more]
        choice = f"{labels[expression]!r} if {_predicate(found, others)} else {choice}"
    transforms = ", ".join(f"{labels[expression]!r}: {expression}" for expression in members)
    return f"fx.optim.partition({{{transforms}}}, lambda path, leaf: {choice})"


def _named(model: object) -> list[tuple[str, Tensor]]:
    if isinstance(model, nn.Module):
        return list(model.named_parameters())
    if isinstance(model, Mapping):
        return [
            (f"{key}.{name}" if name else str(key), value)
            for key, part in model.items()
            for name, value in _named(part)
        ]
    return [("", model)] if isinstance(model, nn.Parameter) else []


def _predicate(chosen: list[_Member], others: list[_Member]) -> str:
    """Returns a Python expression that is true for the chosen members and false for the others."""
    if all(member.ndim > 1 for member in chosen) and all(0 <= member.ndim <= 1 for member in others):
        return "leaf.ndim > 1"
    if all(0 <= member.ndim <= 1 for member in chosen) and all(member.ndim > 1 for member in others):
        return "leaf.ndim <= 1"
    unknown = [member for member in (*chosen, *others) if member.name is None]
    if unknown:
        raise NoEquivalentError(
            f"its parameter groups differ, and {len(unknown)} parameters have no names. Pass it to fx.init(module, "
            "optimizer), which prints the expression with the module's names, or create the optimizer from "
            "module.named_parameters()"
        )
    names, rest = [member.name or "" for member in chosen], [member.name or "" for member in others]
    prefix = _common(names)
    if prefix and not any(name.startswith(prefix) for name in rest):
        return f"path.startswith({prefix!r})"
    ends = sorted({name.rpartition(".")[2] for name in names})
    if not {name.rpartition(".")[2] for name in rest} & set(ends):
        return f"path.rpartition('.')[2] in {{{', '.join(map(repr, ends))}}}"
    if len(names) > len(rest):
        return f"path not in {{{', '.join(map(repr, rest))}}}"
    return f"path in {{{', '.join(map(repr, names))}}}"


def _common(names: list[str]) -> str:
    """Returns the longest common prefix that ends in a dot."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
    return "".join(f"{column[0]}." for column in shared)
