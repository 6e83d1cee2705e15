"""Matches the leaves of a tree with those of a checkpoint, by paths, ``where`` and ``fresh``."""

from __future__ import annotations

import fnmatch
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from fxtrain import tree
from fxtrain.checkpoint._errors import CheckpointError
from fxtrain.checkpoint._leaf_parts import Names, Part, parts_of, slots_of_one_side
from fxtrain.checkpoint._leaf_table import Leaf, rows_of
from fxtrain.checkpoint._mismatch import mismatch_message
from fxtrain.core import TrainState, Tree, describe, did_you_mean, first_names

Where = str | Iterable[str] | Mapping[str, str] | None
Fresh = str | Sequence[str] | None


class Elements(NamedTuple):
    """The sources of some elements of a leaf.

    Args:
        sources: For each element its index on the last axis of the leaf, the source leaf, and the index on the last
            axis of that. None stands for the whole leaf.
    """

    sources: tuple[tuple[int | None, Leaf, int | None], ...]


class Match(NamedTuple):
    """The result of matching a tree with a checkpoint.

    Args:
        sources: The source of each leaf of the tree, in order. None leaves the leaf unchanged.
        missing: Slots that only the tree has.
        extra: Slots that only the checkpoint has and that are not outdated, with their leaves.
        outdated: Slots that only the checkpoint has, with values of fresh parameters.
        shared: Restored slots with values of fresh parameters and values of no parameter, such as an update count.
    """

    sources: list[Leaf | Elements | None]
    missing: list[str]
    extra: dict[str, list[Leaf]]
    outdated: list[str]
    shared: list[str]


def match(path: pathlib.Path, like: Tree, stored: Mapping[str, Leaf], where: Where, fresh: Fresh = None) -> Match:
    """Finds the source of each leaf of ``like`` in a checkpoint.

    Args:
        path: The checkpoint's folder, for errors.
        like: The tree to restore.
        stored: The rows of the checkpoint's leaves, by path.
        where: As for ``restore``.
        fresh: As for ``restore``.

    Raises:
        CheckpointError: If a path of ``where`` matches nothing, or a leaf has another shape or dtype or exists on one
            side only. The message lists these paths with the shapes and dtypes of both sides.
        ValueError: If a pattern of ``fresh`` matches no name, or ``fresh`` is given and ``like`` is not a state.
    """
    if fresh is not None and not isinstance(like, TrainState):
        raise ValueError(f"expected a TrainState as `like` for fresh={fresh!r}, got {describe(like)}.")
    rows = {row["path"]: row for row in rows_of(like)}
    here, there = ([part for row in side.values() for part in parts_of(row)] for side in (rows, stored))
    names = Names(here, there)
    kept = names.chosen(fresh)

    def is_fresh(part: Part) -> bool:
        return bool(kept) and names.of(part) in kept

    select, selects = _selection(where, [part.path for part in here], [part.path for part in there])
    by_path = {part.leaf: _whole(part) for part in there} | {part.path: part for part in there}
    missing, extra = slots_of_one_side(like, there) if isinstance(like, TrainState) else (set[str](), {})
    found: list[tuple[Part, str, Part | None]] = []
    absent: set[str] = set()
    for part in _whole_where_stored_whole(here, select, stored):
        target = select(part.path)
        if target is None or is_fresh(part):
            continue
        if part.slot in missing and target == part.path:
            absent.add(part.slot)
        else:
            found.append((part, target, by_path.get(target)))
    used = {path for _, _, source in found if source for path in (source.path, source.leaf)}
    one_sided = {part.path for own in extra.values() for part in own}
    left_over = [
        part
        for part in there
        if selects(part.path)
        and not is_fresh(part)
        and not {part.path, part.leaf} & used
        and part.path not in one_sided
    ]
    unlike = [pair for pair in found if pair[2] is None or pair[2].kind != pair[0].kind]
    if unlike or left_over:
        raise CheckpointError(mismatch_message(path, names, [part for part, _, _ in found], unlike, left_over))
    _refuse_unnamed_elements(path, {part.leaf for part in here if is_fresh(part) and part.element is not None}, found)
    restored = {path for part, _, _ in found for path in (part.path, part.leaf)}
    meta = {path for path, leaf in zip(rows, tree.leaves(like), strict=True) if leaf.is_meta}
    empty = [part.path for part in here if part.leaf in meta and not {part.path, part.leaf} & restored]
    if empty:
        raise CheckpointError(
            f"expected values for {', '.join(empty[:6])}{' and more' if len(empty) > 6 else ''}, got none. `like` is "
            f"on the meta device there, and no value is restored from {path}. Use a `like` with values."
        )
    outdated = [name for name, own in extra.items() if any(map(is_fresh, own))]
    partly_fresh = {part.slot for part in here if is_fresh(part)} - {None}
    shared = {str(part.slot) for part, _, _ in found if part.slot in partly_fresh and names.of(part) is None}
    unclaimed = {
        name: [stored[leaf] for leaf in dict.fromkeys(part.leaf for part in own)]
        for name, own in extra.items()
        if name not in outdated
    }
    if where is not None:
        unclaimed, outdated = {}, []
    return Match(_sources(rows, found, stored), sorted(absent), unclaimed, outdated, sorted(shared))


def _selection(
    where: Where, here: Collection[str], there: Collection[str]
) -> tuple[Callable[[str], str | None], Callable[[str], bool]]:
    """Returns two functions that implement ``where``.

    The first maps a path of the tree to one of the checkpoint, or to None if it is not selected. The second tells
    whether a path of the checkpoint is selected.

    Args:
        where: As for ``restore``.
        here: The paths of the tree.
        there: The paths of the checkpoint.

    Raises:
        CheckpointError: If a prefix or a pattern matches no path on one side.
    """
    if where is None:
        return lambda path: path, lambda path: True
    if isinstance(where, str):
        where = [where]
    renamed = dict(where) if isinstance(where, Mapping) else {path: path for path in where}
    for side, wheres, paths in (("`like`", renamed, here), ("the checkpoint", renamed.values(), there)):
        for one in wheres:
            if not any(_is_at(path, one) for path in paths):
                meant = did_you_mean(one, dict.fromkeys(prefix for path in paths for prefix in _prefixes(path)))
                shown = first_names(list(paths), 6)
                raise CheckpointError(f"expected where={one!r} to match a path of {side}, got only {shown}.{meant}")
    prefixes = {one: target for one, target in renamed.items() if not _is_pattern(one)}
    patterns = [one for one in renamed if _is_pattern(one)]

    def select(path: str) -> str | None:
        longest = max((prefix for prefix in prefixes if _is_at(path, prefix)), key=len, default=None)
        if longest is not None:
            return prefixes[longest] + path[len(longest) :]
        return path if any(_is_at(path, pattern) for pattern in patterns) else None

    return select, lambda path: any(_is_at(path, target) for target in renamed.values())


def _prefixes(path: str) -> list[str]:
    """Returns what ``where`` can name a path by.

    Example:
        >>> _prefixes("state.params['w']")
        ['state', 'state.params', "state.params['w']"]
    """
    return [path[:end] for end in range(1, len(path) + 1) if path[end : end + 1] in ("", ".", "[")]


def _is_pattern(where: str) -> bool:
    return "*" in where or "?" in where


def _is_at(path: str, where: str) -> bool:
    """Returns whether ``path`` is at or below the prefix or pattern ``where``. Brackets match literally."""
    if _is_pattern(where):
        pattern = where.replace("[", "[[]")
        return any(fnmatch.fnmatchcase(path, pattern + end) for end in ("", ".*", "[[]*"))
    return path.startswith(where) and path[len(where) : len(where) + 1] in ("", ".", "[")


def _whole_where_stored_whole(
    here: Iterable[Part], select: Callable[[str], str | None], stored: Mapping[str, Leaf]
) -> list[Part]:
    """Returns the parts, with whole leaves where the checkpoint stores a vector without the paths of its elements."""
    found: dict[str, Part] = {}
    for part in here:
        target = select(part.leaf) if part.element is not None else None
        whole = target is not None and target in stored and "elements" not in stored[target]
        found[part.leaf if whole else part.path] = _whole(part) if whole else part
    return list(found.values())


def _whole(part: Part) -> Part:
    return Part(part.leaf, (), part.leaf_kind, part.leaf, part.leaf_kind)


def _sources(
    rows: Mapping[str, Leaf], found: Iterable[tuple[Part, str, Part | None]], stored: Mapping[str, Leaf]
) -> list[Leaf | Elements | None]:
    chosen: dict[str, list[tuple[Part, Part]]] = {}
    for part, _, source in found:
        if source is not None:
            chosen.setdefault(part.leaf, []).append((part, source))

    def source_of(path: str, row: Leaf) -> Leaf | Elements | None:
        pairs = chosen.get(path)
        if not pairs:
            return None
        first = stored[pairs[0][1].leaf]
        taken = [(part.element, source.leaf, source.element) for part, source in pairs]
        elements = range(len(row.get("elements", ())))
        has_all = len(elements) == len(first.get("elements", ()))
        if taken == [(None, first["path"], None)] or (
            has_all and taken == [(index, first["path"], index) for index in elements]
        ):
            return first
        return Elements(tuple((part.element, stored[source.leaf], source.element) for part, source in pairs))

    return [source_of(path, row) for path, row in rows.items()]


def _refuse_unnamed_elements(
    path: pathlib.Path, partly_fresh: Collection[str], found: Iterable[tuple[Part, str, Part | None]]
) -> None:
    for part, target, _ in found:
        if part.path in partly_fresh:
            raise CheckpointError(
                f"expected the parameter of each element of {target} in {path}, got none, because an older version "
                "of fxtrain wrote it. Restore only the parameters, with where='state.params'."
            )
