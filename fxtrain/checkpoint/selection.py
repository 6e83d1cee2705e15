"""Selection: which leaf of a checkpoint goes to which leaf of a tree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fxtrain.checkpoint.errors import CheckpointError

Where = str | Iterable[str] | Mapping[str, str] | None


def sources(where: Where, wanted: Iterable[str], stored: Iterable[str]) -> dict[str, str]:
    """From each path that is to be restored to its path in the checkpoint.

    Args:
        where: None for all. A path, or several, for what is at and below them. A mapping from paths to the paths
            that the same things have in the checkpoint.
        wanted: The paths of all leaves of the tree.
        stored: The paths of all leaves of the checkpoint.

    Raises:
        CheckpointError: If nothing is at a path.
    """
    wanted, stored = list(wanted), list(stored)
    if where is None:
        return {path: path for path in wanted}
    if isinstance(where, str):
        where = [where]
    renamed = dict(where) if isinstance(where, Mapping) else {path: path for path in where}
    for side, prefixes, paths in (("`like`", renamed, wanted), ("the checkpoint", renamed.values(), stored)):
        for prefix in prefixes:
            if not any(_below(path, prefix) for path in paths):
                raise CheckpointError(f"where={prefix!r}: nothing is there in {side}, which has {_shown(paths)}.")
    found: dict[str, str] = {}
    for path in wanted:
        prefixes = [prefix for prefix in renamed if _below(path, prefix)]
        if prefixes:
            longest = max(prefixes, key=len)
            found[path] = renamed[longest] + path[len(longest) :]
    return found


def _below(path: str, prefix: str) -> bool:
    return path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in ("", ".", "[")


def _shown(paths: list[str]) -> str:
    return ", ".join(paths[:6]) + (f" and {len(paths) - 6} more" if len(paths) > 6 else "")


def refuse_differences(
    name: Any, chosen: Mapping[str, str], wanted: Mapping[str, Any], stored: Mapping[str, Any], unclaimed: Iterable[str]
) -> None:
    """Every leaf that is to be restored is in the checkpoint with its dtype and shape, and nothing is left over.

    Args:
        name: Of the checkpoint.
        chosen: From path to path in the checkpoint.
        wanted: From path to a description, as ``float32[2, 3]``.
        stored: The same of the checkpoint.
        unclaimed: Paths of the checkpoint that must not be left over.

    Raises:
        CheckpointError: Naming every path with both sides.
    """
    problems: list[str] = []
    for path, source in chosen.items():
        there = stored.get(source)
        if there != wanted[path]:
            at = "" if source == path else f" at {source}"
            has = "the checkpoint has none" if there is None else f"the checkpoint has {there}"
            problems.append(f"  {path}: wanted {wanted[path]}, and {has}{at}")
    problems += [f"  {path}: the checkpoint has {stored[path]}, and nothing is wanted" for path in unclaimed]
    if problems:
        shown = "\n".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise CheckpointError(
            f"{name} does not fit what it is to be restored like:\n{shown}\n"
            "Make `like` with the model, the optimizer and the callbacks that the checkpoint was made with; or restore "
            "a part, or under other names, with `where=`."
        )
