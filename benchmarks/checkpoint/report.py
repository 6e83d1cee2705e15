"""Reports the measurements as markdown, with a list of passed and failed criteria."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Sequence
from importlib import metadata

from benchmarks.checkpoint.measure import Memory, Seconds
from benchmarks.checkpoint.systems import SYSTEMS, Fxtrain, Memcpy, OrbaxAsync, TorchSave
from benchmarks.report import spread
from benchmarks.report import table as markdown

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
MEASURES = ("first", "later", "committed", "restore")


@dataclasses.dataclass(frozen=True)
class Criterion:
    """One criterion of the guarantee R10: a ratio with an upper limit."""

    text: str
    ratios: list[float]  # one per round
    limit: float

    def __str__(self) -> str:
        passed = statistics.median(self.ratios) <= self.limit
        return f"- {'pass' if passed else 'FAIL'}: {self.text}: {spread(self.ratios, 2)}, limit {self.limit}"


def criteria(seconds: Seconds, memory: Memory, size: int, leaf_counts: Sequence[int]) -> list[Criterion]:
    """Returns the criteria for one size of the state. Each compares the median of the ratios within rounds."""
    few, many = min(leaf_counts), max(leaf_counts)

    def ratios(measure: str, leaves: int, others: list[float]) -> list[float]:
        return [a / b for a, b in zip(seconds[size, leaves, Fxtrain.name][measure], others, strict=True)]

    found = []
    blocked = (("later", "later saves"), ("first", "first save, reserved"))
    for leaves in leaf_counts:
        for measure, text in blocked:
            text = f"(a) blocked, {text}, {leaves} leaves / one memcpy"
            copied = seconds[size, leaves, Memcpy.name][measure]
            found.append(Criterion(text, ratios(measure, leaves, copied), 2.0))
    for measure, text in blocked:
        others = seconds[size, few, Fxtrain.name][measure]
        found.append(Criterion(f"(b) blocked, {text}, {many} leaves / {few}", ratios(measure, many, others), 2.0))
    rivals = {name: seconds[size, few, name]["committed"] for name in (OrbaxAsync.name, TorchSave.name)}
    better = min(rivals, key=lambda name: statistics.median(rivals[name]))
    found.append(Criterion(f"(c) committed, {few} leaves / {better}", ratios("committed", few, rivals[better]), 1.3))
    others = seconds[size, many, OrbaxAsync.name]["committed"]
    text = f"(d) committed, {many} leaves / {OrbaxAsync.name}"
    found.append(Criterion(text, ratios("committed", many, others), 0.6))
    for leaves in leaf_counts:
        peak = max(memory[size, leaves, Fxtrain.name])
        found.append(Criterion(f"(e) peak extra memory, {leaves} leaves / the state", [peak], 1.1))
        text = f"(f) restore, verified, {leaves} leaves / torch.load"
        others = seconds[size, leaves, TorchSave.name]["restore"]
        found.append(Criterion(text, ratios("restore", leaves, others), 1.3))
    return found


def table(seconds: Seconds, memory: Memory, size: int, leaves: int) -> list[str]:
    """Returns a markdown table of medians, with quartiles in parentheses."""
    heads = ("system", "blocked, first", "blocked, later", "committed", "restore", "memory, first", "memory, later")
    rows: list[tuple[str, ...]] = [heads]
    for name in (system.name for system in SYSTEMS):
        taken = seconds[size, leaves, name]
        cells = [spread(taken[measure], 3) if measure in taken else "" for measure in MEASURES]
        peaks = memory.get((size, leaves, name), ())
        rows.append((name, *cells, *([f"{peak:.2f}" for peak in peaks] or ["", ""])))
    return markdown(rows)


def report(seconds: Seconds, memory: Memory, sizes: Sequence[int], leaf_counts: Sequence[int], head: str) -> str:
    lines = ["## Checkpoints", "", head, ""]
    for size in sizes:
        for leaves in leaf_counts:
            lines += [f"### {shown_size(size)} in {leaves} leaves", "", *table(seconds, memory, size, leaves), ""]
        lines += [f"R10 at {shown_size(size)} (fxtrain in the background, reserved):", ""]
        lines += [*map(str, criteria(seconds, memory, size, leaf_counts)), ""]
    return "\n".join(lines)


def heading(rounds: int, root: pathlib.Path) -> str:
    """Describes the machine, the versions and the measures."""
    packages = ("torch", "orbax-checkpoint", "safetensors", "numpy")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    return (
        f"{time.strftime('%Y-%m-%d')}; {os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}, file "
        f"system {file_system(root)}; Python {platform.python_version()}, {versions}; one torch thread; {rounds} "
        "rounds. Times are in seconds, medians (and quartiles). `blocked`: until training can continue. `committed`: "
        "until a later save is on the disk. safetensors does not sync its file, and its restore only maps it. Only "
        "fxtrain verifies the restored data. Memory: the peak beyond the state, including buffers, in multiples of the "
        "state's size. Write times of a virtual machine vary, because its host may have to provide memory for a "
        "growing page cache: the same 100 MB took 0.05 s or 0.22 s under equal conditions, and 0.22 s more often while "
        "a copy was held in memory."
    )


def file_system(folder: pathlib.Path) -> str:
    mounts = [line.split()[1:3] for line in pathlib.Path("/proc/mounts").read_text().splitlines()]
    above = [(len(point), kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return max(above)[1]


def shown_size(size: int) -> str:
    unit = next(unit for unit in reversed(UNITS) if size >= UNITS[unit])
    return f"{size / UNITS[unit]:g} {unit}"
