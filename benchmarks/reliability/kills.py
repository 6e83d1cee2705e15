"""R4: a training run killed at random times and restarted until it finishes ends in the uninterrupted run's state."""

from __future__ import annotations

import functools
import hashlib
import math
import pathlib
import random
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # imported before forking, because the first gradient would import it in every child
from torch import Tensor, nn

import fxtrain as fx
from benchmarks.reliability import children, shim
from benchmarks.reliability.table import Cell

STEPS = 60


def train(folder: pathlib.Path, tell: Callable[[Any], None]) -> None:
    """Trains with every kind of state: dropout, shuffling, momentum, averages, patience and the best weights.

    Sends the digests of the leaves of the final states.
    """
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 1))
    torch.seed()  # a restarted process has another seed, and the result must not depend on it
    x = torch.linspace(-2, 2, 56 * 4).reshape(4, 56).T.contiguous()
    data = {"x": x, "y": x.sum(1, keepdim=True).sin()}
    tx = fx.optim.chain(fx.optim.clip_by_global_norm(1.0), fx.optim.adamw(fx.schedules.cosine(3e-2, STEPS)))
    average = fx.stateful("average", lambda state: fx.tree.map(torch.clone, state.params), _average)
    traced = fx.compose(average, fx.callbacks.epoch_mean("loss"))
    callbacks = fx.compose(
        traced,
        fx.callbacks.early_stopping("loss", patience=STEPS),
        fx.callbacks.restore_best("loss"),
        fx.when(fx.every(5), fx.callbacks.evaluate()),
        fx.when(fx.every(3), fx.callbacks.save()),
    )
    result = fx.fit(
        fx.init(module, tx, seed=7),
        fx.train_step(_loss, tx, callbacks=traced),
        fx.data.batches(data, 8, seed=3),
        callbacks=callbacks,
        eval_step=fx.eval_step(_loss),
        eval_data=fx.data.batches(data, 28, shuffle=False),
        steps=STEPS,
        checkpointer=fx.checkpointer(folder, keep=2, best="loss"),
        resume=True,
    )
    for name, state in (("continue_from", result.continue_from), ("state", result.state)):
        leaves = zip(fx.tree.paths(state, name), fx.tree.leaves(state), strict=True)
        tell([name, {path: _digest(leaf) for path, leaf in leaves}])


def kills(count: int, *, seed: int = 0) -> Cell:
    """Kills and restarts runs until ``count`` kills are done, and compares their final states."""
    random_delays = random.Random(seed)
    cell = Cell()
    with shim.scratch() as parent:
        began = time.monotonic()
        wanted = _finish(pathlib.Path(parent) / "whole")
        duration = time.monotonic() - began
        done = run = 0
        while done < count:
            run += 1
            folder = pathlib.Path(parent) / str(run)
            killed = 0
            got: list[Any] | None = None
            # Each run is restarted until it finishes, so kills happen at all stages of the run.
            while got is None:
                delay = random_delays.uniform(0, duration) if done + killed < count else math.inf
                outcome = children.in_child(
                    functools.partial(train, folder), kill_after=None if delay == math.inf else delay
                )
                if outcome.error:
                    raise RuntimeError(f"After {killed} kills, run {run} failed:\n{outcome.error}")
                killed += outcome.killed
                got = None if outcome.killed else outcome.told
            different = [
                path
                for (_, ours), (_, theirs) in zip(wanted, got, strict=True)
                for path in theirs
                if ours.get(path) != theirs[path]
            ]
            done += killed
            cell.tried += killed
            if different or [len(ours) for _, ours in wanted] != [len(theirs) for _, theirs in got]:
                cell.lost += max(killed, 1)
                cell.notes.append(f"run {run}, killed {killed} times, differs in {', '.join(different[:4])}")
    return cell


def _finish(folder: pathlib.Path) -> list[Any]:
    outcome = children.in_child(functools.partial(train, folder))
    if outcome.error:
        raise RuntimeError(outcome.error)
    return outcome.told


def _average(state: fx.TrainState, event: fx.Updated, memory: Any) -> tuple[Any, fx.Control]:
    return fx.tree.map(lambda mean, new: 0.9 * mean + 0.1 * new, memory, state.params), fx.Control()


def _loss(model: Any, batch: Any) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


def _digest(leaf: Tensor) -> str:
    raw = leaf.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{leaf.dtype}{list(leaf.shape)}".encode() + raw).hexdigest()
