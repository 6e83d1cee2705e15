"""Measures the cost of checkpoints: blocked training time, time until durable, restore time, and peak memory.

Compares fxtrain with Orbax, torch.save, safetensors and torch's distributed checkpoints (DCP), all in one run:

    python -m benchmarks.checkpoint --sizes 100MB,1GB --leaves 10,2000 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pathlib
import tempfile
import warnings

import torch

from benchmarks.checkpoint.measure import measure_memory, measure_seconds, memory_of
from benchmarks.checkpoint.report import UNITS, heading, report
from benchmarks.checkpoint.systems import SYSTEMS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="100MB,1GB", help="sizes of the state, such as 100MB,1GB")
    parser.add_argument("--leaves", default="10,2000", help="numbers of leaves, such as 10,2000")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a quick check with 20MB, 10 and 200 leaves, 2 rounds")
    parser.add_argument("--folder", help="where to write, on a disk for meaningful times")
    parser.add_argument("--write", metavar="PATH", help="also append the report to this file")
    parser.add_argument("--memory-of", metavar="SYSTEM", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.quick:
        given.sizes, given.leaves, given.rounds = "20MB", "10,200", 2
    sizes = [bytes_in(text) for text in given.sizes.split(",")]
    leaf_counts = [int(text) for text in given.leaves.split(",")]

    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Orbax starts a JAX backend
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is intended
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
        raise ValueError(f"expected a size such as 100MB, got {text!r}. The units are {', '.join(UNITS)}.")
    return round(float(text[:-2]) * UNITS[text[-2:].upper()])


if __name__ == "__main__":
    main()
