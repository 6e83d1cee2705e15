"""Measures the time to the first step, with an empty compiler cache and with a warm one."""

from __future__ import annotations

import os
import tempfile

from benchmarks.bars import Verdict
from benchmarks.contestants import BOTH_COMPILED, EAGER, FLAX, FXTRAIN, MODEL_COMPILED
from benchmarks.measure import Seconds, ratios
from benchmarks.race import child

NAMES = (FXTRAIN, EAGER, MODEL_COMPILED, BOTH_COMPILED, FLAX)


IMPORT = "import of torch"
"""The part of fxtrain's time with a warm cache that the import of torch takes, in the same runs."""

REASON = (
    "Most of fxtrain's time with an empty cache is Inductor's Python, for a graph that has the update besides forward "
    "and backward pass. With a warm cache, half of the time is the import of torch, which all contestants have, and "
    "most of the rest is the trace, whose graph decides which compiled code fits."
)

Found = dict[str, dict[str, Seconds]]
"""Seconds by workload, contestant, and state of the cache: ``"cold"`` or ``"warm"``."""


def main(*, rounds: int, quick: bool) -> tuple[Found, list[Verdict]]:
    """Returns the measurements and the verdicts. flax has no cache on disk unless it is configured."""
    workloads = ("tiny_mlp",) if quick else ("tiny_mlp", "small_gpt")
    names = (FXTRAIN, MODEL_COMPILED, FLAX) if quick else NAMES
    found: Found = {}
    for workload in workloads:
        found[workload] = {name: {"cold": [], "warm": []} for name in (*names, IMPORT)}
        for _ in range(rounds):
            for name in names:
                with tempfile.TemporaryDirectory(prefix="benchmarks-") as cache:
                    for kind in ("cold", "warm"):
                        seconds, imported = first(workload, name, cache, quick=quick)
                        found[workload][name][kind].append(seconds)
                        if name == FXTRAIN:
                            found[workload][IMPORT][kind].append(imported)
    return found, verdicts(found)


def verdicts(found: Found) -> list[Verdict]:
    judged: list[Verdict] = []
    for workload, contestants in found.items():
        ours, by_hand = contestants[FXTRAIN], contestants[MODEL_COMPILED]
        for kind, limit, cache in (("cold", 1.0, "an empty"), ("warm", 0.5, "a warm")):
            text = f"`{workload}`, first step with {cache} cache, relative to {MODEL_COMPILED}"
            judged.append(Verdict(text, ratios(ours[kind], by_hand[kind]), limit, REASON))
    tiny = found["tiny_mlp"]
    beyond = [taken - imported for taken, imported in zip(tiny[FXTRAIN]["warm"], tiny[IMPORT]["warm"], strict=True)]
    text = "`tiny_mlp`, first step with a warm cache, beyond the import of torch"
    return [*judged, Verdict(text, beyond, 1.5, REASON, " s")]


def first(workload: str, name: str, cache: str, *, quick: bool) -> tuple[float, float]:
    """Returns the seconds of the first step, and of the import of torch in it."""
    job = {"what": "first_step", "workload": workload, "device": "cpu", "contestant": name, "quick": quick}
    with child({**job, "cores": sorted(os.sched_getaffinity(0))}, {"TORCHINDUCTOR_CACHE_DIR": cache}) as made:
        received = made.receive()
        return received["seconds"], received["imported"]
