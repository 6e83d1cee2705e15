"""Measures the time to the first step, with an empty compiler cache and with a warm one."""

from __future__ import annotations

import os
import tempfile

from benchmarks.contestants import BOTH_COMPILED, EAGER, FLAX, FXTRAIN, MODEL_COMPILED
from benchmarks.measure import Seconds
from benchmarks.race import child

NAMES = (FXTRAIN, EAGER, MODEL_COMPILED, BOTH_COMPILED, FLAX)


def main(*, rounds: int, quick: bool) -> dict[str, dict[str, Seconds]]:
    """Returns seconds by workload, contestant, and state of the cache: ``"cold"`` or ``"warm"``.

    flax has no cache on disk unless it is configured.
    """
    workloads = ("tiny_mlp",) if quick else ("tiny_mlp", "small_gpt")
    names = (FXTRAIN, MODEL_COMPILED, FLAX) if quick else NAMES
    found: dict[str, dict[str, Seconds]] = {}
    for workload in workloads:
        found[workload] = {name: {"cold": [], "warm": []} for name in names}
        for _ in range(rounds):
            for name in names:
                with tempfile.TemporaryDirectory(prefix="benchmarks-") as cache:
                    for kind in ("cold", "warm"):
                        found[workload][name][kind].append(first(workload, name, cache, quick=quick))
    return found


def first(workload: str, name: str, cache: str, *, quick: bool) -> float:
    job = {"what": "first_step", "workload": workload, "device": "cpu", "contestant": name, "quick": quick}
    with child({**job, "cores": sorted(os.sched_getaffinity(0))}, {"TORCHINDUCTOR_CACHE_DIR": cache}) as made:
        return made.receive()["seconds"]
