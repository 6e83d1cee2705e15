"""A batch of runs equals the runs one by one."""

import pytest
import torch
from batched_runs import COUNT, assert_same, data, eval_step, evaluation, starts, step, tx
from torch import nn

import fxtrain as fx
from fxtrain import ensemble, tree


def module_with_buffers_and_dropout():
    # No bias before batch norm, whose gradient is rounding error.
    layers = nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1)
    return nn.Sequential(*layers).double()


def assert_same_history(member, alone, ignore=("compile/",)):
    names = [{name for name in each if not name.startswith(ignore)} for each in (member, alone)]
    assert names[0] == names[1]
    for name in names[0]:
        assert member[name].steps.tolist() == alone[name].steps.tolist(), name
        ours, theirs = (torch.tensor(each[name].values) for each in (member, alone))
        torch.testing.assert_close(
            ours, theirs, rtol=1e-7, atol=1e-9, equal_nan=True, msg=lambda t, n=name: f"{n}: {t}"
        )


def assert_law(states=None, *, callbacks=(), settings=None, train=None, source=None, ignore=(), **options):
    """Trains a batch and each member alone. Returns the result of the batch and those of the members."""
    states = starts() if states is None else states
    train = train or step()
    source = data() if source is None else source
    together = fx.fit(ensemble.stack(states), train, source, callbacks=callbacks, **options)
    singles = []
    for index, state in enumerate(states):
        own = callbacks if settings is None else settings[index]
        alone = fx.fit(state, train, source, callbacks=own, **options)
        assert_same(ensemble.member(together.state, index), alone.state, ignore)
        assert_same_history(ensemble.history(together, index), alone.history)
        singles.append(alone)
    return together, singles


def test_batch_equals_single_runs():
    together, _ = assert_law(starts(make=module_with_buffers_and_dropout), epochs=2, **evaluation())
    assert together.reason == "finished 2 epochs"
    assert together.state.step.tolist() == [8] * COUNT


def test_one_member_equals_the_single_run():
    assert_law(starts(1, make=module_with_buffers_and_dropout), steps=5, **evaluation(eval_when=2))


def test_early_stopping_freezes_each_member_at_its_own_step():
    stop = fx.callbacks.early_stopping("loss", patience=1)
    together, singles = assert_law(callbacks=stop, epochs=4, **evaluation())
    steps = together.state.step.tolist()
    assert steps == [int(single.state.step) for single in singles]
    assert len(set(steps)) > 1


def test_batch_ends_when_all_members_have_stopped():
    def stops(state, event: fx.StepEnd):
        return state, fx.Control(stop=state.step >= state.seed + 2, reason="old enough")

    together, singles = assert_law(callbacks=stops, steps=50)
    assert together.state.step.tolist() == [2, 3, 4] == [int(single.state.step) for single in singles]
    assert together.reason == "all 3 members have stopped, the last: old enough"


def test_stop_inside_the_step_freezes_a_member():
    def stops(state, event: fx.Updated):
        return state, fx.Control(stop=event.step >= state.seed + 2, reason="old enough")

    together, _ = assert_law(train=step(callbacks=stops), steps=50)
    assert together.state.step.tolist() == [2, 3, 4]


def test_settings_differ_between_members():
    patience = torch.tensor([1, 2, 3])
    settings = [fx.callbacks.early_stopping("loss", patience=int(each)) for each in patience]
    stop = fx.callbacks.early_stopping("loss", patience=patience)
    together, _ = assert_law(callbacks=stop, settings=settings, steps=16, **evaluation(eval_when=1))
    assert len(set(together.state.step.tolist())) == 3


def test_gated_and_tolerant_callbacks_keep_the_settings_of_each_member():
    def stop(patience):
        stop = fx.callbacks.early_stopping("loss", patience=patience)
        return fx.tolerant(fx.when(lambda event: event.step > 4, stop))

    settings = [stop(each) for each in (1, 2, 3)]
    options = {"steps": 16, **evaluation(eval_when=1)}
    together, _ = assert_law(callbacks=stop(torch.tensor([1, 2, 3])), settings=settings, **options)
    assert len(set(together.state.step.tolist())) == 3


def test_scalar_tensor_is_a_setting():
    stop = fx.callbacks.early_stopping("loss", patience=torch.tensor(2))
    assert stop.function is not None
    with pytest.raises(ValueError, match="expected patience to be"):
        fx.callbacks.early_stopping("loss", patience=torch.tensor(0))


CALLBACKS = {
    "averages and monitors": lambda: [
        fx.callbacks.ema(0.9),
        fx.callbacks.swa(start=3),
        fx.callbacks.track_best("loss", "mae"),
        fx.callbacks.grad_norms(),
        fx.callbacks.epoch_mean("mae"),
    ],
    "guards": lambda: [
        fx.callbacks.nan_guard(patience=2),
        fx.callbacks.stop_on_overfitting("loss", patience=2),
        fx.callbacks.stop_on_divergence("loss"),
        fx.callbacks.stop_at("loss", 0.3),
    ],
    "schedules and weights": lambda: [
        fx.callbacks.reduce_on_plateau("loss", patience=0, factor=0.5),
        fx.callbacks.restore_best("loss"),
    ],
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_of_the_library_are_those_of_each_member(name):
    callbacks = [*CALLBACKS[name](), fx.callbacks.early_stopping("loss", patience=2)]
    assert_law(callbacks=callbacks, epochs=3, **evaluation())


def test_guard_skips_the_updates_of_one_member():
    def bad(model, batch):
        return (model["w"] * batch).sum() * torch.where(model["w"].sum() > 1, float("nan"), 1.0)

    sgd = fx.optim.sgd(0.1)
    states = [fx.init({"w": torch.full((2,), w, dtype=torch.float64)}, sgd) for w in (0.0, 5.0)]
    source = [torch.ones(2, dtype=torch.float64)] * 4
    train = fx.train_step(bad, sgd)
    guard = fx.callbacks.nan_guard(patience=3)
    together, singles = assert_law(states, train=train, source=source, callbacks=guard, steps=6)
    assert together.state.step.tolist() == [6, 3]
    assert singles[1].reason.startswith("loss or gradients were not finite 3 times in a row")


def test_callbacks_that_read_values_are_folded_one_by_one():
    def reads(state, event: fx.StepEnd, memory):
        if event.metrics["loss"].item() > 0.5:
            memory = memory + 1
        return memory, fx.Control(log={"high": memory}, stop=bool(memory > 3), reason="often high")

    assert_law(callbacks=fx.stateful("high", lambda state: torch.tensor(0), reads), steps=12)


def test_member_that_was_never_evaluated_has_no_evaluation():
    def stops(state, event: fx.StepEnd):
        return state, fx.Control(stop=state.seed == 0, reason="early")

    together, _ = assert_law(callbacks=stops, steps=4, **evaluation())
    assert together.state.slots["loop/evaluated"]["step"].tolist() == [-1, 4, 4]


def test_only_members_that_request_an_evaluation_see_it():
    def asks(state, event: fx.StepEnd):
        return state, fx.Control(evaluate=(state.step + state.seed) % 3 == 0)

    counts = fx.stateful(
        "evaluations", lambda state: torch.tensor(0), fx.on(fx.EvalEnd, lambda s, e, n: (n + e.step, fx.Control()))
    )
    together = fx.fit(
        ensemble.stack(starts()), step(), data(), callbacks=[asks, counts], steps=7, **evaluation(eval_when=fx.at(100))
    )
    assert together.state.slots["evaluations"].tolist() == [3 + 6, 2 + 5, 1 + 4 + 7]


@pytest.mark.parametrize("request_of", ["rewind", "end_epoch"])
def test_requests_that_move_the_data_position_are_refused_from_some_members(request_of):
    def asks(state, event: fx.StepEnd):
        one = (state.seed == 1) & (event.step == 4)
        return state, fx.Control(**{request_of: 2 * one if request_of == "rewind" else one}, reason="a spike")

    with pytest.raises(ValueError, match=rf"expected {request_of} of all members .* the members \[1\] \(a spike\)"):
        fx.fit(ensemble.stack(starts()), step(), data(), callbacks=asks, steps=8, snapshot_every=1)


@pytest.mark.parametrize("request_of", ["rewind", "end_epoch", "skip_batch"])
def test_requests_of_all_members_act_on_the_batch(request_of):
    event_type = fx.StepBegin if request_of == "skip_batch" else fx.StepEnd

    def asks(state, event, memory):
        due = event.position == 3
        flag = due and memory == 0 if request_of != "rewind" else torch.where(memory == 0, 2 * due, 0)
        return memory + due, fx.Control(**{request_of: flag}, reason="all")

    counts = fx.stateful("asked", lambda state: torch.tensor(0), fx.on(event_type, asks))

    def counted(state, event: fx.Rewound):
        return state.with_slot("asked", torch.ones_like(state.slots["asked"])), fx.Control()

    # The rewind itself is remembered, so that it is requested once.
    callbacks = [counts, counted] if request_of == "rewind" else [counts]
    assert_law(callbacks=callbacks, steps=9, snapshot_every=1)


def test_members_that_stopped_stay_as_they_are_in_a_rewind():
    def stops(state, event: fx.StepEnd):
        return state, fx.Control(stop=(state.seed == 0) & (state.step == 3), reason="early")

    def rewinds(state, event: fx.StepEnd, memory):
        due = event.step == 5
        return memory + due, fx.Control(rewind=torch.where(memory == 0, 4 * due, 0))

    def counted(state, event: fx.Rewound):
        return state.with_slot("asked", torch.ones_like(state.slots["asked"])), fx.Control()

    once = fx.stateful("asked", lambda state: torch.tensor(0), fx.on(fx.StepEnd, rewinds))
    options = {"steps": 7, "snapshot_every": 1, "snapshots": 9}
    together = fx.fit(ensemble.stack(starts()), step(), data(), callbacks=[stops, once, counted], **options)
    assert together.state.step.tolist() == [3, 7, 7]
    alone = fx.fit(starts()[0], step(), data(), steps=3)
    assert_same(ensemble.member(together.state, 0), alone.state, ignore=("slots",))


# Data


def test_members_train_on_data_of_their_own():
    sources = [data(seed=index) for index in range(COUNT)]
    eval_sources = [data(2, seed=10 + index) for index in range(COUNT)]
    options = {"epochs": 2, "eval_step": eval_step}
    together = fx.fit(
        ensemble.stack(starts()),
        step(),
        ensemble.per_member(sources),
        eval_data=ensemble.per_member(eval_sources),
        **options,
    )
    for index, state in enumerate(starts()):
        alone = fx.fit(state, step(), sources[index], eval_data=eval_sources[index], **options)
        assert_same(ensemble.member(together.state, index), alone.state)
        assert_same_history(ensemble.history(together, index), alone.history)


def test_sizes_of_per_member_data_that_mismatch_are_refused():
    runs = ensemble.stack(starts())
    with pytest.raises(
        ValueError, match=r"expected per-member batches with a leading axis of 3 members, got .*2, 6, 4"
    ):
        fx.fit(runs, step(), ensemble.per_member([data(), data()]), steps=1)
    with pytest.raises(ValueError, match="expected sources with as many batches per epoch, got 4, 3"):
        ensemble.per_member([data(4), data(3)])
    with pytest.raises(ValueError, match=r"expected batches of one shape for all members, got .*batch\['x'\]"):
        fx.fit(runs, step(), ensemble.per_member([data(), data(), data(size=5)]), steps=1)


def test_evaluate_takes_a_batch_of_runs():
    values = fx.evaluate(ensemble.stack(starts()), eval_step, data(2))
    for index, state in enumerate(starts()):
        for name, value in fx.evaluate(state, eval_step, data(2)).items():
            assert values[f"{name}/member_{index}"] == pytest.approx(value, rel=1e-9)


# Callbacks across members


def test_across_sees_all_members():
    def exploit(state, event: fx.StepEnd):
        order = event.metrics["loss"].argsort()
        source = torch.arange(len(order)).index_copy(0, order[-1:], order[:1])
        params = tree.map(lambda leaf: leaf[source], state.params)
        return state.replace(params=params), fx.Control(log={"from": source}, stop=event.step == 3, reason="enough")

    together = fx.fit(ensemble.stack(starts()), step(), data(), steps=9, callbacks=ensemble.across(exploit))
    assert together.state.step.tolist() == [3, 3, 3]
    sources = [together.history[f"from/member_{index}"].values[-1] for index in range(COUNT)]
    assert len(set(sources)) == COUNT - 1
    first, second = (int(index) for index in [i for i, s in enumerate(sources) if sources.count(s) == 2])
    assert bool((together.state.params["0.weight"][first] == together.state.params["0.weight"][second]).all())


def test_gated_callback_across_members_sees_all_of_them():
    def same(state, event: fx.StepEnd):
        assert event.metrics["loss"].shape == (COUNT,)
        return state.replace(params=tree.map(lambda leaf: leaf[:1].expand_as(leaf), state.params)), fx.Control()

    gated = fx.when(fx.every(2), ensemble.across(same))
    weight = fx.fit(ensemble.stack(starts()), step(), data(), steps=2, callbacks=gated).state.params["0.weight"]
    assert bool((weight == weight[0]).all())


# Compiled


def test_compiled_batch_equals_the_uncompiled_one():
    # A model of one weight keeps the compilation short.
    def square(model, batch):
        return (model["w"] * batch["x"] - batch["y"]).square().mean()

    sgd = fx.optim.sgd(0.1)
    states = [fx.init({"w": torch.tensor(w, dtype=torch.float64)}, sgd, seed=i) for i, w in enumerate((0.0, 3.0))]
    pure, measure = fx.train_step(square, sgd), fx.eval_step(square)
    stop = fx.callbacks.stop_at("loss", 0.5, on=fx.StepEnd)
    options = {"callbacks": stop, "epochs": 2, "eval_data": data(2, seed=1)}
    runs = ensemble.stack(states)
    expected = fx.fit(runs, pure, data(), eval_step=measure, **options)
    compiled = fx.compile(pure, backend="eager"), fx.compile(measure, backend="eager")
    found = fx.fit(runs, compiled[0], data(), eval_step=compiled[1], **options)
    assert_same(found.state, expected.state)
    assert found.state.step.tolist() == [2, 8]


# Errors


def test_errors_of_stacking():
    states = starts()
    with pytest.raises(ValueError, match="expected the states of one or more runs, got none"):
        ensemble.stack([])
    with pytest.raises(TypeError, match="expected a list of the states of single runs, got a TrainState"):
        ensemble.stack(states[0])
    with pytest.raises(TypeError, match=r"expected a TrainState in fxtrain.ensemble.stack"):
        ensemble.stack([states[0], 3])
    other = fx.init(nn.Linear(4, 1).double(), tx)
    with pytest.raises(ValueError, match=r"expected states of one structure, got .* at index 1"):
        ensemble.stack([states[0], other])
    with pytest.raises(IndexError, match="expected the index of one of 3 members, got 3"):
        ensemble.member(ensemble.stack(states), 3)
    with pytest.raises(IndexError, match="expected the index of one of 3 members, got -4"):
        ensemble.member(ensemble.stack(states), -4)
    with pytest.raises(TypeError, match=r"expected the index of a member to be an int, got 0\.5"):
        ensemble.member(ensemble.stack(states), 0.5)
    with pytest.raises(ValueError, match="expected the state of a batch of runs, got that of one run"):
        ensemble.member(states[0], 0)


def test_members_at_different_steps_are_refused():
    states = starts()
    states[1] = fx.fit(states[1], step(), data(), steps=2).continue_from
    states[0] = fx.fit(states[0], step(), data(), steps=1).continue_from
    with pytest.raises(ValueError, match=r"at one step and data position.* got steps \[1, 2\]"):
        fx.fit(ensemble.stack(states[:2]), step(), data(), steps=5)


def test_settings_for_another_number_of_members_are_refused():
    # Before the first step: nothing is evaluated until step 100.
    options = {"steps": 5, **evaluation(eval_when=100)}
    stop = fx.callbacks.early_stopping("loss", patience=torch.tensor([1, 2]))
    for callback in (stop, fx.when(2, stop)):
        with pytest.raises(
            ValueError, match="expected one value of each setting of early_stopping for each of 3 members, got 2"
        ):
            fx.fit(ensemble.stack(starts()), step(), data(), callbacks=callback, **options)
        with pytest.raises(ValueError, match="expected the state of 2 runs for early_stopping"):
            fx.fit(starts()[0], step(), data(), callbacks=callback, **options)
    with pytest.raises(ValueError, match="expected one value of patience for nan_guard"):
        fx.callbacks.nan_guard(patience=torch.tensor([1, 2]))
