"""Selection: which leaf of a checkpoint goes to which leaf of a tree."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fxtrain import tree
from fxtrain.checkpoint.errors import CheckpointError
from fxtrain.checkpoint.table import Leaf, name_of, root_of
from fxtrain.core import TrainState

Where = str | Iterable[str] | Mapping[str, str] | None


class Match(NamedTuple):
    """What is restored from where."""

    sources: list[Leaf | None]  # for each leaf of the tree, in order; None where it stays as it is
    missing: list[str]  # slots of the tree alone
    extra: dict[str, list[Leaf]]  # slots of the checkpoint alone, with their leaves


def match(path: pathlib.Path, like: Any, stored: Mapping[str, Leaf], where: Where) -> Match:
    """Finds the source of each leaf of ``like`` in the checkpoint at ``path``, whose leaves are ``stored`` by path.

    Raises:
        CheckpointError: If nothing is at a path of ``where``, or a leaf has another shape or dtype, is missing or is
            left over. The message names every such path with both sides.
    """
    leaves, structure = tree.flatten(like)
    wanted: dict[str, Tensor] = dict(zip(tree.paths(like, root_of(structure)), leaves, strict=True))
    chosen = _chosen(where, wanted, stored)
    missing, extra = _slots_of_one_side(like, stored) if where is None and isinstance(like, TrainState) else ({}, {})
    chosen = {here: there for here, there in chosen.items() if here not in missing}
    unclaimed = {row["path"] for own in extra.values() for row in own}
    left_over = (
        [] if where is not None else [there for there in stored if there not in wanted and there not in unclaimed]
    )
    _refuse_differences(path, chosen, wanted, stored, left_over)
    _refuse_abstract_rest(path, wanted, chosen)
    sources = [stored[chosen[here]] if here in chosen else None for here in wanted]
    return Match(sources, sorted(set(missing.values())), extra)


def _chosen(where: Where, wanted: Iterable[str], stored: Iterable[str]) -> dict[str, str]:
    """From each path that is to be restored to its path in the checkpoint."""
    if where is None:
        return {path: path for path in wanted}
    if isinstance(where, str):
        where = [where]
    renamed = dict(where) if isinstance(where, Mapping) else {path: path for path in where}
    for side, prefixes, paths in (
        ("`like`", renamed, list(wanted)),
        ("the checkpoint", renamed.values(), list(stored)),
    ):
        for prefix in prefixes:
            if not any(_below(path, prefix) for path in paths):
                shown = ", ".join(paths[:6]) + (f" and {len(paths) - 6} more" if len(paths) > 6 else "")
                raise CheckpointError(f"where={prefix!r}: nothing is there in {side}, which has {shown}.")
    found: dict[str, str] = {}
    for path in wanted:
        longest = max((prefix for prefix in renamed if _below(path, prefix)), key=len, default=None)
        if longest is not None:
            found[path] = renamed[longest] + path[len(longest) :]
    return found


def _below(path: str, prefix: str) -> bool:
    return path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in ("", ".", "[")


def _slots_of_one_side(like: TrainState, stored: Mapping[str, Leaf]) -> tuple[dict[str, str], dict[str, list[Leaf]]]:
    """The leaves of slots that the checkpoint does not have, from path to slot; and the slots it alone has."""
    there: dict[str, list[Leaf]] = {}
    for row in stored.values():
        entries = row["entries"]
        if len(entries) > 1 and entries[0] == ["attribute", "slots"] and isinstance(entries[1][1], str):
            there.setdefault(entries[1][1], []).append(row)
    missing = {
        path: name
        for name, memory in like.slots.items()
        if name not in there
        for path in tree.paths(memory, f"state.slots[{name!r}]")
    }
    return missing, {name: own for name, own in sorted(there.items()) if name not in like.slots}


def _refuse_differences(
    path: pathlib.Path,
    chosen: Mapping[str, str],
    wanted: Mapping[str, Tensor],
    stored: Mapping[str, Leaf],
    left_over: Iterable[str],
) -> None:
    problems: list[str] = []
    for here, there in chosen.items():
        leaf, row = wanted[here], stored.get(there)
        asked = f"{name_of(leaf.dtype)}{list(leaf.shape)}"
        has = None if row is None else f"{row['dtype']}{row['shape']}"
        if has != asked:
            at = "" if there == here else f" at {there}"
            problems.append(f"  {here}: wanted {asked}, and the checkpoint has {has or 'none'}{at}")
    for there in left_over:
        row = stored[there]
        problems.append(f"  {there}: the checkpoint has {row['dtype']}{row['shape']}, and nothing is wanted")
    if problems:
        shown = "\n".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise CheckpointError(
            f"{path} does not fit what it is to be restored like:\n{shown}\n"
            "Make `like` with the model, the optimizer and the callbacks that the checkpoint was made with; or restore "
            "a part, or under other names, with `where=`."
        )


def _refuse_abstract_rest(path: pathlib.Path, wanted: Mapping[str, Tensor], chosen: Mapping[str, str]) -> None:
    empty = [here for here, leaf in wanted.items() if leaf.is_meta and here not in chosen]
    if empty:
        raise CheckpointError(
            f"{', '.join(empty[:6])}{' and more' if len(empty) > 6 else ''} would stay as in `like`, and has no value "
            f"there, because it is on the meta device; {path} has none for it either. Give a `like` with values."
        )
