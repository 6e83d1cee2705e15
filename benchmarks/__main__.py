"""Runs the benchmarks: ``python -m benchmarks`` runs all of them and writes ``benchmarks/RESULTS.md``.

A selection is printed instead of written. A quick run takes a few minutes and only shows that everything works:

    python -m benchmarks --only tiny_mlp,overhead --rounds 5
    python -m benchmarks --quick

On a GPU, contestants with CUDA graphs take part, and the report goes to ``benchmarks/RESULTS_GPU.md``:

    python -m benchmarks --device cuda --rounds 5

Use an idle machine. Contestants are stopped while they wait for their turn, but other processes disturb the timings.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
import time
from typing import Any

from benchmarks import (
    contestants,
    data_parallel,
    ensemble,
    first_step,
    memory,
    monitoring,
    overhead,
    sharded,
    workloads,
)
from benchmarks.race import Outcome, race
from benchmarks.report import report
from benchmarks.workloads import workload

HERE = pathlib.Path(__file__).parent
OTHERS = ("overhead", "monitoring", "first_step", "memory", "ensemble", "data_parallel", "sharded", "checkpoint")
QUICK = (contestants.FXTRAIN, contestants.EAGER, contestants.FLAX)


def main() -> None:
    given = options()
    rounds = given.rounds or (2 if given.quick else 20)
    on_gpu = given.device != "cpu"
    known = (*workloads.ON_GPU, "ensemble") if on_gpu else (*workloads.NAMES, *OTHERS)
    wanted = given.only.split(",") if given.only else known
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SystemExit(f"expected --only to name some of {', '.join(known)}, got {','.join(unknown)}.")

    results = HERE / ("RESULTS_GPU.md" if on_gpu else "RESULTS.md")
    path = given.write or (results if not given.only and not given.quick else None)
    text = ""
    outcomes: dict[str, Outcome] = {}
    others: dict[str, Any] = {}
    for name in wanted:
        began = time.perf_counter()
        if name in workloads.ON_GPU:
            outcomes[name] = race(
                name, contestants_of(name, given), rounds=rounds, quick=given.quick, device=given.device
            )
        else:
            others[name] = other(name, rounds, quick=given.quick, device=given.device)
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
        text = report(outcomes, others, rounds=rounds, quick=given.quick, device=given.device)
        if path is not None:
            # Written after each part, because all parts together take an hour.
            pathlib.Path(path).write_text(text)
    print(text)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", metavar="NAMES", help=f"comma-separated; some of {', '.join((*workloads.NAMES, *OTHERS))}"
    )
    parser.add_argument("--contestants", metavar="NAMES", help="comma-separated; parts of contestant names to select")
    parser.add_argument("--rounds", type=int, help="default: 20, or 2 for a quick run")
    parser.add_argument("--quick", action="store_true", help="small sizes, and few contestants except on tiny_mlp")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device of the workloads")
    parser.add_argument("--write", metavar="PATH", help="file of the report, also of a selection or a quick run")
    return parser.parse_args()


def contestants_of(name: str, given: argparse.Namespace) -> list[str]:
    """Returns the contestants of a workload."""
    peers = workload(name, quick=given.quick).peers
    available = contestants.ALL if given.device == "cpu" else contestants.ON_GPU
    names = [each for each in available if peers or each not in contestants.TRAINERS]
    # Only on the tiny MLP does the dispatch overhead exceed the computation.
    if name != "tiny_mlp" and contestants.EIGHT in names:
        names.remove(contestants.EIGHT)
    if given.contestants:
        parts = given.contestants.split(",")
        return [each for each in names if any(part in each for part in parts)]
    return [each for each in names if each in QUICK or name == "tiny_mlp"] if given.quick else names


def other(name: str, rounds: int, *, quick: bool, device: str) -> Any:
    if name == "overhead":
        return overhead.main(rounds=rounds, quick=quick)
    if name == "monitoring":
        return monitoring.main(rounds=rounds, quick=quick)
    if name == "first_step":
        return first_step.main(rounds=1 if quick else 2, quick=quick)
    if name == "memory":
        return memory.main(rounds=min(rounds, 10), quick=quick)
    if name == "ensemble":
        return ensemble.main(rounds=min(rounds, 7), quick=quick, device=device)
    if name == "data_parallel":
        return data_parallel.main(rounds=rounds, quick=quick)
    if name == "sharded":
        return sharded.main(rounds=min(rounds, 10), quick=quick)
    size = ["--quick"] if quick else ["--sizes", "100MB"]  # 1 GB would take 20 minutes more
    command = [sys.executable, "-m", "benchmarks.checkpoint", *size]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
