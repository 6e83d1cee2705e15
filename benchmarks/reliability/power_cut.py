"""R12: reported saves survive a power cut at any call, after which only synced content remains.

The log of calls is replayed on a model of a disk. File content survives if the file was synced after its last write,
and a name survives if its folder was synced after the name changed. R11 checks that nothing can be lost in any order of
writes. R12 checks what a run would find after the worst order.
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
    """A file, or a folder with its current names and its synced names."""

    def __init__(self) -> None:
        self.names: dict[str, Node] = {}
        self.synced: dict[str, Node] = {}
        self.whole = False  # whether a file was synced after its last write

    def at(self, path: str) -> Node:
        """Returns the node of a path below this one."""
        node = self
        for name in path.strip("/").split("/"):
            node = node.names[name] if name else node
        return node

    def sync(self) -> None:
        """Makes the content or the names durable."""
        self.synced, self.whole = dict(self.names), True

    def survivors(self) -> set[int]:
        """Returns the sequence numbers of the complete checkpoints below this folder after a power cut."""
        found: set[int] = set()
        for name, node in self.synced.items():
            if match := _CHECKPOINT.fullmatch(name):
                files = {file for file, inner in node.synced.items() if inner.whole}
                found |= {int(match[1])} if files >= _FILES else set()
            else:
                found |= node.survivors()
        return found


def losses(calls: Sequence[Call], root: str) -> tuple[int, list[str]]:
    """Cuts the power after every call of a log.

    Args:
        calls: The log, with a note ``committed`` after each save. The newest checkpoint is always kept.
        root: The folder that existed before.

    Returns:
        The number of power cuts, and one line per cut that loses a reported save.
    """
    disk, saves, problems = Node(), 0, list[str]()
    for index, call in enumerate(calls):
        if call.name == "note":
            saves += call.path == COMMITTED
        else:
            _apply(disk, call._replace(path=call.path[len(root) :], target=call.target[len(root) :]))
        survivors = disk.survivors()
        if saves and max(survivors, default=-1) < saves - 1:
            problems.append(f"cut after call {index}: {saves} saves are reported, only {sorted(survivors)} survive")
    return len(calls), problems


def power_cuts(system: type[System]) -> Cell:
    """Cuts the power at every call, with a run folder made by the saves, or by another writer without a sync."""
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
            with contextlib.suppress(KeyError):  # the log includes failed calls, such as mkdir without a parent folder
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
