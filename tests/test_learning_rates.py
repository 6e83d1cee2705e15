"""The learning rate that steps log: the value that the update uses, for every way to give it."""

import json
import re

import problem
import pytest
import torch

import fxtrain as fx
from fxtrain import optim, schedules

DECAY = schedules.linear(0.5, 0.1, transition_steps=8)


def summed(model, batch):
    """A loss whose gradient is 1 in every element, so that plain SGD moves parameters by the learning rate."""
    return sum(value.sum() for value in model.values()) + 0.0 * batch


def by_name(path, leaf):
    return path


def run(tx, steps=4, loss_fn=summed, params=("a", "b")):
    """Returns, for each step, how far each parameter moved, and the metrics."""
    state = fx.init({name: torch.tensor(0.0) for name in params}, tx)
    step, rows = fx.train_step(loss_fn, tx), []
    for _ in range(steps):
        new, output = step(state, torch.tensor(1.0))
        moved = {name: float(state.params[name] - new.params[name]) for name in params}
        rows.append((moved, {name: float(value) for name, value in output.metrics.items() if name != "loss"}))
        state = new
    return rows


@pytest.mark.parametrize(
    "tx",
    [
        optim.sgd(0.5),
        optim.sgd(torch.tensor(0.5)),
        optim.sgd(DECAY),
        optim.sgd(lambda step: 0.5),
        optim.chain(optim.clip_by_value(1.0), optim.sgd(DECAY)),
        optim.masked(optim.sgd(DECAY), lambda path, leaf: True),
        optim.apply_if_finite(optim.sgd(DECAY), max_consecutive=2),
        optim.lookahead(optim.sgd(DECAY), period=100),
        optim.split_real_and_imaginary(optim.sgd(DECAY)),
        optim.inject_hyperparams(optim.sgd)(DECAY),
        optim.inject_hyperparams(optim.sgd)(0.5),
        optim.from_torch(torch.optim.SGD, lr=0.5),
        optim.partition({"a": optim.sgd(DECAY), "b": optim.sgd(DECAY)}, by_name),
        optim.partition({"a": optim.sgd(0.5), "b": optim.inject_hyperparams(optim.sgd)(0.5)}, by_name),
    ],
    ids=repr,
)
def test_logged_learning_rate_is_the_one_used(tx):
    for moved, rates in run(tx):
        assert rates
        for name, distance in moved.items():
            logged = rates.get("learning_rate", rates.get(f"learning_rate/{name}"))
            assert logged == pytest.approx(distance)


@pytest.mark.parametrize(
    ("tx", "names"),
    [
        (
            optim.partition({"a": optim.sgd(DECAY), "b": optim.sgd(0.1)}, by_name),
            ["learning_rate/a", "learning_rate/b"],
        ),
        (optim.partition({"a": optim.sgd(DECAY), "b": optim.set_to_zero()}, by_name), ["learning_rate"]),
        (optim.partition({"a": optim.sgd(0.1), "b": optim.adam(0.1)}, by_name), ["learning_rate"]),
        (optim.unfreeze(optim.sgd(0.1), {"a": 0, "*": 2}), ["learning_rate"]),
        (optim.unfreeze(optim.sgd(DECAY), {"a": 0, "*": 2}), ["learning_rate/a", "learning_rate/*"]),
        (
            optim.chain(
                optim.masked(optim.sgd(0.1), {"a": True, "b": False}),
                optim.masked(optim.sgd(0.2), {"a": False, "b": True}),
            ),
            ["learning_rate/0", "learning_rate/1"],
        ),
        (
            optim.partition(
                {
                    "a": optim.sgd(0.1),
                    "b": optim.partition({"x": optim.sgd(0.2), "y": optim.sgd(0.3)}, lambda path, leaf: "x"),
                },
                by_name,
            ),
            ["learning_rate/a", "learning_rate/b/x", "learning_rate/b/y"],
        ),
        (optim.muon(0.1, adam_learning_rate=0.2), ["learning_rate/muon", "learning_rate/adam"]),
        (optim.muon(DECAY), ["learning_rate"]),
        (optim.adafactor(0.1), ["learning_rate"]),
        (optim.adafactor(), []),
        (optim.rprop(0.1), []),
        (optim.chain(optim.scale_by_adam(), optim.scale(-0.1)), []),
    ],
    ids=str,
)
def test_learning_rates_of_groups_have_the_names_of_the_groups(tx, names):
    assert [list(rates) for _, rates in run(tx, steps=1)] == [names]


def test_learning_rate_of_a_group_follows_the_steps_at_which_the_group_trains():
    rates = [rates for _, rates in run(optim.unfreeze(optim.sgd(DECAY), {"a": 0, "*": 2}))]
    assert [row["learning_rate/a"] for row in rates] == pytest.approx([0.5, 0.45, 0.4, 0.35])
    assert [row["learning_rate/*"] for row in rates] == pytest.approx([0.5, 0.5, 0.5, 0.45])


def test_learning_rate_counts_updates_of_an_accumulation():
    rates = [rates["learning_rate"] for _, rates in run(optim.every_k(optim.sgd(DECAY), 2))]
    assert rates == pytest.approx([0.5, 0.5, 0.45, 0.45])


@pytest.mark.parametrize(
    ("optimizer", "options", "expected"),
    [
        (torch.optim.Adafactor, {"lr": 0.8}, [0.8, 2**-0.5, 3**-0.5]),
        (torch.optim.ASGD, {"lr": 0.5, "lambd": 1.0, "alpha": 1.0}, [0.5, 0.5 / 1.5, 0.5 / 2.0]),
    ],
)
def test_learning_rate_is_the_step_size_where_that_shrinks_by_itself(optimizer, options, expected):
    rates = [rates["learning_rate"] for _, rates in run(optim.from_torch(optimizer, **options), steps=3)]
    assert rates == pytest.approx(expected)


def test_set_hyperparameter_is_logged():
    tx = optim.inject_hyperparams(optim.sgd)(0.5)
    state = fx.init({"a": torch.tensor(0.0)}, tx)
    state = state.replace(opt_state=optim.set_hyperparams(state.opt_state, learning_rate=0.25))
    _, output = fx.train_step(summed, tx)(state, torch.tensor(1.0))
    assert float(output.metrics["learning_rate"]) == 0.25


def test_metric_of_the_loss_function_takes_precedence():
    rows = run(optim.sgd(0.5), 1, lambda model, batch: (summed(model, batch), {"learning_rate": torch.tensor(7.0)}))
    assert [rates for _, rates in rows] == [{"learning_rate": 7.0}]


def test_metric_shares_no_storage_with_the_state():
    tx = optim.inject_hyperparams(optim.sgd)(0.5)
    state = fx.init({"a": torch.tensor(0.0)}, tx)
    rate = optim.learning_rates(tx, state)["learning_rate"]
    rate.fill_(7.0)
    assert float(state.opt_state.hyperparams["learning_rate"]) == 0.5


def test_dtype_is_at_least_float32_and_that_of_wide_parameters():
    dtypes = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        state = fx.init({"a": torch.zeros((), dtype=dtype)}, tx := optim.sgd(DECAY))
        dtypes[dtype] = optim.learning_rates(tx, state)["learning_rate"].dtype
    assert list(dtypes.values()) == [torch.float32, torch.float32, torch.float64]


def test_several_transformations_give_one_learning_rate_each():
    tx = {"generator": optim.adam(DECAY), "critic": {"a": optim.sgd(0.1), "b": optim.sgd(0.2)}}
    state = fx.init({"generator": torch.tensor(0.0), "critic": {"a": torch.tensor(0.0), "b": torch.tensor(0.0)}}, tx)
    found = optim.learning_rates(tx, state)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {"learning_rate/generator": 0.5, "learning_rate/critic/a": 0.1, "learning_rate/critic/b": 0.2}
    )


@pytest.mark.parametrize(
    ("tx", "given", "error", "message"),
    [
        (
            optim.sgd(DECAY),
            optim.chain(),
            ValueError,
            "expected state.opt_state to be the state of sgd(linear(0.5, 0.1, transition_steps=8)), got a tuple of (). "
            "Pass the transformation given to fx.init.",
        ),
        (
            {"a": 0.1},
            optim.sgd(0.1),
            TypeError,
            "expected tx to be a gradient transformation, got 0.1. Build one with fx.optim, such as fx.optim.sgd(0.1).",
        ),
    ],
)
def test_other_transformation_than_that_of_the_state_is_rejected(tx, given, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        optim.learning_rates(tx, fx.init({"a": torch.tensor(0.0)}, given))


def test_user_made_transformation_states_its_learning_rate():
    rate = optim.LearningRate(0.5, lambda opt_state: 0.5)
    plain = optim.scale(-0.5)
    tx = optim.chain(optim.clip_by_value(1.0), optim.GradientTransformation(plain.init, plain.update, (rate,)))
    assert [rates for _, rates in run(tx, 1)] == [{"learning_rate": 0.5}]


def test_history_and_traced_callbacks_see_the_learning_rate():
    tx = optim.adamw(DECAY)
    step = fx.train_step(problem.loss_fn, tx)
    state = fx.init(problem.module(), tx)
    result = fx.fit(state, step, problem.data(), steps=4, callbacks=fx.callbacks.epoch_mean("learning_rate"))
    assert result.history["train/learning_rate"].values == pytest.approx([0.5, 0.45, 0.4, 0.35])
    assert result.history["epoch/learning_rate"].values == pytest.approx([0.45])  # the mean of the first epoch


def test_json_lines_have_the_learning_rate(tmp_path):
    tx = optim.adamw(DECAY)
    observer = fx.observers.write(fx.writers.jsonl(tmp_path / "metrics.jsonl"))
    state = fx.init(problem.module(), tx)
    fx.fit(state, fx.train_step(problem.loss_fn, tx), problem.data(), steps=2, observers=[observer])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [
        line["metrics"]["train/learning_rate"] for line in lines if "train/learning_rate" in line.get("metrics", {})
    ]
    assert rates == pytest.approx([0.5, 0.45])


@pytest.mark.parametrize(
    "tx",
    [optim.sgd(0.5), optim.inject_hyperparams(optim.adamw)(DECAY), optim.unfreeze(optim.sgd(DECAY), {"0*": 0, "*": 1})],
    ids=repr,
)
def test_whole_step_compiles_to_one_graph_with_the_learning_rate(tx):
    torch._dynamo.reset()
    step = fx.train_step(problem.loss_fn, tx)
    state, batch = fx.init(problem.module(), tx), problem.data()[0]
    expected = step(state, batch)[1].metrics
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(state, batch)[1].metrics
    torch.testing.assert_close(dict(found), dict(expected))
