"""What a user sees after a mistake, and the small problem on which the tables of mistakes make it."""

import re
import warnings

import torch
import torch.nn.functional as F
from torch import nn

import fxtrain as fx

TX = fx.optim.sgd(0.1)
BATCH = {"x": torch.ones(4, 2), "y": torch.zeros(4, 1)}
DATA = [BATCH] * 3


def loss_fn(model, batch):
    return F.mse_loss(model(batch["x"]), batch["y"])


def net():
    return nn.Linear(2, 1)


def start(tx=TX, **options):
    return fx.init(net(), tx, **options)


STEP = fx.train_step(loss_fn, TX)
EVAL_STEP = fx.eval_step(loss_fn)


def fit(*callbacks, step=STEP, data=DATA, **options):
    return fx.fit(start(), step, data, **{"epochs": 1, "callbacks": callbacks, **options})


def fit_loss(loss, **options):
    return fit(step=fx.train_step(loss, TX), **options)


def fit_evaluated(*callbacks, **options):
    return fit(*callbacks, eval_step=EVAL_STEP, eval_data=DATA, **options)


def said(mistake):
    """Returns what a user sees: warnings, then the error with its notes, one per line. File and line are left out."""
    lines = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            mistake()
        except Exception as error:
            notes = [note for note in getattr(error, "__notes__", ()) if not note.startswith("Frames of")]
            lines = [f"{type(error).__name__}: {error}", *notes]
    seen = [f"{each.category.__name__}: {each.message}" for each in caught if each.category is not DeprecationWarning]
    return re.sub(r"[^\s(]+\.py:\d+", "FILE", "\n".join([*seen, *lines]))
