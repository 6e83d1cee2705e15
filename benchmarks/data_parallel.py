"""Measures the step time of two data parallel processes of the small GPT, next to DistributedDataParallel.

    python -m benchmarks --only data_parallel

The processes take the turns of all contestants in the same order, each process on a core of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

import fxtrain as fx
from benchmarks.bars import Verdict
from benchmarks.measure import Seconds, alternate, fastest, ratios
from benchmarks.workloads import Workload, workload

RANKS = 2
FXTRAIN, ALONE = "fxtrain", "fxtrain, one process with the examples of one rank"
DDP, DDP_COMPILED = "DistributedDataParallel", "DistributedDataParallel, compiled"

ABOUT = (
    "4 layers, width 128, vocabulary 512, 8 x 64 tokens of which each of two processes has half; gloo; AdamW, fused "
    "for DistributedDataParallel; one thread and one core per process. Times are those of rank 0."
)
REASON = (
    "Most of a step is computation, which takes the same time in one process (the last row). The ratio also depends on "
    "how long gloo waits for the slower of the two processes."
)


def main(*, rounds: int, quick: bool) -> tuple[Seconds, list[Verdict]]:
    """Returns the seconds per step and the verdict."""
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        path = pathlib.Path(folder, "seconds.json")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        job = ["-m", "benchmarks.data_parallel", f"--rounds={rounds}", f"--write={path}", *["--quick"] * quick]
        subprocess.run([*launch, *job], check=True)
        seconds: Seconds = json.loads(path.read_text())
    best = fastest(seconds, (DDP, DDP_COMPILED))
    measured = ratios(seconds[FXTRAIN], seconds[best])
    return seconds, [Verdict(f"Data parallel GPT, time per step, relative to {best}", measured, 0.75, REASON)]


def joined() -> fx.distributed.Mesh:
    """Returns the ranks. Leaves this process one core and one thread."""
    mesh = fx.distributed.mesh()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[mesh.rank % len(cores)]})
    torch.set_num_threads(1)
    return mesh


def rank() -> None:
    """Runs one of the processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--write", type=pathlib.Path, required=True)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    mesh = joined()

    made = workload("small_gpt", quick=given.quick)
    rows = fx.distributed.rows(made.batches, mesh)
    batches = [rows[index] for index in range(len(made.batches))]
    turns = {
        FXTRAIN: of_fxtrain(made, batches, mesh),
        DDP: of_ddp(made, batches, compiled=False),
        DDP_COMPILED: of_ddp(made, batches, compiled=True),
        ALONE: of_fxtrain(made, batches, None),
    }
    seconds = alternate({name: functools.partial(timed, turn, mesh) for name, turn in turns.items()}, given.rounds)
    if mesh.is_main:
        given.write.write_text(json.dumps(seconds))
    torch.distributed.destroy_process_group()


Turn = Callable[[], int]
"""Takes steps, and returns their number."""


def timed(turn: Turn, mesh: fx.distributed.Mesh) -> float:
    """Returns the seconds per step of a turn, which begins on all ranks together."""
    mesh.gather(None, "the begin of a turn")
    began = time.perf_counter()
    count = turn()
    return (time.perf_counter() - began) / count


def of_fxtrain(made: Workload, batches: list[Any], mesh: fx.distributed.Mesh | None) -> Turn:
    tx = fx.optim.adamw(made.learning_rate, weight_decay=made.weight_decay)
    step = fx.train_step(lambda model, batch: made.loss(model(batch["x"]), batch["y"]), tx, mesh=mesh)
    compiled, taken = fx.compile(step, donate=True), [fx.init(made.module(), tx)]

    def turn() -> int:
        state = taken.pop()
        for batch in batches:
            state, _ = compiled(state, batch)
        taken.append(state)
        return len(batches)

    turn()
    return turn


def of_ddp(made: Workload, batches: list[Any], *, compiled: bool) -> Turn:
    module = made.module()
    model: Any = DistributedDataParallel(module)
    model = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(module.parameters(), made.learning_rate, weight_decay=made.weight_decay, fused=True)

    def turn() -> int:
        for batch in batches:
            optimizer.zero_grad()
            made.loss(model(batch["x"]), batch["y"]).backward()
            optimizer.step()
        return len(batches)

    turn()
    return turn


if __name__ == "__main__":
    rank()
