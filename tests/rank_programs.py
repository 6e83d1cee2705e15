"""Programs with several ranks that are interrupted, hang or are killed. Run as a module, that of a job of torchrun."""

import json
import os
import pathlib
import signal
import sys
import time

import torch

import fxtrain as fx
from tests.rank_runs import BATCH, assert_same, at, examples, fail, fit, loss_fn, values_of


def interrupted(folder, where):
    """Trains until a signal arrives, after printing "ready" at a point of the run."""
    mesh = fx.distributed.mesh(timeout=30)
    rows = [dict(zip("xy", pair, strict=True)) for pair in zip(*examples().values(), strict=True)]
    workers = {"data": torch.utils.data.DataLoader(rows, BATCH, num_workers=2)} if where == "workers" else {}

    def announce():
        print("ready", flush=True)

    def pause(state, event: fx.StepEnd):
        if where in ("step", "workers") and event.step == 7:
            announce()
        time.sleep(0.02)
        return state, fx.Control()

    def evaluation(state, event: fx.EvalStepBegin):
        if where == "evaluation" and event.index == 0:
            announce()
        time.sleep(0.2 if where == "evaluation" else 0.0)
        return state, fx.Control()

    result = fit(
        mesh,
        steps=int(os.environ.get("STEPS", "2000")),
        callbacks=[pause, evaluation, fx.callbacks.save(every=7)],
        checkpointer=fx.checkpointer(folder),
        resume=True,
        **workers,
    )
    print(json.dumps([int(result.state.step), result.reason, values_of(result.state.params)]), flush=True)
    sys.exit(result.exit_code)


def hanging(rank):
    """Hangs on one rank at step 3."""
    mesh = fx.distributed.mesh(timeout=3)

    def hang():
        if mesh.rank == rank:
            time.sleep(60)

    fit(mesh, steps=9, callbacks=at(3, hang))


def killed(rank):
    """Is killed on one rank at step 3, when its collectives are done."""
    mesh = fx.distributed.mesh(timeout=30)

    def kill():
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
        mesh.gather(None, "ends of step 3")
        if mesh.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    fit(mesh, steps=9, callbacks=at(3, kill))


def failing_in_a_step(rank):
    """Raises inside the third step of one rank, where the other waits in a collective of the step."""
    mesh = fx.distributed.mesh(timeout=30)
    calls = 0

    def failing_loss(model, batch):
        nonlocal calls
        calls += 1
        if calls == 3 and mesh.rank == rank:
            fail()
        return loss_fn(model, batch)

    fit(mesh, step=fx.train_step(failing_loss, fx.optim.adam(1e-2), mesh=mesh), steps=9)


FILE_CALLS = ("open", "mkdir", "rename", "replace", "fsync", "write", "writev", "pwritev", "unlink", "rmdir")


def killed_in_a_save(folder, rank, number):
    """Is killed before a call of the second save: on rank 0 of the file system, on rank 1 of a collective.

    Args:
        folder: The folder of the checkpoints.
        rank: The rank that is killed.
        number: The number of the call, from 1.
    """
    torch.set_num_threads(1)
    mesh = fx.distributed.mesh(timeout=30)
    calls, is_armed = 0, False

    def counting(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += is_armed
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    if mesh.rank == rank == 0:
        for name in FILE_CALLS:
            setattr(os, name, counting(getattr(os, name)))
    elif mesh.rank == rank:
        fx.distributed.Mesh.maximum = counting(fx.distributed.Mesh.maximum)

    def arm(state, event: fx.SaveBegin):
        nonlocal is_armed
        is_armed = is_armed or event.step == 8
        return state, fx.Control()

    def announce(state, event: fx.Saved):
        print(f"saved {event.step}", flush=True)
        return state, fx.Control()

    fit(mesh, steps=12, callbacks=[fx.callbacks.save(every=4), arm, announce], checkpointer=fx.checkpointer(folder))
    print(f"{calls} calls", flush=True)


def restarted(folder, kills):
    """Trains with resume, in a job that torchrun restarts. Each attempt but the last is killed on one rank.

    Args:
        folder: The folder of the checkpoints.
        kills: The rank and the step of each attempt's SIGKILL, as JSON.
    """
    torch.set_num_threads(1)
    mesh = fx.distributed.mesh(timeout=30)
    # torchrun counts the restarts of one machine only.
    attempt, kills = len(list(pathlib.Path(folder).glob("killed-*"))), json.loads(kills)
    rank, step = kills[attempt] if attempt < len(kills) else (-1, -1)

    def kill(state, event: fx.StepBegin):
        if event.step >= step > 0 and mesh.rank == rank:
            pathlib.Path(folder, f"killed-{attempt}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return state, fx.Control()

    result = fit(
        mesh,
        steps=30,
        callbacks=[kill, fx.callbacks.save(every=4)],
        checkpointer=fx.checkpointer(folder),
        resume=True,
    )
    assert_same(mesh, values_of(result.state), "states")
    if mesh.is_main:
        (pathlib.Path(folder) / "result.json").write_text(json.dumps([attempt, values_of(result.state)]))


if __name__ == "__main__":
    restarted(*sys.argv[1:])
