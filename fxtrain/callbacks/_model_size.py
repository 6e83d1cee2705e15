"""The callback that logs the number of parameters."""

from __future__ import annotations

from fxtrain.core import Callback, Control, FitBegin, TrainState
from fxtrain.fold import on
from fxtrain.model._size import model_sizes


def model_size() -> Callback:
    """Logs the number of parameters and the size of the state, once, when a run begins.

    The scalars are ``model/num_parameters``, ``model/trainable_parameters`` and ``model/state_bytes``. A session that
    resumes does not log them again. ``observers.write`` adds them to the hyperparameters of a run, if it has any.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: (model(batch) - 1).square().mean(), tx)
        >>> state = fx.init(torch.nn.Linear(3, 2), tx)
        >>> result = fx.fit(state, step, [torch.ones(4, 3)], steps=1, callbacks=[model_size()])
        >>> result.history["model/num_parameters"].values
        array([8.])
    """

    def model_size(state: TrainState, event: FitBegin) -> tuple[TrainState, Control]:
        return state, Control() if event.resumed else Control(log=model_sizes(state))

    return on(FitBegin, model_size)
