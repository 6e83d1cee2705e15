"""Formats the measurements as markdown."""

from __future__ import annotations

import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch

from benchmarks.bars import Verdict, verdicts
from benchmarks.contestants import FXTRAIN
from benchmarks.data_parallel import ABOUT as ABOUT_RANKS
from benchmarks.ensemble import ABOUT as ABOUT_ENSEMBLE
from benchmarks.measure import Seconds, quartiles, ratios
from benchmarks.memory import ABOUT, ON_GPU, Found
from benchmarks.race import Outcome
from benchmarks.sharded import ABOUT as ABOUT_SHARDED
from benchmarks.sharded import FIRST_STEP as FIRST_SHARDED
from benchmarks.sharded import Found as FoundSharded

DISTANCE = 0.02
"""Limit on a contestant's distance from the reference after the short training, relative to the distance between the
reference's initial and final parameters. Rounding causes 0.0004, and 0.014 on the ResNet, where single activations
change sign before a ReLU. Skipped weight decay causes at least 0.044, and starting at the second batch 0.17."""

LOSS = 1e-3
"""Limit on the relative difference of its loss from the reference's."""

FIRST_STEP = (
    "Seconds from the first import to the request for the second batch. Compilers import some modules before the first "
    "batch and some after it, so all imports are included. For flax they include torch, which creates the workload. "
    "flax stores no compiled programs across processes, unless it is configured to.\n\n"
    "Most of a compilation is Inductor's Python, which fuses operations and generates code for each layer separately. "
    "What has made it faster, with the same generated code: in-place writes keep no dead values, so Inductor schedules "
    "559 nodes of `small_gpt` instead of 1,461; it attempts 11,008 fusions instead of 24,153; AOTAutograd, which "
    "traces a graph twice, is left out (2.8 s of processor time instead of 6.7 s); loops without a remainder get no "
    "kernel for it; the rules for dtypes are made once instead of for each operation. The kernels are compiled as a "
    "few libraries, each while Inductor generates the next one or the next graph. Inductor tries out all sets of "
    "vector instructions that the processor has (6.4 s for three sets); here only the widest is tried, in another "
    "thread, while Inductor is imported.\n\n"
    "Operations that a step repeats on other tensors, as layers and updates of parameters do, are found in its graph "
    "and compiled once (`fxtrain/compiler/passes/_splitting.py`). A step is then a program of several graphs: six for "
    "`small_gpt`, called 15 times a step. In one process with alternating rounds, the first call of `small_gpt` with "
    "an empty cache took 12.1 s of processor time as a program and 24.3 s as one graph, and that of `deep_gpt` 14.1 s "
    "and 52.0 s. Steps took the same time (ratios 0.998 and, on a busy machine, 1.07), and the parameters were the "
    "same bits after at least 20 steps. Steps whose parts would be too small to pay for the calls, such as those of "
    "`many_leaves`, stay one graph.\n\n"
    "With a warm cache, a step is not traced. It runs once uncompiled, and its operators with their arguments identify "
    "its graph among those that earlier processes have compiled (`fxtrain/compiler/lowering/_signature.py`). A trace "
    "takes 1.3 s to import Dynamo, Inductor and sympy, and about 1.2 ms per operation. With it, the first step with a "
    "warm cache took 3.9 s for `tiny_mlp` (1 round) and 5.5 s for `small_gpt` (2 rounds; commit f5b12d8).\n\n"
    "Regional compilation of torch 2.13 (`nested_compile_region`) fails inside `torch.func.grad` "
    '("Expected FakeTensor"), and needs marks in the model.'
)

MEMORY = (
    "Compiled steps of fxtrain keep freed memory for the next step (`fxtrain/compiler/call/_memory.py`). The other "
    "contestants run with default settings, with which glibc returns memory to the system and maps it again. With the "
    "same settings for all contestants (`MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_MMAP_THRESHOLD_=33554432`; 3 rounds, "
    "commit bc8070e, on another machine), fxtrain took 0.60 of the time of the best loop by hand on `small_gpt` and "
    "0.74 on `wide_mlp`, compared with 0.58 and 0.44 without these settings."
)

MEMORY_ON_GPU = "Batches are on the GPU. Memory is the peak that PyTorch reserves there, including CUDA graphs."

PACKAGES = (
    *("torch", "jax", "flax", "optax", "lightning", "transformers", "accelerate", "pytorch-ignite", "keras"),
    *("torchtnt", "numpy", "scikit-learn"),
)


def report(
    outcomes: Mapping[str, Outcome],
    others: Mapping[str, Any],
    *,
    rounds: int,
    quick: bool,
    device: str = "cpu",
) -> str:
    """Returns the whole report. ``others`` has the results of all measurements other than workloads, by name."""
    judged = verdicts(outcomes, device)
    for part in ("overhead", "monitoring", "first_step", "memory", "ensemble", "data_parallel", "sharded"):
        judged += others[part][1] if part in others else []
    lines = ["# Results", "", heading(rounds, device), ""]
    if quick:
        lines += ["**A quick run with small sizes and few steps. It only shows that everything works.**", ""]
    lines += bars(judged)
    for name, outcome in outcomes.items():
        lines += workload(name, outcome)
    if "overhead" in others:
        lines += overhead(others["overhead"][0])
    if "monitoring" in others:
        lines += monitoring(others["monitoring"][0])
    if "first_step" in others:
        lines += first_step(others["first_step"][0])
    if "memory" in others:
        lines += memory(others["memory"][0])
    if "ensemble" in others:
        lines += ensemble(others["ensemble"][0], device)
    if "data_parallel" in others:
        lines += data_parallel(others["data_parallel"][0])
    if "sharded" in others:
        lines += sharded(others["sharded"][0])
    if "checkpoint" in others:
        lines += [others["checkpoint"], ""]
    return "\n".join(lines).rstrip() + "\n"


def heading(rounds: int, device: str) -> str:
    """Describes the conditions of the measurements."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES if installed(name))
    gpu = "" if device == "cpu" else f"{torch.cuda.get_device_name()}; "
    text = (
        f"{time.strftime('%Y-%m-%d')}; commit {commit()}; {processor()}, {len(os.sched_getaffinity(0))} cores, "
        f"{memory_of_machine()}, {platform.system()} {platform.release()}; {gpu}Python {platform.python_version()}, "
        f"{versions}; {rounds} rounds. Load average at the end: {os.getloadavg()[1]:.1f}.\n\n"
        "Each contestant runs in a separate process, which is stopped between its turns. Each round has one turn of "
        "each contestant, in rotating order. With one thread, all turns run on the same core. Values are medians, with "
        "quartiles in parentheses. Ratios are taken within each round. All contestants start from the same weights, "
        "take the same batches in the same order, and use AdamW with the same settings. None of them logs, saves or "
        "shows progress."
    )
    return f"{text}\n\n{MEMORY if device == 'cpu' else MEMORY_ON_GPU}"


def bars(judged: Sequence[Verdict]) -> list[str]:
    if not judged:
        return []
    rows = [("target", "measured", "at most", "")]
    for found in judged:
        measured = f"{spread(found.values, 1 if found.unit else 3)}{found.unit}"
        limit = f"{found.limit:.4g}{found.unit}"
        rows.append((found.text, measured, limit, "pass" if found.passed else "**missed**"))
    lines = ["## Targets", "", *table(rows), ""]
    missed: dict[str, list[str]] = {}
    for found in judged:
        if not found.passed:
            missed.setdefault(found.reason or "Not yet explained.", []).append(found.text)
    for reason, texts in missed.items():
        lines += [f"Missed: {'; '.join(texts)}. {reason}", ""]
    return lines


def workload(name: str, outcome: Outcome) -> list[str]:
    """Formats the table of a workload, contestants that trained differently, and failures."""
    rows = [("contestant", "time per step, us", "relative to fxtrain", "peak memory, MB", "loss", "distance")]
    ours = outcome.seconds.get(FXTRAIN)
    for contestant, seconds in sorted(outcome.seconds.items(), key=lambda item: statistics.median(item[1])):
        check = outcome.checks[contestant]
        over = "" if ours is None else spread(ratios(seconds, ours), 2)
        memory = f"{outcome.memory[contestant] / 1e6:.0f}" if contestant in outcome.memory else ""
        micro = spread([1e6 * s for s in seconds], 1)
        rows.append((contestant, micro, over, memory, f"{check['loss']:.6f}", f"{check['distance']:.1e}"))
    threads = "one thread" if outcome.threads == 1 else f"{outcome.threads} threads"
    lines = [f"## `{name}`", "", f"{outcome.about}; {threads}; {outcome.turn} steps per turn.", "", *table(rows), ""]
    wrong = different(outcome)
    if wrong:
        lines += [f"**Different results of the short training: {', '.join(wrong)}.**", ""]
    for contestant, why in outcome.failures.items():
        lines += [f"Failed: {contestant}: `{why.splitlines()[-1]}`", ""]
    return lines


def different(outcome: Outcome) -> list[str]:
    """Returns the contestants whose short training differs from the loop by hand."""
    found = []
    for name, check in outcome.checks.items():
        reference = outcome.reference_loss
        off = abs(check["loss"] - reference) > LOSS * abs(reference) or not check["distance"] <= DISTANCE
        found += [name] if off else []
    return found


def overhead(found: Mapping[str, Seconds]) -> list[str]:
    lines = ["## Overhead of callbacks and the loop", ""]
    for name, seconds in found.items():
        rows = [("variant", f"{name}: time per step, us")]
        rows += [(variant, spread([1e6 * s for s in taken], 1)) for variant, taken in seconds.items()]
        lines += [*table(rows), ""]
    return lines


def monitoring(found: Seconds) -> list[str]:
    rows = [("monitors", "time per step, ms")]
    rows += [(variant, spread([1e3 * s for s in taken], 2)) for variant, taken in found.items()]
    return ["## Overhead of monitors in `fxtrain lm`", "", *table(rows), ""]


def first_step(found: Mapping[str, Mapping[str, Seconds]]) -> list[str]:
    lines = ["## First step", "", FIRST_STEP, ""]
    rows = [("workload", "contestant", "empty cache", "warm cache")]
    for name, contestants in found.items():
        for contestant, kinds in contestants.items():
            rows.append((f"`{name}`", contestant, spread(kinds["cold"], 2), spread(kinds["warm"], 2)))
    return [*lines, *table(rows), ""]


def memory(found: Found) -> list[str]:
    rows = [("step", "time per step, s", "peak above the state, MB")]
    rows += [(name, spread(taken, 2), f"{found.peaks[name] / 1e6:.1f}") for name, taken in found.seconds.items()]
    return ["## Activations of a GPT", "", ABOUT, "", *table(rows), "", ON_GPU, ""]


def ensemble(found: Seconds, device: str) -> list[str]:
    rows = [("members", "time per step, us", "per member, us", "per member, of one run")]
    plain = next(iter(found.values()))
    for count, seconds in found.items():
        micro = [1e6 * s for s in seconds]
        each = [m / int(count) if count.isdigit() else m for m in micro]
        share = [m / (1e6 * one) for m, one in zip(each, plain, strict=True)]
        rows.append((count, spread(micro, 0), spread(each, 1), spread(share, 2)))
    return ["## Ensemble: tiny MLPs as a batch of runs", "", ABOUT_ENSEMBLE[device], "", *table(rows), ""]


def data_parallel(found: Seconds) -> list[str]:
    rows = [("step", "time per step, ms", "relative to fxtrain")]
    ours = found[FXTRAIN]
    rows += [
        (name, spread([1e3 * s for s in taken], 1), spread(ratios(taken, ours), 2)) for name, taken in found.items()
    ]
    return ["## Data parallel training", "", ABOUT_RANKS, "", *table(rows), ""]


def sharded(found: FoundSharded) -> list[str]:
    rows = [("step", "time per step, ms", "relative to fxtrain", "peak above the state, MB", "left, MB")]
    ours = found.seconds[FXTRAIN]
    for name, taken in found.seconds.items():
        peak, left = (f"{size / 1e6:.1f}" for size in found.allocated[name])
        rows.append((name, spread([1e3 * s for s in taken], 1), spread(ratios(taken, ours), 2), peak, left))
    first = [("processes", "first step, s"), *((count, spread(taken, 1)) for count, taken in found.first.items())]
    return ["## Sharded training", "", ABOUT_SHARDED, "", *table(rows), "", FIRST_SHARDED, "", *table(first), ""]


# Pieces


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Formats rows as a markdown table. The first row is the header.

    Example:
        >>> table([("a", "b"), ("1", "2")])
        ['| a | b |', '| --- | ---: |', '| 1 | 2 |']
    """
    head, *body = rows
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *body]
    return ["| " + " | ".join(row) + " |" for row in lines]


def spread(values: Sequence[float], digits: int) -> str:
    """Formats the median, followed by the quartiles if there are several values.

    Example:
        >>> spread([1.0, 2.0, 3.0], 1), spread([2.0], 1)
        ('2.0 (1.5 to 2.5)', '2.0')
    """
    low, middle, high = quartiles(values)
    return f"{middle:.{digits}f}" + (f" ({low:.{digits}f} to {high:.{digits}f})" if len(values) > 1 else "")


def installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def commit() -> str:
    """Returns the short hash, followed by "with changes" if files other than the reports differ from the commit."""
    here = pathlib.Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = " with changes" if git("status", "--porcelain", "--", "..", ":!RESULTS*.md") else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + changed


def processor() -> str:
    """Returns the name, family and model of the processor, because cloud names alone rarely identify it."""
    lines = (line.partition(":") for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines())
    found = {name.strip(): value.strip() for name, _, value in lines}
    name = found.get("model name", "unknown processor")
    return f"{name} (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else name


def memory_of_machine() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
