"""HTML of the checkpoints of a run."""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Sequence

from fxtrain.checkpoint._errors import CheckpointError
from fxtrain.checkpoint._files import open_regular
from fxtrain.checkpoint._manifest import MANIFEST
from fxtrain.checkpoint._retention import Entry, RetentionPolicy
from fxtrain.core import format_bytes, format_number, pluralize
from fxtrain.core._html import Number, left_out, table, view

_MAX_READ = 500  # checkpoints, the newest
_MAX_SHOWN = 20  # the newest of these, and the best
_MAX_METRICS = 4
_MAX_HEAD = 2**16  # bytes of a manifest's first line


def checkpoints_view(title: str, entries: Sequence[Entry], policy: RetentionPolicy) -> str:
    """Returns the HTML of checkpoints: steps, roles, times, sizes and metrics.

    Args:
        title: The title.
        entries: The checkpoints of one run, oldest first.
        policy: The retention policy, which defines the best checkpoint.
    """
    read = entries[-_MAX_READ:]
    metrics = {entry: _metrics(entry) for entry in read}
    sizes = {entry: _size(entry) for entry in read}
    best = policy.best_of(read, metrics.__getitem__)
    latest = next((entry for entry in reversed(read) if entry.role != "snapshot"), None)
    newest = read[-_MAX_SHOWN:]
    shown = newest if best is None or best in newest else [best, *newest[1:]]
    names = sorted({name for entry in shown for name in metrics[entry]}, key=lambda name: (name != policy.best, name))
    names = names[:_MAX_METRICS]
    rows = [
        (
            entry.step,
            ", ".join([entry.role, *(["latest"] if entry is latest else []), *(["best"] if entry is best else [])]),
            _time(entry),
            Number(format_bytes(sizes[entry])),
            *(Number(format_number(metrics[entry][name])) if name in metrics[entry] else "" for name in names),
        )
        for entry in reversed(shown)
    ]
    drawn = table(("step", "role", "saved", "size", *names), rows) if rows else ""
    whole = f", {format_bytes(sum(sizes.values()))}" if len(read) == len(entries) else ""
    note = pluralize(len(entries), "checkpoint") + whole if entries else "no checkpoints"
    return view(title, drawn, left_out(len(entries) - len(shown), "checkpoint"), note=note)


def _metrics(entry: Entry) -> dict[str, float]:
    """Returns the metrics in the head of a manifest, which is not verified, or none if it cannot be read."""
    try:
        descriptor = open_regular(entry.path / MANIFEST)
        try:
            head = json.loads(os.read(descriptor, _MAX_HEAD).partition(b"\n")[0])
        finally:
            os.close(descriptor)
        return {str(name): float(value) for name, value in head["metrics"].items()}
    except (OSError, CheckpointError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _size(entry: Entry) -> int:
    try:
        return sum(file.stat(follow_symlinks=False).st_size for file in os.scandir(entry.path))
    except OSError:  # deleted meanwhile
        return 0


def _time(entry: Entry) -> str:
    try:
        seconds = entry.path.stat().st_mtime
    except OSError:
        return ""
    return f"{datetime.datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}" if math.isfinite(seconds) else ""
