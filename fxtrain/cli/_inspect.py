"""The command ``fxtrain inspect``, which shows what checkpoints contain, verifies them, and compares two."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import pathlib
from collections.abc import Sequence
from typing import Annotated

import tyro

from fxtrain.checkpoint import DamagedError
from fxtrain.checkpoint._leaf_files import LeafFiles
from fxtrain.checkpoint._leaf_table import Leaf, slices_of
from fxtrain.checkpoint._manifest import MANIFEST, Manifest, read_manifest
from fxtrain.checkpoint._retention import entries, listed
from fxtrain.cli._arguments import Configurable, parse
from fxtrain.cli._errors import EXIT_FAILURE, CommandError
from fxtrain.core import format_bytes, format_number, pluralize, printable
from fxtrain.core._state_diff import LeafDiff, StateDiff, leaf_diff
from fxtrain.report._folder import reason

_CHECKPOINTS = "checkpoints"  # the folder in that of a run
_SLOTS = "state.slots"


@dataclasses.dataclass(frozen=True)
class Options(Configurable):
    """Shows the tree of a checkpoint with dtypes and shapes, and verifies the checksum of each leaf.

    With a second checkpoint, shows the leaves that differ.

    Example: fxtrain inspect runs/lm-20250101-120000 runs/lm-20250102-090000

    Exit codes: 0 if the checkpoint is intact, and equal to the other one; 1 if it is damaged or they differ; 2 if there
    is no checkpoint.
    """

    checkpoint: Annotated[pathlib.Path, tyro.conf.Positional]
    """A checkpoint, or a folder of checkpoints or of a run, of which the newest is shown."""
    other: Annotated[pathlib.Path | None, tyro.conf.Positional] = None
    """A checkpoint to compare with, or such a folder."""
    verify: bool = True
    """Read all leaves and compare their checksums."""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    options = parse(Options, "inspect", arguments)
    path = _found(options.checkpoint)
    if options.other is not None:
        return _compare(path, _found(options.other))
    manifest = read_manifest(path)
    _print_others(path)
    _print_head(path, manifest)
    damaged = _damaged(path, manifest) if options.verify else None
    _print_integrity(damaged, len(manifest["leaves"]))
    _print_tree(manifest["leaves"], frozenset(damaged or ()))
    return EXIT_FAILURE if damaged else 0


def _found(path: pathlib.Path) -> pathlib.Path:
    """Returns the checkpoint at a path, or the newest one in the folder."""
    expected = f"expected a checkpoint, a folder of checkpoints or the folder of a run, got {path}"
    try:
        names = {each.name for each in path.iterdir()}
    except (OSError, ValueError) as error:
        raise CommandError(f"{expected} ({reason(error)}). Check the path.") from None
    if MANIFEST in names:
        return path
    folder = path / _CHECKPOINTS if _CHECKPOINTS in names else path
    found = listed(entries(folder))
    if not found:
        raise CommandError(f"{expected}, which has no checkpoint. Check the path.")
    return found[-1].path


def _print_others(path: pathlib.Path) -> None:
    others = listed(entries(path.parent))
    if len(others) > 1:
        steps = ", ".join(str(entry.step) for entry in others)
        print(f"folder      {printable(str(path.parent))} has checkpoints of the steps {steps}")


def _print_head(path: pathlib.Path, manifest: Manifest) -> None:
    saved = datetime.datetime.fromtimestamp(manifest["time"])
    rows = {
        "checkpoint": str(path),
        "step": "none" if manifest["step"] is None else str(manifest["step"]),
        "run": f"{manifest['run']}, {manifest['role']}" if manifest["run"] else "none",
        "saved": f"{saved:%Y-%m-%d %H:%M:%S}",
        "metrics": ", ".join(f"{name} {format_number(value)}" for name, value in manifest["metrics"].items()) or "none",
        "environment": ", ".join(f"{name} {value}" for name, value in manifest["environment"].items()),
        "size": f"{format_bytes(manifest['bytes'])} in {pluralize(len(manifest['leaves']), 'leaf', 'leaves')}"
        + _parts(manifest["leaves"]),
        "slots": ", ".join(_slots(manifest["leaves"])) or "none",
    }
    for name, text in rows.items():
        print(f"{name:<12}{printable(text)}")


def _parts(leaves: Sequence[Leaf]) -> str:
    count = len({piece["part"] for leaf in leaves for piece in slices_of(leaf)})
    return f", written by {count} ranks" if count > 1 else ""


def _slots(leaves: Sequence[Leaf]) -> list[str]:
    found = (leaf["entries"] for leaf in leaves)
    return list(dict.fromkeys(str(each[1][1]) for each in found if len(each) > 1 and each[0][1] == "slots"))


def _damaged(path: pathlib.Path, manifest: Manifest) -> list[str]:
    """Returns the paths of leaves whose bytes differ from those written."""
    damaged: list[str] = []
    with contextlib.closing(LeafFiles(path, manifest)) as files:
        for leaf in manifest["leaves"]:
            try:
                files.verify(leaf)
            except DamagedError:
                damaged.append(leaf["path"])
    return damaged


def _print_integrity(damaged: list[str] | None, count: int) -> None:
    if damaged is None:
        text = "not verified"
    elif damaged:
        text = f"damaged: {pluralize(len(damaged), 'leaf', 'leaves')} of {count:,}, marked below. Restore another one."
    else:
        text = f"intact: the checksums of {pluralize(count, 'leaf', 'leaves')} match"
    print(f"integrity   {text}\n")


def _print_tree(leaves: Sequence[Leaf], damaged: frozenset[str]) -> None:
    """Prints the leaves, grouped by the first part of their paths and by slot."""
    groups: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        groups.setdefault(_group(leaf), []).append(leaf)
    for name, found in groups.items():
        size = format_bytes(sum(leaf["bytes"] for leaf in found))
        alone = len(found) == 1 and found[0]["path"] == name
        what = _kind(found[0]) if alone else f"{pluralize(len(found), 'leaf', 'leaves')}, {size}"
        print(printable(f"{name}  {what}") + _mark(found[0], damaged) * alone)
        rows = [] if alone else [(leaf["path"].removeprefix(name), leaf) for leaf in found]
        width = max((len(text) for text, _ in rows), default=0)
        for text, leaf in rows:
            print(f"  {printable(text):<{width}}  {_kind(leaf)}{_mark(leaf, damaged)}")


def _group(leaf: Leaf) -> str:
    keys = [key for _, key in leaf["entries"]]
    if keys[:1] == ["slots"] and len(keys) > 1:
        return f"{_SLOTS}[{keys[1]!r}]"
    root = leaf["path"].partition(".")[0].partition("[")[0]
    kinds = [kind for kind, _ in leaf["entries"]]
    return f"{root}.{keys[0]}" if kinds[:1] == ["attribute"] else root


def _kind(leaf: Leaf) -> str:
    return f"{leaf['dtype']} {leaf['shape']}"


def _mark(leaf: Leaf, damaged: frozenset[str]) -> str:
    return "  damaged" if leaf["path"] in damaged else ""


def _compare(path: pathlib.Path, other: pathlib.Path) -> int:
    diff = _diff(path, other)
    print(f"this        {printable(str(path))}")
    print(f"other       {printable(str(other))}\n")
    print(diff)
    return EXIT_FAILURE if diff else 0


def _diff(path: pathlib.Path, other: pathlib.Path) -> StateDiff:
    """Returns the difference of two checkpoints. Only leaves with different checksums are read."""
    manifests = read_manifest(path), read_manifest(other)
    mine, others = ({leaf["path"]: leaf for leaf in manifest["leaves"]} for manifest in manifests)
    found: list[LeafDiff] = []
    with (
        contextlib.closing(LeafFiles(path, manifests[0])) as new,
        contextlib.closing(LeafFiles(other, manifests[1])) as old,
    ):
        for name in {**mine, **others}:
            one, two = mine.get(name), others.get(name)
            if one is None or two is None:
                this, that = ("missing" if leaf is None else _kind(leaf) for leaf in (one, two))
                found.append(LeafDiff(name, "structure", this, that))
            elif _content(one) != _content(two):
                diff = leaf_diff(name, new.read(one), old.read(two))
                found += [] if diff is None else [diff]
    return StateDiff(tuple(found), compared=len({**mine, **others}))


def _content(leaf: Leaf) -> tuple[object, ...]:
    """Returns values that are equal only if two leaves are. Equal leaves in other slices have others."""
    slices = [(piece["start"], piece["xxh3"]) for piece in slices_of(leaf)]
    return leaf["dtype"], leaf["shape"], leaf.get("axis"), slices
