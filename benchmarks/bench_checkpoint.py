"""What a checkpoint costs: how long training waits, until it is on disk, until it is back, and how much memory.

fxtrain beside Orbax, torch.save, safetensors and torch's distributed checkpoints (DCP), all in one run:

    python -m benchmarks.bench_checkpoint --sizes 100MB,1GB --leaves 10,2000 --rounds 5

Seconds come from rounds in which every system has its turn, in another order each time, because a machine's speed
drifts: medians and quartiles are shown, and two systems are compared within each round. Before each turn the files of
the one before are deleted and all else is brought to the disk; a restore reads what was just written, from the page
cache. Memory is measured in a process of its own for each system, so that none hides another's peak.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import logging
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

import fxtrain as fx

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
MEASURES = ("first", "later", "committed", "restore")


# What is saved


@dataclasses.dataclass(frozen=True)
class Problem:
    """A state of ``leaves`` equal parameters of random float32. The others get its parameters alone."""

    size: int  # bytes
    leaves: int
    state: fx.TrainState

    @classmethod
    def make(cls, size: int, leaves: int) -> Problem:
        generator = torch.Generator().manual_seed(0)
        params = {f"w{i:05d}": torch.randn(size // leaves // 4, generator=generator) for i in range(leaves)}
        return cls(size, leaves, fx.init({}).replace(params=params))  # init would copy the tensors

    @functools.cached_property
    def like(self) -> fx.TrainState:
        return fx.tree.map(lambda leaf: leaf.to("meta"), self.state)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.state.params


# By whom. Each system has the same verbs: prepare, save (returns when training may go on), wait (until it is on the
# disk), restore, close.


class System:
    """Up to ``restore`` it costs time that is measured; ``prepare``, ``close`` and ``clear`` are left out."""

    name: str

    def __init__(self, folder: pathlib.Path, problem: Problem) -> None:
        self.folder, self.problem = folder, problem
        self.path = folder / "checkpoint"
        folder.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        """What a run does once, before its first step."""

    def save(self) -> None:
        raise NotImplementedError

    def wait(self) -> None:
        """Nothing, for systems that return when all is written."""

    def restore(self) -> dict[str, Any]:
        raise NotImplementedError

    def close(self) -> None:
        """Frees what it holds."""

    def clear(self) -> None:
        """Deletes what it has written, but for locks."""
        for path in self.folder.glob("[!.]*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class Fxtrain(System):
    name = "fxtrain, background"
    reserved = True

    def prepare(self) -> None:
        self.checkpoints = fx.checkpointer(self.folder)
        if self.reserved:
            self.checkpoints.reserve(self.problem.state)  # as fit does

    def save(self) -> None:
        self.checkpoints.save(self.problem.state)

    def wait(self) -> None:
        self.checkpoints.wait()

    def restore(self) -> dict[str, Any]:
        (path,) = self.folder.glob("*-step-*")
        return fx.restore(path, like=self.problem.like).params

    def close(self) -> None:
        self.checkpoints.close()


class FxtrainUnreserved(Fxtrain):
    name = "fxtrain, not reserved"
    reserved = False


class FxtrainSync(System):
    name = "fxtrain, fx.save"

    def save(self) -> None:
        fx.save(self.path, self.problem.state)

    def restore(self) -> dict[str, Any]:
        return fx.restore(self.path, like=self.problem.like).params


class OrbaxSync(System):
    name = "Orbax, sync"

    def prepare(self) -> None:
        import orbax.checkpoint as ocp

        self.ocp = ocp
        self.checkpointer = self.make()

    def make(self) -> Any:
        return self.ocp.Checkpointer(self.ocp.PyTreeCheckpointHandler())

    def save(self) -> None:
        arrays = {name: leaf.numpy() for name, leaf in self.problem.tensors.items()}
        self.checkpointer.save(self.path, args=self.ocp.args.PyTreeSave(arrays))

    def restore(self) -> dict[str, Any]:
        return {name: torch.from_numpy(array) for name, array in self.checkpointer.restore(self.path).items()}

    def close(self) -> None:
        self.checkpointer.close()


class OrbaxAsync(OrbaxSync):
    name = "Orbax, async"

    def make(self) -> Any:
        return self.ocp.AsyncCheckpointer(self.ocp.PyTreeCheckpointHandler())

    def wait(self) -> None:
        self.checkpointer.wait_until_finished()


class TorchSave(System):
    name = "torch.save + fsync"

    def save(self) -> None:
        torch.save(self.problem.tensors, self.path)
        for path in (self.path, self.folder):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def restore(self) -> dict[str, Any]:
        return torch.load(self.path)


class Safetensors(System):
    name = "safetensors (no fsync)"

    def save(self) -> None:
        from safetensors.torch import save_file

        save_file(self.problem.tensors, self.path)

    def restore(self) -> dict[str, Any]:
        from safetensors.torch import load_file

        return load_file(self.path)


class DCPSync(System):
    name = "DCP, sync"

    def prepare(self) -> None:
        import torch.distributed.checkpoint as dcp

        self.dcp = dcp

    def save(self) -> None:
        self.dcp.save(self.problem.tensors, checkpoint_id=self.path)

    def restore(self) -> dict[str, Any]:
        target = {name: torch.empty_like(leaf) for name, leaf in self.problem.tensors.items()}
        self.dcp.load(target, checkpoint_id=self.path)
        return target


class DCPAsync(DCPSync):
    name = "DCP, async"

    def save(self) -> None:
        self.future = self.dcp.async_save(self.problem.tensors, checkpoint_id=self.path)

    def wait(self) -> None:
        self.future.result()


class Memcpy(System):
    """The measure of what blocks: one copy of as many bytes, under the conditions that all the others have.

    After so much was written to a disk, a virtual machine's memory is not all at hand, and a copy is slower than one
    of the same memory a moment later.
    """

    name = "one memcpy"

    def prepare(self) -> None:
        self.source = torch.ones(self.problem.size // 4)
        self.target = torch.zeros(self.problem.size // 4)

    def save(self) -> None:
        self.target.copy_(self.source)

    def wait(self) -> None:
        with open(self.path, "wb") as file:
            file.write(self.target.numpy().data)
            os.fsync(file.fileno())

    def restore(self) -> dict[str, Any]:
        return self.problem.tensors


FXTRAIN = (Fxtrain, FxtrainUnreserved, FxtrainSync)
SYSTEMS: tuple[type[System], ...] = (Memcpy, *FXTRAIN, OrbaxSync, OrbaxAsync, TorchSave, Safetensors, DCPSync, DCPAsync)


# Seconds

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
        print(f"{shown_size(size)}: round {turn + 1} of {rounds} done", file=sys.stderr)
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


# Memory

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
            command = [sys.executable, "-m", "benchmarks.bench_checkpoint", *options]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            memory[size, leaves, system.name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{shown_size(size)}: memory with {leaves} leaves done", file=sys.stderr)
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
    before = memory_in_use("VmRSS")
    peaks = []
    for prepare in (True, False):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        if prepare:
            made.prepare()
        made.save()
        made.wait()
        peaks.append((memory_in_use("VmHWM") - before) / size)
        settle(made)
    made.close()
    return peaks


def memory_in_use(which: str) -> int:
    """Bytes: ``VmRSS``, now, or ``VmHWM``, the peak since it was forgotten."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:"))


# What it comes to


@dataclasses.dataclass(frozen=True)
class Criterion:
    """One of what issue 3 asks for as R10: a ratio that is to stay below its limit."""

    text: str
    ratios: list[float]  # one for each round
    limit: float

    def __str__(self) -> str:
        passed = statistics.median(self.ratios) <= self.limit
        return f"- {'pass' if passed else 'FAIL'}: {self.text}: {spread(self.ratios, 2)}, wanted at most {self.limit}"


def criteria(seconds: Seconds, memory: Memory, size: int, leaf_counts: Sequence[int]) -> list[Criterion]:
    """Of one size. Ratios are taken within each round, and their median counts."""
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
    """Markdown. Medians, and quartiles in parentheses."""
    heads = ("system", "blocked, first", "blocked, later", "committed", "restore", "memory, first", "memory, later")
    rows = [heads, ("---", *["---:"] * (len(heads) - 1))]
    for name in (system.name for system in SYSTEMS):
        taken = seconds[size, leaves, name]
        cells = [spread(taken[measure], 3) if measure in taken else "" for measure in MEASURES]
        peaks = memory.get((size, leaves, name), ())
        rows.append((name, *cells, *([f"{peak:.2f}" for peak in peaks] or ["", ""])))
    return ["| " + " | ".join(row) + " |" for row in rows]


def spread(values: Sequence[float], digits: int) -> str:
    """The median, and the quartiles where there are some."""
    middle = f"{statistics.median(values):.{digits}f}"
    if len(values) < 2:
        return middle
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle} ({low:.{digits}f} to {high:.{digits}f})"


def report(seconds: Seconds, memory: Memory, sizes: Sequence[int], leaf_counts: Sequence[int], head: str) -> str:
    lines = ["## Checkpoints", "", head, ""]
    for size in sizes:
        for leaves in leaf_counts:
            lines += [f"### {shown_size(size)} in {leaves} leaves", "", *table(seconds, memory, size, leaves), ""]
        lines += [f"R10 at {shown_size(size)} (fxtrain in the background, reserved):", ""]
        lines += [*map(str, criteria(seconds, memory, size, leaf_counts)), ""]
    return "\n".join(lines)


def heading(rounds: int, root: pathlib.Path) -> str:
    """What the numbers hold for."""
    packages = ("torch", "orbax-checkpoint", "safetensors", "numpy")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    return (
        f"{time.strftime('%Y-%m-%d')}; {os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}, file "
        f"system {file_system(root)}; Python {platform.python_version()}, {versions}; one torch thread; {rounds} "
        "rounds. Seconds: medians (and quartiles). `blocked`: until training may go on; `committed`: until all is on "
        "the disk, of a later save. safetensors does not bring it there, and its restore only maps the file. fxtrain's "
        "alone verifies what it reads. Memory: the peak beyond the state, in sizes of the state, buffers included."
    )


def file_system(folder: pathlib.Path) -> str:
    mounts = [line.split()[1:3] for line in pathlib.Path("/proc/mounts").read_text().splitlines()]
    above = [(len(point), kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return max(above)[1]


def shown_size(size: int) -> str:
    unit = next(unit for unit in reversed(UNITS) if size >= UNITS[unit])
    return f"{size / UNITS[unit]:g} {unit}"


# The command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="100MB,1GB", help="of the states, such as 100MB,1GB")
    parser.add_argument("--leaves", default="10,2000", help="into how many leaves, such as 10,2000")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="20MB, 10 and 200 leaves, 2 rounds: whether it works")
    parser.add_argument("--folder", help="where to write; a disk, and no memory file system, for numbers that count")
    parser.add_argument("--write", metavar="PATH", help="append the report to this file too")
    parser.add_argument("--memory-of", metavar="SYSTEM", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.quick:
        given.sizes, given.leaves, given.rounds = "20MB", "10,200", 2
    sizes = [bytes_in(text) for text in given.sizes.split(",")]
    leaf_counts = [int(text) for text in given.leaves.split(",")]

    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Orbax starts a JAX backend
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process, as is meant
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="bench-checkpoint-") as folder:
        root = pathlib.Path(folder)
        if given.memory_of is not None:
            system = next(system for system in SYSTEMS if system.__name__ == given.memory_of)
            print(json.dumps(memory_of(system, sizes[0], leaf_counts[0], root)))
            return
        seconds, memory = {}, {}
        for size in sizes:
            seconds |= measure_seconds(size, leaf_counts, given.rounds, root)
            memory |= measure_memory(size, leaf_counts, given.folder)
        text = report(seconds, memory, sizes, leaf_counts, heading(given.rounds, root))
    print(text)
    if given.write is not None:
        with open(given.write, "a") as file:
            file.write(f"{text}\n")


def bytes_in(text: str) -> int:
    if text[-2:].upper() not in UNITS:
        raise ValueError(f"{text!r}: a size such as 100MB is wanted; the units are {', '.join(UNITS)}.")
    return round(float(text[:-2]) * UNITS[text[-2:].upper()])


if __name__ == "__main__":
    main()
