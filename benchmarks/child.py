"""Runs one contestant in a separate process, where no other library's threads and memory disturb it.

    python -m benchmarks.child '{"workload": "tiny_mlp", "contestant": "fxtrain", ...}'

The job selects one measurement, and the result is written as a line of JSON. For ``turns``, a first line reports the
end of the warm-up; after that, each line of input starts a turn, and the reply has its seconds. Each process takes a
single measurement, because earlier work in a process changes the cost of allocations: a turn takes as long as the same
steps in a training script.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import math
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

# Steps of the short training. Few, because Adam turns rounding errors into full steps, so that results diverge soon.
CHECKED = 3
# Factor on the weight decay in the short training, so that a contestant that skips it for some parameters fails.
DECAYS = 30
# Steps before memory is measured, because compilers leave memory behind.
SETTLED = 4


def main() -> None:
    job = json.loads(sys.argv[1])
    with own_stdout() as parent:
        pin(job["cores"])  # before any library counts the cores
        job["then_pin"] = job.get("then_pin", job["cores"])
        {"check": check, "turns": turns, "memory": memory, "first_step": first_step}[job["what"]](job, parent)


@contextlib.contextmanager
def own_stdout() -> Iterator[TextIO]:
    """Yields the real stdout, and redirects the output of libraries to stderr."""
    with os.fdopen(os.dup(1), "w") as stdout:
        os.dup2(2, 1)
        yield stdout


def pin(cores: list[int]) -> None:
    """Pins all threads of this process to the cores, including threads of libraries."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # the thread has ended
            os.sched_setaffinity(int(thread), cores)


def prepared(job: dict[str, Any]) -> tuple[Any, Any]:
    """Returns the workload and the contestant's training function."""
    warnings.filterwarnings("ignore")
    import torch

    from benchmarks.contestants import contestant
    from benchmarks.workloads import workload

    made = workload(job["workload"], quick=job["quick"], device=job["device"])
    torch.set_num_threads(made.threads)
    return made, contestant(job["contestant"])


def send(parent: TextIO, **what: Any) -> None:
    parent.write(json.dumps(what) + "\n")
    parent.flush()


# Turns


def turns(job: dict[str, Any], parent: TextIO) -> None:
    from benchmarks.feed import in_turns

    workload, train = prepared(job)

    def end_turn(seconds: float) -> None:
        if math.isnan(seconds):
            pin(job["then_pin"])
        send(parent, seconds=seconds)
        if not sys.stdin.readline():
            # Skips the cleanup of libraries, because the process has no further use.
            os._exit(0)

    feed = in_turns(workload.batches, workload.warmup, workload.turn, end_turn)
    if workload.device != "cpu":
        import torch

        feed.sync = torch.cuda.synchronize
    train(workload, feed)
    raise RuntimeError(f"expected {job['contestant']} to train until it is stopped, got a return.")


# Check


def check(job: dict[str, Any], parent: TextIO) -> None:
    """Reports the loss after a short training, and the distance of its parameters from the reference's.

    The distance is relative to the distance between the reference's initial and final parameters.
    """
    import torch

    from benchmarks.feed import limited

    workload, train = prepared(job)
    workload = dataclasses.replace(workload, weight_decay=DECAYS * workload.weight_decay)
    start = {name: value.clone() for name, value in floating(workload.module().state_dict()).items()}
    end = train(workload, limited(workload.batches, CHECKED))
    module = workload.module()
    module.load_state_dict({name: torch.as_tensor(value) for name, value in end.items()}, strict=False)
    reached = floating(module.state_dict())
    if not os.path.exists(job["reference"]):
        torch.save(reached, job["reference"])
    reference = torch.load(job["reference"], map_location=workload.device)
    difference = math.sqrt(sum(float((reached[name] - reference[name]).square().sum()) for name in start))
    way = math.sqrt(sum(float((reference[name] - start[name]).square().sum()) for name in start))
    with torch.no_grad():
        batch = workload.batches[0]
        losses = [float(workload.loss(made(batch["x"]), batch["y"])) for made in (module, workload.module())]
    send(parent, loss=losses[0], loss_before=losses[1], distance=difference / way)


def floating(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value.is_floating_point()}


def forget_compiled() -> None:
    """Clears Dynamo's caches, because the guards of earlier graphs would be checked at each call."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


# Memory


def memory(job: dict[str, Any], parent: TextIO) -> None:
    """Reports the peak memory of a few steps, above the memory of the process before it had the full model."""
    import torch

    from benchmarks.feed import limited
    from benchmarks.workloads import workload

    full, train = prepared(job)
    on_gpu = full.device != "cpu"
    small = workload(job["workload"], quick=True, device=full.device)
    train(small, limited(small.batches, 2))  # loads libraries and compilers
    forget_compiled()
    trim()
    if on_gpu:
        torch.cuda.empty_cache()  # of the small workload
    before = torch.cuda.memory_reserved() if on_gpu else resident("VmRSS")
    peaks = []

    def look(given: int) -> None:
        if on_gpu and given == SETTLED:
            torch.cuda.reset_peak_memory_stats()
        elif on_gpu:
            # Reserved memory, because memory that a CUDA graph keeps for replays is not allocated between them.
            peaks.append(torch.cuda.max_memory_reserved() - before)
        elif given == SETTLED:
            trim()
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        else:
            peaks.append(resident("VmHWM") - before)

    train(full, limited(full.batches, 2 * SETTLED + 1, look, SETTLED, 2 * SETTLED))
    send(parent, bytes=peaks[0])


def trim() -> None:
    """Returns free memory to the system, because compilers leave a lot of it behind."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident(which: str) -> int:
    """Returns bytes in use: ``"VmRSS"`` now, or ``"VmHWM"`` at the peak since its last reset."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:"))


# First step


def first_step(job: dict[str, Any], parent: TextIO) -> None:
    """Reports the seconds from the first import to the request for the second batch, and those of torch's import."""
    began = time.perf_counter()
    import torch  # noqa: F401

    imported = time.perf_counter() - began
    from benchmarks.feed import limited

    workload, train = prepared(job)
    asked = []

    def look(given: int) -> None:
        asked.append(time.perf_counter())

    train(workload, limited(workload.batches, 2, look, 0, 1))
    send(parent, seconds=asked[1] - began, imported=imported)


if __name__ == "__main__":
    main()
