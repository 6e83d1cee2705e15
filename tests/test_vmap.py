"""A vmapped step over stacked states equals the step of each state."""

import problem
import torch
from torch import nn

import fxtrain as fx
from fxtrain import tree


def members(state, count=3):
    """Returns ``count`` states of one architecture, with different parameters and seeds."""
    made = []
    for index in range(count):
        key = fx.rng.key(100 + index)
        params = tree.map(
            lambda leaf, key=key: leaf + 0.1 * fx.rng.normal(key, leaf.shape) if leaf.is_floating_point() else leaf,
            state.params,
        )
        made.append(state.replace(params=params, seed=state.seed + index))
    return made


def stack(states):
    return tree.map(lambda *leaves: torch.stack(leaves), *states)


def member(states, index):
    return tree.map(lambda leaf: leaf[index], states)


def test_vmapped_step_equals_single_steps():
    def stops(state, event: fx.Updated, memory):
        flag = (state.seed == 1) & (event.step == 2)
        return memory + event.loss, fx.Control(stop=flag, reason="the second member", log={"total": memory})

    callback = fx.stateful("total", lambda state: torch.tensor(0.0), stops)
    callbacks = [fx.callbacks.nan_guard(), callback]
    # SGD, because the gradient of a bias before batch norm is rounding error, which Adam would scale up.
    tx = fx.optim.sgd(0.1, momentum=0.9)
    step = fx.train_step(problem.loss_fn, tx, accumulate=2, callbacks=callbacks)
    state = fx.attach(fx.init(problem.module(), tx), step)
    states = members(state)
    together, alone = stack(states), states
    for batch in problem.data():
        together, output = torch.vmap(step, (0, None))(together, batch)
        outputs = [step(state, batch) for state in alone]
        alone = [state for state, _ in outputs]
        for index, (state, one) in enumerate(outputs):
            torch.testing.assert_close(tree.leaves(member(together, index)), tree.leaves(state))
            torch.testing.assert_close(member(dict(output.metrics), index), dict(one.metrics))
            assert member(output.control, index).reasons("stop") == one.control.reasons("stop")
    assert len({float(state.slots["total"]) for state in alone}) == 3
    assert [int(state.step) for state in alone] == [3, 2, 3]


def test_members_have_independent_dropout():
    torch.manual_seed(0)
    tx = fx.optim.sgd(0.0)
    state = fx.init(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), tx)
    step = fx.train_step(lambda model, batch: (model(batch) * torch.arange(4.0)).sum(), tx)
    states = [state.replace(seed=state.seed + index) for index in range(4)]
    losses = torch.vmap(step, (0, None))(stack(states), torch.ones(8, 4))[1].metrics["loss"]
    alone = torch.stack([step(state, torch.ones(8, 4))[1].metrics["loss"] for state in states])
    torch.testing.assert_close(losses, alone)  # a product of stacked matrices may be summed in another order
    assert losses.diff().abs().min() > 0.1


def test_vmapped_evaluation_equals_single_evaluations():
    states = members(problem.start())
    batch = problem.data()[0]
    together = torch.vmap(problem.eval_step, (0, None))(stack(states), batch).metrics
    for index, state in enumerate(states):
        torch.testing.assert_close(member(together, index), dict(problem.eval_step(state, batch).metrics))
