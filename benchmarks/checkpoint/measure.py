"""Measures times in interleaved rounds of all systems, and peak memory in a separate process per system.

Systems are compared within a round, because the speed of a machine drifts. Each round has another random order, because
writes take longer after those of some systems. Before each turn the previous files are deleted and all other writes are
flushed to the disk. A restore reads the file just written, from the page cache.
"""

from __future__ import annotations

import gc
import json
import os
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.checkpoint.systems import SYSTEMS, FxtrainUnreserved, Memcpy, Problem, System
from benchmarks.child import resident

Key = tuple[int, int, str]  # size, leaves, system
Seconds = dict[Key, dict[str, list[float]]]  # seconds of each round, by measure


def measure_seconds(size: int, leaf_counts: Sequence[int], rounds: int, root: pathlib.Path) -> Seconds:
    """Measures every system once per round, with every number of leaves."""
    problems = [Problem.make(size, leaves) for leaves in leaf_counts]
    seconds: Seconds = {}
    order = random.Random(0)
    for system in SYSTEMS:  # excludes one-time costs, such as imports and thread creation
        one_turn(system, Problem.make(10**6, 2), root, check=True)
    for turn in range(rounds):
        for problem in problems:
            for system in order.sample(SYSTEMS, len(SYSTEMS)):
                taken = one_turn(system, problem, root, check=turn == 0)
                kept = seconds.setdefault((size, problem.leaves, system.name), {})
                for measure, value in taken.items():
                    kept.setdefault(measure, []).append(value)
        print(f"{size / 1e6:g} MB: round {turn + 1} of {rounds} done", file=sys.stderr)
    return seconds


def one_turn(system: type[System], problem: Problem, root: pathlib.Path, *, check: bool) -> dict[str, float]:
    """Returns the seconds of a first save, a later save, its commit, and a restore."""
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
            raise AssertionError(f"expected {system.name} to restore the saved values, got different ones.")
    finally:
        made.close()
        made.clear()
    return {"first": first, "later": later, "committed": committed, "restore": restore}


def settle(system: System) -> None:
    """Resets files, pending disk writes and free memory, so that all systems start from the same conditions.

    Touches memory, because a virtual machine waits for its host at the first use of a page, much longer than a copy
    of the page takes.
    """
    system.clear()
    os.sync()
    gc.collect()
    torch.ones(3 * system.problem.size, dtype=torch.uint8)


def timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


Memory = dict[Key, list[float]]  # peak extra memory of the first and a later save, in multiples of the state's size


def measure_memory(size: int, leaf_counts: Sequence[int], folder: str | None) -> Memory:
    """Measures the peak memory of each system in a separate process.

    Reserved buffers are included, so ``FxtrainUnreserved`` is not measured separately.
    """
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
    """Returns the peak memory of a first save, including its preparation, and of a later save."""
    warm = system(root / "warm", Problem.make(1000, 1))  # excludes one-time costs, such as imports and thread creation
    warm.prepare()
    warm.save()
    warm.wait()
    warm.close()
    made = system(root / "measured", Problem.make(size, leaves))
    gc.collect()
    before = resident("VmRSS")
    peaks = []
    for prepare in (True, False):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        if prepare:
            made.prepare()
        made.save()
        made.wait()
        peaks.append((resident("VmHWM") - before) / size)
        settle(made)
    made.close()
    return peaks
