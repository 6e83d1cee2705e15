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

ADDED = 0.18
"""Half of what four more layers added before the compiler was made faster: 12 s, where the loop by hand took 34 s."""

REASON = (
    "Layers that repeat are compiled once. Measured alone, four more layers add 1.3 s to the trace and 2.0 s to the "
    "check against the uncompiled step, but times with an empty cache vary by a quarter between rounds. `tiny_mlp` has "
    "no parts that repeat, and its update is compiled besides its model."
)

Found = dict[str, dict[str, Seconds]]
"""Seconds by workload, contestant, and state of the cache: ``"cold"`` or ``"warm"``."""


def main(*, rounds: int, quick: bool) -> tuple[Found, list[Verdict]]:
    """Returns the measurements and the verdicts. flax has no cache on disk unless it is configured."""
    names = (FXTRAIN, MODEL_COMPILED, FLAX) if quick else NAMES
    contestants = {"tiny_mlp": names} if quick else {"tiny_mlp": names, "small_gpt": names, "deep_gpt": (FXTRAIN,)}
    found: Found = {
        workload: {name: {"cold": [], "warm": []} for name in (*taking_part, IMPORT)}
        for workload, taking_part in contestants.items()
    }
    # All workloads in each round, because the speed of a machine drifts.
    for _ in range(rounds):
        for workload, taking_part in contestants.items():
            for name in taking_part:
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
        if MODEL_COMPILED not in contestants:
            continue
        ours, by_hand = contestants[FXTRAIN], contestants[MODEL_COMPILED]
        for kind, limit, cache in (("cold", 1.0, "an empty"), ("warm", 0.5, "a warm")):
            text = f"`{workload}`, first step with {cache} cache, relative to {MODEL_COMPILED}"
            judged.append(Verdict(text, ratios(ours[kind], by_hand[kind]), limit, REASON))
    if "deep_gpt" in found:
        small, deep = found["small_gpt"], found["deep_gpt"]
        added = [two - one for one, two in zip(small[FXTRAIN]["cold"], deep[FXTRAIN]["cold"], strict=True)]
        text = f"`small_gpt`, what twice the layers add to a cold first step, relative to all of {MODEL_COMPILED}"
        judged.append(Verdict(text, ratios(added, small[MODEL_COMPILED]["cold"]), ADDED, REASON))
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
