"""Performance targets of fxtrain, as upper limits on ratios within one run."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from benchmarks import workloads
from benchmarks.contestants import (
    AHEAD,
    ANY_FLAX,
    BOTH_GRAPHS,
    BY_HAND,
    BY_HAND_ON_GPU,
    FXTRAIN,
    GRAPHS,
    HUGGING_FACE,
    LIGHTNING,
)
from benchmarks.measure import fastest, ratios
from benchmarks.race import Outcome


@dataclasses.dataclass(frozen=True)
class Bar:
    """An upper limit on the ratio between fxtrain and the best of some other contestants.

    Args:
        workload: Name of the workload.
        against: Names of the other contestants. The best of them counts.
        whom: Name of this group in the report.
        limit: The largest ratio that passes.
        measure: ``"seconds"`` per step, or ``"memory"``.
        ours: The contestant of fxtrain. The default is a donating step in a bare loop.
        reason: Printed if the limit is missed: the cause, with measurements that support it.
    """

    workload: str
    against: Sequence[str]
    whom: str
    limit: float
    measure: str = "seconds"
    ours: str = FXTRAIN
    reason: str = ""

    def ratios(self, outcome: Outcome) -> tuple[list[float], str]:
        """Returns the ratios and the name of the best other contestant, or ``([], "")`` if either was not measured."""
        if self.measure == "memory":
            others = {name: outcome.memory[name] for name in self.against if name in outcome.memory}
            if self.ours not in outcome.memory or not others:
                return [], ""
            best = min(others, key=lambda name: others[name])
            return [outcome.memory[self.ours] / others[best]], best
        if self.ours not in outcome.seconds or not any(name in outcome.seconds for name in self.against):
            return [], ""
        best = fastest(outcome.seconds, self.against)
        return ratios(outcome.seconds[self.ours], outcome.seconds[best]), best


OF_THE_TINY = (
    "Of 76 us (AMD of family 25, model 1), 51 are Inductor's: 25 in five calls of MKL, of 2 to 7 each, 11 in "
    "allocating fifteen buffers, 15 in five kernels and the Python between them. 25 are the loop's and ours: batches, "
    "finding leaves and graph, who else holds the memory, putting output and state together. The ahead-of-time mode "
    "has no Python between kernels: 38 and 25."
)
OF_PRODUCTS = (
    "What it comes to depends on the processor. Where oneDNN reaches twice what MKL does (512 x 128 x 384 in 0.25 ms "
    "against 0.53, one core), the small GPT took 0.58 of the best by hand, and the wide MLP 0.44 (commit bc8070e). "
    "Where both reach what the core can (0.61; AMD of family 25, model 1), 35 of the small GPT's 53 ms are products, "
    "as 33 are by hand, 7 and 6 are PyTorch's attention on short sequences, and what can be fused, the update "
    "included, is 11 against 14."
)
BARS = (
    Bar("tiny_mlp", ANY_FLAX, "flax + optax", 1.0, reason=OF_THE_TINY),
    Bar("tiny_mlp", ANY_FLAX, "flax + optax", 0.75, ours=AHEAD, reason=OF_THE_TINY),
    Bar("tiny_mlp", BY_HAND, "the best by hand", 0.25, reason=OF_THE_TINY),
    Bar("tiny_mlp", BY_HAND, "the best by hand", 0.25, ours=AHEAD, reason=OF_THE_TINY),
    Bar("tiny_mlp", (HUGGING_FACE,), "Hugging Face", 0.1, reason=OF_THE_TINY),
    Bar("tiny_mlp", (LIGHTNING,), "Lightning", 0.1, reason=f"Lightning runs barebones. {OF_THE_TINY}"),
    Bar("small_gpt", BY_HAND, "the best by hand", 0.85, reason=OF_PRODUCTS),
    Bar("small_gpt", ANY_FLAX, "flax + optax", 0.62, reason=OF_PRODUCTS),
    Bar("wide_mlp", BY_HAND, "the best by hand", 0.65, reason=OF_PRODUCTS),
    Bar("wide_mlp", BY_HAND, "the best by hand", 1.0, measure="memory"),
    Bar("many_leaves", ANY_FLAX, "flax + optax", 0.6),
)
BARS_ON_GPU = (
    *(Bar(name, BY_HAND_ON_GPU, "the best by hand", 1.0, ours=GRAPHS) for name in workloads.ON_GPU),
    *(Bar(name, (BOTH_GRAPHS,), BOTH_GRAPHS, 1.0, "memory", ours=GRAPHS) for name in workloads.ON_GPU),
    *(Bar("tiny_mlp", (name,), name, 0.2, ours=GRAPHS) for name in (LIGHTNING, HUGGING_FACE)),
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The measured values of a target and its limit. The median decides."""

    text: str
    values: Sequence[float]  # one per round, or a single value
    limit: float
    reason: str = ""
    unit: str = ""

    @property
    def passed(self) -> bool:
        return statistics.median(self.values) <= self.limit


def verdicts(outcomes: Mapping[str, Outcome], device: str) -> list[Verdict]:
    """Returns a verdict for each bar of this device whose contestants were measured."""
    found = []
    for bar in BARS if device == "cpu" else BARS_ON_GPU:
        values, best = bar.ratios(outcomes[bar.workload]) if bar.workload in outcomes else ([], "")
        if values:
            what = "time a step" if bar.measure == "seconds" else "peak memory"
            over = bar.whom if best == bar.whom else f"{bar.whom} ({best})"
            ours = "" if bar.ours == FXTRAIN else f"{bar.ours}, "
            found.append(Verdict(f"`{bar.workload}`, {ours}{what}, over {over}", values, bar.limit, bar.reason))
    return found
