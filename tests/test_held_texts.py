"""Texts that the write observer holds back are written whatever ends the run."""

import contextlib
import os
import signal
import subprocess
import sys

import problem
import pytest

import fxtrain as fx
from fxtrain import observers, writers
from fxtrain.values import Text

LAST = 4


def note(state, event: fx.StepEnd):
    """Logs two texts at each step: one as it is, and one of a number in the state that the next step changes."""
    return state, fx.Control(
        log={"plain": Text(f"step {event.step}"), "counted": Text.written("{} steps".format, state.step)}
    )


def ends_by(ending):
    """Returns a callback that ends the run at its last step."""

    def end(state, event: fx.StepEnd):
        if event.step < LAST:
            return state, fx.Control()
        if isinstance(ending, signal.Signals):
            os.kill(os.getpid(), ending)
        return state, fx.Control(stop=ending == "stop")

    def fail(state, event: fx.StepBegin):
        if event.step == LAST + 1 and isinstance(ending, type):
            raise ending("as planned")
        return state, fx.Control()

    return fx.compose(end, fail)


@pytest.mark.parametrize("every", [1, {"texts": 100}])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    "ending", ["stop", "break", signal.SIGINT, signal.SIGTERM, ValueError, KeyboardInterrupt, SystemExit]
)
def test_no_held_text_is_lost_at_the_end_of_a_run(tmp_path, ending, asynchronous, every):
    writer = writers.jsonl(tmp_path / "metrics.jsonl")
    writer = writers.asynchronous(writer) if asynchronous else writer
    write = observers.write(writer, every=every)
    # Times of one second, at which texts are written, are not reached.
    options = {"callbacks": [note, ends_by(ending)], "observers": [write], "clock": lambda: 0.0, "steps": 9}
    run = fx.steps(problem.start(), problem.step(), problem.data(), **options)
    with pytest.raises(ending) if isinstance(ending, type) else contextlib.nullcontext():
        for _, event, _ in run:
            if ending == "break" and type(event) is fx.StepEnd and event.step == LAST:
                break
    run.close()
    found = {
        record["step"]: (record["texts"]["plain"], record["texts"]["counted"])
        for record in writers.read_jsonl(tmp_path / "metrics.jsonl")
        if "texts" in record
    }
    steps = range(1, LAST + 1) if every == 1 else [LAST]
    assert found == {step: (f"step {step}", f"{step} steps") for step in steps}


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_no_held_text_is_lost_if_a_script_is_ended(tmp_path, kind):
    script = f"""
import os, problem
import fxtrain as fx
from test_held_texts import note

def end(state, event: fx.StepEnd, control):
    if event.step == {LAST}:
        os.kill(os.getpid(), {int(kind)})

write = fx.observers.write(fx.writers.jsonl("metrics.jsonl"))
result = problem.fit(callbacks=note, observers=[write, end], clock=lambda: 0.0, steps=1000)
raise SystemExit(result.exit_code)
"""
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert ended.returncode == 128 + kind
    steps = [record["step"] for record in writers.read_jsonl(tmp_path / "metrics.jsonl") if "texts" in record]
    assert steps == [1, 2, 3, 4]
