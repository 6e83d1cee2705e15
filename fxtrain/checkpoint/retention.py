"""Retention: which checkpoints of a run there are, and which of them are kept."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

_NAME = re.compile(r"(\d{8,})-step-(\d{9,})")
UNREADABLE = "unreadable-"


class Entry(NamedTuple):
    """A committed checkpoint. The sequence number orders them: after a rewind a later one has a smaller step."""

    sequence: int
    step: int
    path: pathlib.Path


class Policy(NamedTuple):
    """What is kept; see ``checkpointer``."""

    keep: int | None
    keep_every: int | None
    best: str | None
    mode: str

    def best_of(self, entries: Sequence[Entry], metrics: Callable[[Entry], dict[str, float]]) -> Entry | None:
        """The entry with the best metric; of several the first. A NaN is never the best."""
        if self.best is None:
            return None
        sign = 1 if self.mode == "min" else -1
        scored = [(sign * value, entry) for entry in entries if (value := metrics(entry).get(self.best)) is not None]
        return min((pair for pair in scored if pair[0] == pair[0]), default=(0, None), key=lambda pair: pair[0])[1]

    def to_delete(self, entries: Sequence[Entry], metrics: Callable[[Entry], dict[str, float]]) -> list[Entry]:
        """What is not kept, oldest first. The newest always is."""
        newest = {entry.step: entry for entry in entries}
        kept = set(entries if self.keep is None else entries[-self.keep :])
        if self.keep_every is not None:
            kept |= {entry for entry in entries if entry.step % self.keep_every == 0}
        best = self.best_of(entries, metrics)
        kept |= set() if best is None else {best}
        # Of one step the newer save counts, whatever the policy keeps.
        return [entry for entry in entries if entry not in kept or newest[entry.step] is not entry]


def name(sequence: int, step: int) -> str:
    """Of a checkpoint's folder."""
    return f"{sequence:08d}-step-{step:09d}"


def entries(folder: pathlib.Path) -> list[Entry]:
    """What is committed, oldest first."""
    return sorted(Entry(int(match[1]), int(match[2]), path) for match, path in _named(folder, ""))


def unreadable(folder: pathlib.Path) -> list[pathlib.Path]:
    """What was set aside."""
    return sorted(path for _, path in _named(folder, UNREADABLE))


def line(found: Sequence[Entry]) -> list[Entry]:
    """What led to the newest, newest first: without what a rewind has left behind.

    A run that goes back saves the state that it went back to, so whatever is older and has as many steps or more was
    abandoned.
    """
    led: list[Entry] = []
    for entry in reversed(found):
        if not led or entry.step < led[-1].step:
            led.append(entry)
    return led


def _named(folder: pathlib.Path, prefix: str) -> list[tuple[re.Match[str], pathlib.Path]]:
    try:
        paths = list(folder.iterdir())
    except FileNotFoundError:
        return []
    return [
        (match, path)
        for path in paths
        if path.name.startswith(prefix) and (match := _NAME.fullmatch(path.name.removeprefix(prefix)))
    ]
