"""R12: a power cut at every call of a scenario, after which only what was synced is left.

The log of calls is replayed on a model of a disk. A file's content survives if it was synced after its last write, and
a name if the folder that holds it was synced since. R11 asks whether anything may be lost in any order; this asks what
a run would find in the worst one.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence

from benchmarks.reliability.shim import Call
from benchmarks.reliability.synced import COMMITTED, log
from benchmarks.reliability.systems import System
from benchmarks.reliability.table import Cell

_FILES = {"leaves.bin", "manifest.jsonl"}
_CHECKPOINT = re.compile(r"([0-9]{8,})-.*step-[0-9]+")


class Node:
    """A file, or a folder with its names as they are and as they were synced."""

    def __init__(self) -> None:
        self.names: dict[str, Node] = {}
        self.synced: dict[str, Node] = {}
        self.whole = False  # of a file: whether its content was synced after its last write

    def at(self, path: str) -> Node:
        """The node of a path below this one."""
        node = self
        for name in path.strip("/").split("/"):
            node = node.names[name] if name else node
        return node

    def sync(self) -> None:
        """Brings the content, or the names, to the disk."""
        self.synced, self.whole = dict(self.names), True

    def survivors(self) -> set[int]:
        """The sequence numbers of the whole checkpoints below this folder, after a power cut."""
        found: set[int] = set()
        for name, node in self.synced.items():
            if match := _CHECKPOINT.fullmatch(name):
                files = {file for file, inner in node.synced.items() if inner.whole}
                found |= {int(match[1])} if files >= _FILES else set()
            else:
                found |= node.survivors()
        return found


def losses(calls: Sequence[Call], root: str) -> tuple[int, list[str]]:
    """How many power cuts there are in a log, and those after which a save that was reported is gone.

    Args:
        calls: The log, with a note ``committed`` after each save. The newest checkpoint is always kept.
        root: The folder that was there before.
    """
    disk, saves, problems = Node(), 0, list[str]()
    for index, call in enumerate(calls):
        if call.name == "note":
            saves += call.path == COMMITTED
        else:
            _apply(disk, call._replace(path=call.path[len(root) :], target=call.target[len(root) :]))
        survivors = disk.survivors()
        if saves and max(survivors, default=-1) < saves - 1:
            problems.append(f"cut after call {index}: {saves} saves were reported, and {sorted(survivors)} survive")
    return len(calls), problems


def power_cuts(system: type[System]) -> Cell:
    """Cuts the power at every call, where the saves themselves make the folder of the run and where another writer has
    made it without a sync."""
    cell = Cell()
    for best in (False, True):
        for made_before in (False, True):
            calls = log(system, best=best, made_before=made_before)
            root = os.path.commonpath([call.path for call in calls if call.name != "note"])
            tried, problems = losses(calls, root)
            cell.tried += tried
            cell.lost += len(problems)
            cell.notes += problems
    return cell


def _apply(disk: Node, call: Call) -> None:
    folder, _, name = call.path.rpartition("/")
    match call.name:
        case "mkdir":
            with contextlib.suppress(KeyError):  # the log has calls that fail too, as that of a folder in no folder
                disk.at(folder).names.setdefault(name, Node())
        case "create" | "truncate" | "open":
            disk.at(folder).names.setdefault(name, Node())
            disk.at(call.path).whole = False
        case "write":
            disk.at(call.path).whole = False
        case "sync":
            disk.at(call.path).sync()
        case "remove":
            disk.at(folder).names.pop(name, None)
        case "rename" | "link":
            target, _, to = call.target.rpartition("/")
            node = disk.at(call.path)
            disk.at(target).names[to] = node
            if call.name == "rename":
                disk.at(folder).names.pop(name)
