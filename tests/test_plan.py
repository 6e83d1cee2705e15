"""Options of a run: fit and steps take the same ones, and list them."""

import inspect

import pytest
import torch

import fxtrain as fx

BATCH = torch.ones(4, 2)
TX = fx.optim.sgd(0.1)
STATE = fx.init(torch.nn.Linear(2, 1), TX)
STEP = fx.train_step(lambda model, batch: model(batch).square().mean(), TX)


def test_steps_lists_the_options_of_fit():
    ours, of_fit = (inspect.signature(function).parameters for function in (fx.steps, fx.fit))
    assert list(ours) == list(of_fit)
    assert {"callbacks", "eval_step", "epochs", "steps", "checkpointer", "clock"} <= set(ours)
    assert not [name for name in ours if f"        {name}: " not in inspect.getdoc(fx.fit).replace("\n", "\n    ")]


@pytest.mark.parametrize("run", [fx.fit, fx.steps])
def test_unknown_option_is_refused_with_nearest_name(run):
    with pytest.raises(TypeError, match=rf"{run.__name__}: expected .* got 'epoch'\. Did you mean 'epochs'\?"):
        run(STATE, STEP, [BATCH], epoch=3)
    with pytest.raises(TypeError, match=rf"{run.__name__}: expected three positional arguments, got 4\."):
        run(STATE, STEP, [BATCH], 3)
