"""A run that receives signals: python worker_run.py FOLDER START_METHOD WHERE LOADER. Prints "ready" at WHERE.

Functions import fxtrain, because workers import this file, and start sooner without it.
"""

import multiprocessing
import sys
import time

import torch
from torch.utils.data import DataLoader, Dataset

ITEMS = 8


class Rows(Dataset):
    """Rows that take some seconds each, except those of the first two batches."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return ITEMS

    def __getitem__(self, index):
        if index >= 4:
            time.sleep(self.seconds)
        return torch.full((2,), float(index))


def loader(method, kind, seconds):
    workers = 0 if method == "none" else 2
    options = {"multiprocessing_context": method, "persistent_workers": kind == "persistent"} if workers else {}
    if kind == "stateful":
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(Rows(seconds), 2, num_workers=workers, **options)
    made = DataLoader(Rows(seconds), 2, num_workers=workers, **options)
    if kind == "prefetched":
        from fxtrain.data import from_loader, prefetch

        return prefetch(from_loader(made))
    return nested(made) if kind == "nested" else made


def nested(made):
    def batches():
        yield from made

    return batches


def main(folder, method, where, kind):
    if multiprocessing.parent_process() is not None:
        return None
    import fxtrain as fx

    multiprocessing.set_forkserver_preload(["__main__", "torch.utils.data"])
    steps = 0

    def loss_fn(model, batch):
        nonlocal steps
        steps += 1
        if where == "step" and steps == 3:
            print("ready", flush=True)
            time.sleep(0.3)
        return model(batch).square().mean()

    def announce(state, event, control):
        at = {
            "wait": isinstance(event, fx.StepEnd) and event.step == 2,
            "evaluation": isinstance(event, fx.EvalBegin),
            "start": isinstance(event, fx.EpochBegin) and event.step == 0,
        }
        if at.get(where):
            print("ready", flush=True)

    tx = fx.optim.sgd(0.01)
    evaluates = where == "evaluation"
    # Workers that are not forked start slowly, so the evaluation's alone are started.
    train_method = "none" if evaluates and method != "fork" else method
    result = fx.fit(
        fx.init(torch.nn.Linear(2, 1), tx),
        fx.train_step(loss_fn, tx),
        loader(train_method, kind, 0.7 if where == "wait" else 0.01),
        eval_step=fx.eval_step(lambda model, batch: {"loss": model(batch).square().mean()}),
        eval_data=loader(method, kind, 0.7 if evaluates else 0.0),
        epochs=200,
        observers=[announce],
        checkpointer=fx.checkpointer(folder),
    )
    print(result.reason, flush=True)
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
