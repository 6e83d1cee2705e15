"""A run that receives signals: python worker_run.py FOLDER START_METHOD WHERE LOADER. Prints "ready" at WHERE."""

import multiprocessing
import sys
import time

import torch
from torch.utils.data import DataLoader, Dataset

import fxtrain as fx
from fxtrain.data import from_loader, prefetch

ITEMS = 8


class Rows(Dataset):
    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return ITEMS

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return torch.full((2,), float(index))


def loader(method, kind, seconds):
    workers = 0 if method == "none" else 2
    options = {"persistent_workers": True} if kind == "persistent" else {}
    if workers:
        options["multiprocessing_context"] = method
    if kind == "stateful":
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(Rows(seconds), 2, num_workers=workers, **options)
    made = DataLoader(Rows(seconds), 2, num_workers=workers, **options)
    if kind == "prefetched":
        return prefetch(from_loader(made))
    return nested(made) if kind == "nested" else made


def nested(made):
    def batches():
        yield from made

    return batches


def main(folder, method, where, kind):
    if multiprocessing.parent_process() is not None:
        return None
    steps = 0

    def loss_fn(model, batch):
        nonlocal steps
        steps += 1
        if where == "step" and steps == 3:
            print("ready", flush=True)
            time.sleep(1.0)
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
    eval_seconds = 0.7 if where == "evaluation" else 0.0
    result = fx.fit(
        fx.init(torch.nn.Linear(2, 1), tx),
        fx.train_step(loss_fn, tx),
        loader(method, kind, 0.7 if where == "wait" else 0.01),
        eval_step=fx.eval_step(lambda model, batch: {"loss": model(batch).square().mean()}),
        eval_data=loader(method, kind, eval_seconds),
        epochs=200,
        observers=[announce],
        checkpointer=fx.checkpointer(folder),
    )
    print(result.reason, flush=True)
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
