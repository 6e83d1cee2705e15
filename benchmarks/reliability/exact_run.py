"""A training run with every kind of state, run in a separate process, that records its events.

`python -m benchmarks.reliability.exact_run FOLDER RECORD [options]` resumes from the checkpoints in FOLDER, or starts
fresh if there are none. It appends one JSON line per trajectory event to RECORD: all fields except times, requests,
logs, and a checksum of each leaf of the state, in full precision.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import sys
import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fxtrain as fx
from fxtrain.core import KINDS, TRAJECTORY

STEPS = 50
SEED = 7
_CLOCK = ("time", "previous_time", "duration", "data_wait")


class Samples(Dataset[Any]):
    """A dataset of rows with random noise added at each read."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(60, 6, generator=generator)
        self.y = self.x.sum(-1, keepdim=True).tanh()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index] + 0.01 * torch.randn(6), "y": self.y[index]}


def data(kind: str) -> Any:
    """Returns shuffled data with seven batches of eight rows per epoch."""
    samples = Samples()
    arrays = {"x": samples.x, "y": samples.y}
    match kind:
        case "arrays":
            return fx.data.batches(arrays, 8, seed=3)
        case "prefetch":
            return fx.data.prefetch(fx.data.batches(arrays, 8, seed=3))
        case "prefetch workers=0" | "prefetch workers=2":
            return fx.data.prefetch(data(kind.removeprefix("prefetch ")), seed=SEED)
        case "workers=0" | "workers=2":
            return DataLoader(samples, batch_size=8, shuffle=True, drop_last=True, num_workers=int(kind[-1]))
    raise ValueError(kind)


def loss_fn(model: Any, batch: Any) -> Any:
    error = model(batch["x"]) - batch["y"]
    return error.square().mean(), {"mae": error.abs().mean()}


def average(decay: float = 0.9) -> Any:
    """Returns a traced callback with an exponential moving average of the parameters."""

    def update(state: fx.TrainState, event: fx.Updated, memory: Any) -> Any:
        return fx.tree.map(lambda old, new: decay * old + (1 - decay) * new, memory, state.params), fx.Control()

    return fx.stateful("average", lambda state: fx.tree.clone(state.params), update)


class PlateauState(NamedTuple):
    """State of the callback ``plateau``."""

    best: Tensor  # float32 []: the lowest evaluation loss
    waited: Tensor  # int64 []: the number of evaluations without improvement


def plateau(patience: int = 1, factor: float = 0.5) -> Any:
    """Returns a callback that lowers the learning rate when the evaluation loss stops improving."""

    def init(state: fx.TrainState) -> PlateauState:
        return PlateauState(torch.tensor(float("inf")), torch.tensor(0))

    def update(state: fx.TrainState, event: fx.EvalEnd) -> Any:
        memory: PlateauState = state.slots["plateau"]
        better = event.metrics["loss"] < memory.best - 0.01
        waited = torch.where(better, 0, memory.waited + 1)
        lower = waited > patience
        rate = state.opt_state.hyperparams["learning_rate"]
        opt_state = fx.optim.set_hyperparams(state.opt_state, learning_rate=torch.where(lower, rate * factor, rate))
        memory = PlateauState(torch.minimum(memory.best, event.metrics["loss"]), torch.where(lower, 0, waited))
        return (
            state.replace(opt_state=opt_state).with_slot("plateau", memory),
            fx.Control(log={"rate": rate, "waited": waited}),
        )

    return fx.slotted("plateau", init, update)


class Recorder:
    """Writes trajectory events to a file, and sends SIGTERM to this process after event ``stop_at``."""

    required = True

    def __init__(self, path: str, stop_at: int | None) -> None:
        self._file = open(path, "a")  # noqa: SIM115 - closed at the end of the run
        self._stop_at, self._count = stop_at, 0

    def __call__(self, state: fx.TrainState, event: Any, control: fx.Control) -> None:
        if isinstance(event, TRAJECTORY):
            self._file.write(json.dumps({"event": type(event).__name__, **_told(state, event, control)}) + "\n")
            self._file.flush()
            if self._stop_at == self._count:
                os.kill(os.getpid(), signal.SIGTERM)
            self._count += 1

    def close(self) -> None:
        self._file.close()


def _told(state: fx.TrainState, event: Any, control: fx.Control) -> dict[str, Any]:
    fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    return {
        "step": event.step,
        "fields": {name: _plain(value) for name, value in fields.items() if name not in _CLOCK},
        "asked": {kind: sorted(control.reasons(kind)) for kind in KINDS if control.reasons(kind)},
        "log": {name: _plain(entry.value) for name, entry in sorted(control.log.items())},
        "state": _plain(state),
    }


def _plain(value: Any) -> Any:
    """Converts a value to JSON, with floats as hexadecimal text and tensors as checksums of their bytes."""
    if isinstance(value, Tensor):
        return zlib.crc32(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, int | str | None):
        return value
    if hasattr(value, "items"):
        return {str(name): _plain(inner) for name, inner in value.items()}
    return dict(zip(fx.tree.paths(value, "state"), map(_plain, fx.tree.leaves(value)), strict=True))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("record")
    parser.add_argument("--data", default="arrays")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--stop-at", type=int, help="send SIGTERM after the trajectory event with this index")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    module = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    tx = fx.optim.inject_hyperparams(fx.optim.adamw)(learning_rate=0.03)
    callbacks = fx.compose(
        fx.callbacks.early_stopping("loss", patience=30),
        fx.callbacks.restore_best("loss"),
        plateau(),
        average(),
        fx.callbacks.epoch_mean("loss", "mae"),
        fx.callbacks.save(),
    )
    precision = fx.Policy(loss_scale=fx.precision.LossScale(initial=2.0**124, period=4))
    step = fx.train_step(loss_fn, tx, accumulate=2, precision=precision, callbacks=callbacks)
    eval_step = fx.eval_step(loss_fn)
    if options.compiled:
        step, eval_step = fx.compile(step), fx.compile(eval_step)
    result = fx.fit(
        fx.init(module, tx, seed=SEED),
        step,
        data(options.data),
        callbacks=callbacks,
        eval_step=eval_step,
        eval_data=fx.data.batches({"x": Samples().x, "y": Samples().y}, 20, shuffle=False),
        eval_when=fx.every(4) | fx.every(epochs=1),
        steps=STEPS,
        checkpointer=fx.checkpointer(options.folder, keep=None),
        resume=True,
        observers=[Recorder(options.record, options.stop_at)],
    )
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
