"""Every writer has exactly one point per step after a run was killed, resumed and rewound."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import problem
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fxtrain as fx
from fxtrain.report import read_run

STEPS = 60


def session(folder, pause=0.0):
    """Runs one session. The run rewinds once, at step 33."""

    def back(state, event: fx.StepEnd | fx.Rewound, went):
        if isinstance(event, fx.Rewound):
            return torch.ones_like(went), fx.Control()
        again = event.step == 33 and not bool(went)
        return went, fx.Control(rewind=4 if again else 0, reason="to go back once")

    def slow(state, event: fx.StepEnd, control):
        time.sleep(pause)

    writers = fx.writers
    fx.fit(
        problem.start(),
        problem.step(),
        problem.data(),
        steps=STEPS,
        callbacks=[
            fx.stateful("back", lambda state: torch.tensor(False), back),
            fx.when(fx.every(5), fx.callbacks.save()),
        ],
        eval_step=problem.eval_step,
        eval_data=problem.data(seed=1),
        eval_when=lambda event: event.step % 7 == 0,
        checkpointer=fx.checkpointer(folder / "checkpoints"),
        resume=True,
        snapshot_every=1,
        snapshots=8,
        observers=[
            fx.observers.required(
                fx.observers.write(
                    writers.tensorboard(folder / "tensorboard"),
                    writers.csv(folder / "metrics.csv"),
                    writers.jsonl(folder / "metrics.jsonl"),  # last, so the other writers already have its points
                )
            ),
            slow,
        ],
    )


def points(folder):
    """Returns the points of each curve and reader as (step, value)."""
    records = fx.writers.read_jsonl(folder / "metrics.jsonl")
    rows = fx.writers.read_csv(folder / "metrics.csv")
    tensorboard = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0})
    tensorboard.Reload()
    return {
        name: {
            "jsonl": [(each["step"], each["metrics"][name]) for each in records if name in each.get("metrics", {})],
            "csv": [(row["step"], row[name]) for row in rows if name in row],
            "report": list(zip(*read_run(folder).curves[name], strict=True)),
            "tensorboard": [(point.step, point.value) for point in tensorboard.Scalars(name)],
        }
        for name in ("train/loss", "eval/loss")
    }


@pytest.mark.slow
def test_curves_have_one_point_per_step_after_kills_and_a_rewind(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    code = (
        "import pathlib, torch; from test_one_point import session; torch.set_num_threads(1); "
        f"session(pathlib.Path({str(killed)!r}), 0.02)"
    )
    here = pathlib.Path(__file__).parent
    for until in (18, 42):
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=here,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path])},
        )
        while (
            not (killed / "metrics.jsonl").exists() or f'"step": {until}' not in (killed / "metrics.jsonl").read_text()
        ):
            assert child.poll() is None, "it ended before it was killed"
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
    session(killed)
    session(whole)

    found, wanted = points(killed), points(whole)
    for name, steps in (("train/loss", range(1, STEPS + 1)), ("eval/loss", range(7, STEPS + 1, 7))):
        for writer, curve in found[name].items():
            assert [step for step, _ in curve] == list(steps), (name, writer)
            assert [value for _, value in curve] == pytest.approx(
                [value for _, value in wanted[name][writer]], rel=1e-6
            )
    assert '{"rewound_to": ' in (killed / "metrics.jsonl").read_text()
