"""Prints a table of trials, detected faults and losses for each checkpointing system."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import sys
import time

import torch

from benchmarks.reliability import shim
from benchmarks.reliability.systems import SYSTEMS
from benchmarks.reliability.table import Cell, render

MODULE = "benchmarks.reliability"


@dataclasses.dataclass(frozen=True)
class Row:
    """A guarantee, and the function that tests it."""

    title: str
    function: str  # module:name, imported only in the process with the shim
    ours_only: bool = False


ROWS = {
    "R1": Row("interrupted and resumed, bit-identical", "exact:exact", ours_only=True),
    "R2": Row("the same with prefetching and workers", "exact:exact_data", ours_only=True),
    "R3": Row("SIGKILL before a file-system call", "crash_points:crash_points"),
    "R4": Row("SIGKILL of a training run at a random time", "kills:kills", ours_only=True),
    "R5": Row("a flipped bit", "damage:flips"),
    "R6": Row("halved, missing, zeroed, extended or empty files", "damage:damages"),
    "R7": Row("a mismatched restore target", "fits:misfits"),
    "R8": Row("tensors changed right after save returned", "aliasing:aliasing"),
    "R9": Row("a full, read-only, broken or missing disk", "disk:disks"),
    "R11": Row("synced before older files are removed", "synced:synced"),
    "R12": Row("a power cut that loses unsynced data", "power_cut:power_cuts", ours_only=True),
    "R13": Row("every kind of leaf and key", "fits:kinds"),
}


def main(arguments: list[str]) -> int:
    """Runs the chosen rows under the shim, and prints the table."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="comma-separated systems")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated rows")
    parser.add_argument("--every", type=int, help="the period of tested crash points, by default per system")
    parser.add_argument("--flips", type=int, default=150, help="bit flips per system")
    parser.add_argument("--kills", type=int, help="SIGKILLs of a training run, by default 10, or 100 with --full")
    parser.add_argument("--full", action="store_true", help="test every crash point of every system")
    parser.add_argument("--json", type=pathlib.Path, help="also write the cells to this file")
    options = parser.parse_args(arguments)
    systems, rows = options.systems.split(","), options.rows.split(",")
    for given, known in ((systems, SYSTEMS), (rows, ROWS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"expected names from {', '.join(known)}, got {', '.join(unknown)}.")
    if not shim.loaded():
        return shim.run_under(MODULE, arguments)

    torch.set_num_threads(1)
    cells: dict[tuple[str, str], Cell] = {}
    for row in rows:
        for system in systems if not ROWS[row].ours_only else [name for name in systems if name == "fxtrain"]:
            began = time.monotonic()
            cells[row, system] = cell = _run(row, system, options)
            print(f"{row} {system}: {cell}  ({time.monotonic() - began:.1f} s)", file=sys.stderr)
            for line in cell.notes[:6]:
                print(f"    {line}", file=sys.stderr)
            if len(cell.notes) > 6:
                print(f"    and {len(cell.notes) - 6} more", file=sys.stderr)
    print(render({row: ROWS[row].title for row in rows}, cells, systems))
    if options.json is not None:
        said = [{"row": row, "system": system, **dataclasses.asdict(cell)} for (row, system), cell in cells.items()]
        options.json.write_text(json.dumps(said))
    return int(any(cell.lost for (_, system), cell in cells.items() if system == "fxtrain"))


def _run(row: str, system: str, options: argparse.Namespace) -> Cell:
    module, _, name = ROWS[row].function.partition(":")
    function = getattr(importlib.import_module(f"{MODULE}.{module}"), name)
    every = options.every or (1 if options.full else SYSTEMS[system].every)
    match row:
        case "R1":
            return function(1 if options.full else 10)
        case "R2":
            return function(5 if options.full else 25)
        case "R3" | "R9":
            return function(SYSTEMS[system], every=every)
        case "R4":
            return function(options.kills or (100 if options.full else 10))
        case "R5":
            return function(SYSTEMS[system], flips=options.flips)
        case _:
            return function(SYSTEMS[system])


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # other systems leave threads running, which a normal exit would wait for
