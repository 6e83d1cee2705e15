"""Measure: seconds in rounds where every system has its turn, and the peak of memory in a process for each.

A machine's speed drifts, so two systems are compared within a round. Before each turn the files of the one before are
deleted and all else is brought to the disk; a restore reads what was just written, from the page cache.
"""

from __future__ import annotations

import gc
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.checkpoint.systems import SYSTEMS, FxtrainUnreserved, Memcpy, Problem, System
from benchmarks.child import resident

Key = tuple[int, int, str]  # size, leaves, system
Seconds = dict[Key, dict[str, list[float]]]  # by measure, one for each round


def measure_seconds(size: int, leaf_counts: Sequence[int], rounds: int, root: pathlib.Path) -> Seconds:
    """Every system once a round, with every number of leaves."""
    problems = [Problem.make(size, leaves) for leaves in leaf_counts]
    seconds: Seconds = {}
    for system in SYSTEMS:  # imports, threads, and whatever else is there once
        one_turn(system, Problem.make(10**6, 2), root, check=True)
    for turn in range(rounds):
        for problem in problems:
            shift = turn % len(SYSTEMS)
            for system in SYSTEMS[shift:] + SYSTEMS[:shift]:
                taken = one_turn(system, problem, root, check=turn == 0)
                kept = seconds.setdefault((size, problem.leaves, system.name), {})
                for measure, value in taken.items():
                    kept.setdefault(measure, []).append(value)
        print(f"{size / 1e6:g} MB: round {turn + 1} of {rounds} done", file=sys.stderr)
    return seconds


def one_turn(system: type[System], problem: Problem, root: pathlib.Path, *, check: bool) -> dict[str, float]:
    """The first save, a later one, and a restore."""
    made = system(root / system.__name__, problem)
    try:
        made.prepare()
        settle(made)
        first = timed(made.save)
        made.wait()
        settle(made)
        later = timed(made.save)
        committed = later + timed(made.wait)
        os.sync()
        gc.collect()
        restored: dict[str, Any] = {}
        restore = timed(lambda: restored.update(made.restore()))
        if check and not all(torch.equal(restored[name], leaf) for name, leaf in problem.tensors.items()):
            raise AssertionError(f"{system.name} has restored something else than it saved.")
    finally:
        made.close()
        made.clear()
    return {"first": first, "later": later, "committed": committed, "restore": restore}


def settle(system: System) -> None:
    """The same start for all: nothing of a save before, nothing on its way to the disk, and memory at hand, because a
    virtual machine that uses a page for the first time waits for its host, ten times as long as the copy takes."""
    system.clear()
    os.sync()
    gc.collect()
    torch.ones(3 * system.problem.size, dtype=torch.uint8)


def timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


Memory = dict[Key, list[float]]  # of the first save and a later one: peak of extra memory, in sizes of the state


def measure_memory(size: int, leaf_counts: Sequence[int], folder: str | None) -> Memory:
    """Each system in a process of its own. To reserve is part of it, so there is one row of fxtrain's background."""
    memory: Memory = {}
    for leaves in leaf_counts:
        for system in SYSTEMS:
            if system in (FxtrainUnreserved, Memcpy):
                continue
            options = ["--memory-of", system.__name__, "--sizes", f"{size // 1000}KB", "--leaves", str(leaves)]
            options += [] if folder is None else ["--folder", folder]
            command = [sys.executable, "-m", "benchmarks.checkpoint", *options]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            memory[size, leaves, system.name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{size / 1e6:g} MB: memory with {leaves} leaves done", file=sys.stderr)
    return memory


def memory_of(system: type[System], size: int, leaves: int, root: pathlib.Path) -> list[float]:
    """In that process: the peaks while one first save, and one later, are made ready, made, and waited for."""
    warm = system(root / "warm", Problem.make(1000, 1))  # imports, threads, and whatever else is there once
    warm.prepare()
    warm.save()
    warm.wait()
    warm.close()
    made = system(root / "measured", Problem.make(size, leaves))
    gc.collect()
    before = resident("VmRSS")
    peaks = []
    for prepare in (True, False):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        if prepare:
            made.prepare()
        made.save()
        made.wait()
        peaks.append((resident("VmHWM") - before) / size)
        settle(made)
    made.close()
    return peaks
