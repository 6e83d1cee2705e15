"""Measures the contestants of a workload in child processes that take turns."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.contestants import ANY_FLAX, BY_HAND_ON_GPU, EAGER, FXTRAIN, GRAPHS, UNDONATED
from benchmarks.measure import Seconds, alternate
from benchmarks.workloads import workload


@dataclasses.dataclass
class Outcome:
    """The measurements of a workload, by contestant."""

    about: str
    threads: int
    turn: int
    checks: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    seconds: Seconds = dataclasses.field(default_factory=dict)  # per step
    memory: dict[str, int] = dataclasses.field(default_factory=dict)  # bytes
    failures: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def reference_loss(self) -> float:
        """The loss of the eager loop by hand after the short training."""
        return self.checks[EAGER]["loss"] if EAGER in self.checks else float("nan")


class Child:
    """A contestant's process.

    Raises:
        RuntimeError: From ``receive``, if the process died. The message is the end of its stderr.
    """

    def __init__(self, job: dict[str, Any], environment: dict[str, str] | None = None) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.child", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | (environment or {}),
        )

    def receive(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise RuntimeError(self._log.read()[-1500:].strip() or f"exited with code {self._process.returncode}")
        return json.loads(line)

    def turn(self) -> float:
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write("turn\n")
        self._process.stdin.flush()
        seconds = self.receive()["seconds"]
        self.rest()
        return seconds

    def rest(self) -> None:
        """Stops the process until its next turn, so that even busy-waiting threads use no CPU time."""
        self._process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
            self._process.communicate(timeout=10)
        self._process.kill()
        self._process.wait()
        self._log.close()


@contextlib.contextmanager
def child(job: dict[str, Any], environment: dict[str, str] | None = None) -> Iterator[Child]:
    made = Child(job, environment)
    try:
        yield made
    finally:
        made.close()


def race(name: str, names: Sequence[str], *, rounds: int, quick: bool, device: str = "cpu") -> Outcome:
    """Compares the contestants on the same short training, and then measures step times in rounds and peak memory."""
    made = workload(name, quick=quick, device=device)
    outcome = Outcome(made.about, made.threads, made.turn)
    cores = sorted(os.sched_getaffinity(0))
    measured_on = cores[-made.threads :]
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder, contextlib.ExitStack() as closing:
        reference = str(pathlib.Path(folder, "reference.pt"))
        job = {"what": "turns", "workload": name, "quick": quick, "device": device, "reference": reference}
        job["then_pin"] = measured_on
        children: dict[str, Child] = {}

        def prepare(contestant: str, place: list[int]) -> None:
            own = {**job, "contestant": contestant, "cores": place}
            try:
                with child({**own, "what": "check"}) as checked:
                    outcome.checks[contestant] = checked.receive()
                made = closing.enter_context(child(own))
                made.receive()
                made.rest()
                children[contestant] = made
            except RuntimeError as error:
                outcome.failures[contestant] = str(error)

        prepare(EAGER, measured_on)  # the reference
        places = [[core] for core in cores] if made.threads == 1 else [measured_on]
        in_parallel([contestant for contestant in names if contestant != EAGER], places, prepare)
        order = [contestant for contestant in dict.fromkeys([EAGER, *names]) if contestant in children]
        taken = alternate({contestant: children[contestant].turn for contestant in order}, rounds)
        outcome.seconds = {contestant: [s / made.turn for s in turns] for contestant, turns in taken.items()}
    if made.memory:

        def measure_memory(contestant: str, place: list[int]) -> None:
            job = {"what": "memory", "workload": name, "quick": quick, "device": device}
            job |= {"contestant": contestant, "cores": place}
            with child(job) as made:
                try:
                    outcome.memory[contestant] = int(made.receive()["bytes"])
                except RuntimeError as error:
                    outcome.failures[f"{contestant}, memory"] = str(error)

        torch_and_flax = {FXTRAIN, GRAPHS, UNDONATED, *BY_HAND_ON_GPU, *ANY_FLAX}
        in_parallel([contestant for contestant in order if contestant in torch_and_flax], places, measure_memory)
    return outcome


def in_parallel(names: Sequence[str], places: Sequence[list[int]], do: Any) -> None:
    """Calls ``do(name, place)`` for all names, in parallel, with one call at a time per place."""
    free = list(places)

    def at_a_place(name: str) -> None:
        place = free.pop()
        try:
            do(name, place)
        finally:
            free.append(place)

    with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
        list(pool.map(at_a_place, names))
