"""States of a batch of runs: models of their own, saved states, and members that have stopped in events and rewinds."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from batched_runs import assert_same, data, evaluation, loss_fn, module, starts, step
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations

import fxtrain as fx
from fxtrain import ensemble


def stops_at(step):
    def stop(state, event: fx.StepEnd):
        return state, fx.Control(stop=(state.seed == 0) & (event.step == step), reason="early")

    return stop


CALLS = {
    "step(state, batch)": lambda runs, batch: step()(runs, batch),
    "compiled step(state, batch)": lambda runs, batch: fx.compile(step())(runs, batch),
    "eval_step(measure)(state, batch)": lambda runs, batch: fx.eval_step(loss_fn)(runs, batch),
    "view(state)": lambda runs, _: fx.view(runs),
    "attach(state, callbacks)": lambda runs, _: fx.attach(runs, fx.callbacks.ema(0.9)),
    "explain(step, state, batch)": lambda runs, batch: fx.explain(step(), runs, batch),
    "find_learning_rate(state, step, data)": lambda runs, batch: fx.finders.find_learning_rate(runs, step(), [batch]),
    "find_batch_size(state, step, make_batch)": lambda runs, batch: fx.finders.find_batch_size(
        runs, step(), lambda size: batch
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_call_for_one_run_refuses_several(call):
    with pytest.raises(TypeError) as caught:
        CALLS[call](ensemble.stack(starts(3)), data()[0])
    assert str(caught.value) == (
        f"expected the state of one run in {call.removeprefix('compiled ')}, got one of 3 runs. Train them together "
        "with fxtrain.fit, or take one out: fxtrain.ensemble.member(state, index)."
    )


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"x": torch.ones(2)}, {"x": torch.ones(2).double()}, r"one dtype .* float32 .*\['x'\] .* float64 .* member 1"),
        ({"x": torch.ones(2)}, {"y": torch.ones(2)}, r"one structure .*\['x'\] for member 0 only, not for member 1"),
        ({"x": torch.ones(2), "s": "a"}, {"x": torch.ones(2), "s": "b"}, r"of tensors .* got 'a' at batch\['s'\]"),
    ],
)
def test_batches_of_members_that_cannot_be_stacked_are_refused(first, second, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ensemble.per_member([[first], [second]])[0]


@pytest.mark.parametrize(
    "members", [None, slice(0, 2), ["a"], [True, 2], torch.tensor([1, 0, 1], dtype=torch.uint8), {0}]
)
def test_members_that_are_neither_indices_nor_a_mask_are_refused(members):
    runs = ensemble.stack(starts(3))
    with pytest.raises(TypeError, match=r"expected one or more indices of members, got .* Give ints or a mask"):
        ensemble.select(runs, members)


@pytest.mark.parametrize(
    ("make", "members", "message"),
    [
        (lambda: nn.Linear(4, 1), [0], r"got no such leaf for float64 \[8\] at state.params\['0.bias'\] of each"),
        (lambda: module().float(), [0], r"got float32 \[8\] for float64 \[8\] at state.params\['0.bias'\] of each"),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)).double(), [0], "another architecture"),
        (module, [1, 1], r"each member once, got \[1, 1\]"),
    ],
)
def test_members_of_another_kind_are_not_put(make, members, message):
    others = ensemble.stack(starts(len(members), make=make))
    with pytest.raises(ValueError, match=message):
        ensemble.put(ensemble.stack(starts(3)), members, others)


@pytest.mark.parametrize("read", [torch.Tensor.item, torch.Tensor.numpy, lambda mean: mean[mean > 0].sum()])
@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_step_that_reads_a_value_says_that_runs_share_a_call(where, read):
    def reading(model, batch):
        loss, metrics = loss_fn(model, batch)
        return loss + 0 * read(loss.detach()), metrics

    step_of = fx.train_step(reading if where == "step" else loss_fn, fx.optim.sgd(0.1))
    options = evaluation(eval_step=fx.eval_step(reading)) if where == "evaluation" else {}
    runs = ensemble.stack([fx.init(module(), fx.optim.sgd(0.1)) for _ in range(2)])
    with pytest.raises(RuntimeError) as caught:
        fx.fit(runs, step_of, data(), steps=1, **options)
    assert "The 2 runs of a batch take a step in one call of torch.func.vmap" in "".join(caught.value.__notes__)


# Models that are made separately


class WithConstant(nn.Module):
    def __init__(self, scale=2.0):
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.scale = torch.full((1,), scale)

    def forward(self, x):
        return self.linear(x) * self.scale


class Recurrent(nn.Module):
    def __init__(self, kind=nn.GRU):
        super().__init__()
        self.cells = kind(4, 3, batch_first=True)
        self.head = nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.cells(x[:, None])[0][:, -1])


MODELS = {
    "gru": Recurrent,
    "lstm": lambda: Recurrent(nn.LSTM),
    "bidirectional": lambda: nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 1, num_layers=2, bidirectional=True)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 1)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 1)),
    "constant tensor": WithConstant,
    "state dict hook": lambda: hooked(nn.Linear(4, 1)),
}


def hooked(layer):
    layer.register_state_dict_post_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_models_of_one_configuration_are_stacked(make):
    states = [fx.init(make(), seed=seed) for seed in range(2)]
    assert states[0].model == states[1].model
    assert ensemble.stack(states).seed.tolist() == [0, 1]


def test_other_tensors_are_another_model():
    first, second = (fx.init(WithConstant(scale)) for scale in (1.0, 2.0))
    assert first.model != second.model
    assert fx.init(Recurrent(nn.GRU)).model != fx.init(Recurrent(nn.RNN)).model
    bare = nn.Linear(4, 1)
    assert fx.init(bare).model != fx.init(parametrizations.weight_norm(nn.Linear(4, 1))).model


def test_recurrent_members_train_as_alone():
    tx = fx.optim.adam(0.01)
    train = fx.train_step(loss_fn, tx)
    states = [fx.init(Recurrent(nn.LSTM).double(), tx, seed=seed) for seed in range(2)]
    together = fx.fit(ensemble.stack(states), train, data(), steps=3)
    for index, state in enumerate(states):
        alone = fx.fit(state, train, data(), steps=3)
        assert_same(ensemble.member(together.continue_from, index), alone.continue_from)


def test_model_that_cannot_be_compared_is_replaced():
    class WithObject(nn.Linear):
        def __init__(self):
            super().__init__(4, 1)
            self.logger = SimpleNamespace(rows=0)

    states = [fx.init(WithObject(), seed=seed) for seed in range(2)]
    with pytest.raises(ValueError, match=r"need one model for all: state\.replace\(model=states\[0\]\.model\)"):
        ensemble.stack(states)
    ensemble.stack([state.replace(model=states[0].model) for state in states])


# Saved states


def adam_starts(count=3):
    tx = fx.optim.adam(0.01)  # counts updates of each parameter
    states = [fx.init(module(), tx, seed=seed) for seed in range(count)]
    return states, fx.train_step(loss_fn, tx)


@pytest.mark.parametrize("save", ["save", "checkpointer"])
@pytest.mark.parametrize("steps", [2, 4, 6])
def test_stacked_state_is_saved_and_restored(tmp_path, save, steps):
    states, train = adam_starts()
    result = fx.fit(ensemble.stack(states), train, data(), steps=steps, callbacks=stops_at(1))
    if save == "save":
        restored = fx.restore(fx.save(tmp_path / "state", result.state), like=ensemble.stack(states))
    else:
        with fx.checkpointer(tmp_path) as checkpointer:
            assert checkpointer.save(result.state).role == "trajectory"
        assert checkpointer.steps() == [steps]
        restored = checkpointer.restore(like=ensemble.stack(states))
    assert not result.state.diff(restored)


@pytest.mark.parametrize("ended_at", [1, 4])
def test_resume_continues_counts_of_parameters(tmp_path, ended_at):
    states, train = adam_starts()

    def run(steps, **more):
        return fx.fit(ensemble.stack(states), train, data(), steps=steps, callbacks=stops_at(1), **more).state

    run(ended_at, checkpointer=fx.checkpointer(tmp_path))
    assert not run(6).diff(run(6, checkpointer=fx.checkpointer(tmp_path), resume=True))


def test_counts_of_parameters_are_restored_by_name(tmp_path):
    states, train = adam_starts()
    result = fx.fit(ensemble.stack(states), train, data(), steps=2)
    path = fx.save(tmp_path / "state", result.state)
    fresh = fx.restore(path, like=ensemble.stack(states), fresh="0.*")
    own, saved = fresh.opt_state[0].count, result.state.opt_state[0].count
    kept = [path[0].startswith("2.") for path in own.paths]
    assert sorted(kept) == [False, False, True, True]
    assert own.values.tolist() == [[2 if keep else 0 for keep in kept]] * 3
    assert saved.values.tolist() == [[2] * 4] * 3


# Metrics of an epoch that continues


class Range(fx.metrics.Metric):
    count: torch.Tensor
    rows: torch.Tensor
    total: torch.Tensor

    def merge(self, other):
        return Range(self.count + other.count, self.rows + other.rows, self.total + other.total)

    def compute(self):
        return {"mean": self.total / self.count, "rows": self.rows.sum()}


def measuring(model, batch):
    error = (model(batch["x"]) - batch["y"]).abs()
    one = torch.ones_like(error.mean())
    metrics = {"error": fx.metrics.Average.from_model_output(error), "range": Range(one, error[:, 0], error.sum())}
    return error.square().mean(), metrics


def test_epoch_metrics_continue_from_every_form_of_the_state():
    tx = fx.optim.sgd(0.01)
    train = fx.train_step(measuring, tx)
    states = [fx.init(module(), tx, seed=seed) for seed in range(2)]

    def run(state, steps):
        means = []

        def see(state, event: fx.EpochEnd, control):
            means.append({name: float(value) for name, value in event.metrics.items()})

        return fx.fit(state, train, data(), steps=steps, observers=see).continue_from, means

    _, expected = run(ensemble.stack(states), 4)
    half, none = run(ensemble.stack(states), 2)
    assert not none
    assert run(half, 4)[1] == expected
    assert {"error/member_1", "range/mean/max", "range/rows"} <= expected[0].keys()
    for index, state in enumerate(states):
        (alone,) = run(run(state, 2)[0], 4)[1]
        assert run(ensemble.member(half, index), 4)[1] == [pytest.approx(alone)]
        assert {name: expected[0][f"{name}/member_{index}"] for name in alone} == pytest.approx(alone)
    assert run(ensemble.stack([run(state, 2)[0] for state in states]), 4)[1] == [pytest.approx(expected[0])]


# Members that have stopped


def counting(kind, name="number"):
    return fx.stateful(name, lambda state: torch.tensor(0), fx.on(kind, lambda state, event, n: (n + 1, fx.Control())))


def test_stopped_member_sees_no_step_again_after_a_rewind():
    def rewinds(state, event: fx.StepEnd):
        return state, fx.Control(rewind=4 * ((event.step == 5) & (state.slots["rewound"] == 0)))

    callbacks = [stops_at(3), counting(fx.Rewound, "rewound"), rewinds, counting(fx.StepEnd)]
    runs = ensemble.stack(starts(2))
    result = fx.fit(runs, step(), data(), steps=7, snapshot_every=1, snapshots=9, callbacks=callbacks)
    assert result.state.step.tolist() == [3, 7]
    assert result.state.slots["number"].tolist() == [3, 7]


def test_stopped_member_that_is_ahead_sees_no_step_of_the_others():
    first = fx.fit(ensemble.stack(starts(2)), step(), data(), steps=2, callbacks=counting(fx.StepEnd)).state
    ahead = fx.fit(first, step(), data(), steps=4, callbacks=[stops_at(4), counting(fx.StepEnd)]).state
    mixed = ensemble.put(first, [0], ensemble.select(ahead, [0]))
    assert mixed.step.tolist() == [4, 2]
    later = fx.fit(mixed, step(), data(), steps=6, callbacks=counting(fx.StepEnd)).state
    assert later.step.tolist() == [4, 6]
    assert later.slots["number"].tolist() == [4, 6]


@pytest.mark.parametrize("kind", [fx.EpochBegin, fx.StepBegin])
@pytest.mark.parametrize("stops_on", [fx.StepEnd, fx.EpochBegin, fx.StepBegin])
def test_stopped_member_sees_no_later_publication(kind, stops_on):
    def stops(state, event):
        return state, fx.Control(stop=(state.seed == 0) & (event.step == 4), reason="early")

    logs = fx.on(kind, lambda state, event: (state, fx.Control(log={"began": 1.0})))
    callbacks = [logs, fx.on(stops_on, stops), counting(fx.Published)]
    states = starts(2)
    together = fx.fit(ensemble.stack(states), step(), data(), epochs=3, callbacks=callbacks)
    for index, state in enumerate(states):
        alone = fx.fit(state, step(), data(), epochs=3, callbacks=callbacks)
        assert together.state.slots["number"][index] == alone.state.slots["number"]


def test_epoch_at_whose_begin_a_member_stopped_begins_once():
    def stops(state, event: fx.EpochBegin):
        return state, fx.Control(stop=(state.seed == 1) & (event.step == 4), reason="early")

    states, seen = starts(2), []
    together = fx.fit(ensemble.stack(states), step(), data(), epochs=3, callbacks=stops)
    alone = fx.fit(states[1], step(), data(), epochs=3, callbacks=stops)
    member = ensemble.member(together.state, 1)
    assert_same(member, alone.continue_from)

    def see(state, event: fx.EpochBegin | fx.EpochEnd, control):
        seen.append((type(event), event.step))

    fx.fit(member, step(), data(), epochs=2, observers=see)
    assert seen == [(fx.EpochEnd, 8)]


# What one run has and a batch does not


@pytest.mark.parametrize(("worst", "mode"), [(float("inf"), "min"), (float("-inf"), "max")])
def test_nan_is_not_better_than_infinity(worst, mode):
    tx = fx.optim.sgd(0.0)
    runs = ensemble.stack([fx.init({"w": torch.tensor(w)}, tx) for w in (float("nan"), worst)])
    result = fx.fit(runs, fx.train_step(lambda model, batch: model["w"] * batch, tx), [torch.ones(())], steps=1)
    assert ensemble.best(result, "train/loss", mode=mode).params["w"] == worst


def test_best_checkpoint_of_a_batch_is_refused_before_the_first_step(tmp_path):
    checkpointer = fx.checkpointer(tmp_path, best="loss")
    callback = fx.callbacks.restore_best("loss", checkpointer=checkpointer)
    with pytest.raises(ValueError, match=r"got restore_best, which is for one run\. Leave out checkpointer="):
        fx.fit(ensemble.stack(starts()), step(), data(), callbacks=callback, steps=2, **evaluation())


@pytest.mark.parametrize(("best", "step_of_best"), [("loss", 2), ("loss/min", 3), ("loss/member_0", 1)])
def test_checkpoint_of_a_batch_is_selected_by_a_summary_or_a_member(best, step_of_best, tmp_path):
    # w: 0.8, 1.8, 2.8 and -2, -1, 0
    tx, data = fx.optim.sgd(1.0), [torch.ones(())]
    checkpointer = fx.checkpointer(tmp_path, best=best, keep=1)
    fx.fit(
        ensemble.stack([fx.init({"w": torch.tensor(w)}, tx) for w in (-0.2, -3.0)]),
        fx.train_step(lambda model, batch: -model["w"] * batch, tx),
        data,
        steps=3,
        callbacks=fx.callbacks.save(),
        eval_step=fx.eval_step(lambda model, batch: model["w"].square() * batch),
        eval_data=data,
        eval_when=1,
        checkpointer=checkpointer,
    )
    assert checkpointer.best() == step_of_best


def test_export_of_a_batch_needs_the_view_of_a_member(tmp_path):
    options = {"callbacks": fx.callbacks.track_best("loss"), "epochs": 3, **evaluation()}
    runs = ensemble.stack(starts())
    with pytest.warns(RuntimeWarning, match=r"Choose a member: export\(folder, view=lambda state: fxtrain\.ensemble"):
        fx.fit(runs, step(), data(), observers=fx.observers.export(tmp_path / "all", "end"), **options)
    assert not (tmp_path / "all").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export = fx.observers.export(tmp_path / "one", "end", view=lambda state: ensemble.member(state, 1))
        result = fx.fit(runs, step(), data(), observers=export, **options)
    weights = load_file(tmp_path / "one" / "model.safetensors")
    torch.testing.assert_close(weights["0.weight"], result.state.params["0.weight"][1], rtol=0, atol=0)


def test_members_are_put_back_from_another_part_of_the_epoch():
    runs = fx.fit(ensemble.stack(starts()), step(), data(), steps=6, callbacks=stops_at(1), **evaluation()).state
    assert "loop/epoch_metrics" in runs.slots
    assert runs.slots["loop/evaluated"]["step"].tolist() == [-1, 6, 6]
    few = fx.fit(ensemble.select(runs, [1, 2]), step(), data(), steps=8, eval_step=None).continue_from
    both = ensemble.put(runs, [1, 2], few)
    assert both.step.tolist() == [1, 8, 8]
    assert both.slots["loop/evaluated"]["step"].tolist() == [-1, 6, 6]
    assert fx.fit(both, step(), data(), steps=9).state.step.tolist() == [1, 9, 9]
    fresh = fx.fit(ensemble.stack(starts()[1:]), step(), data(), steps=8).continue_from
    unevaluated = ensemble.put(runs, [1, 2], fresh).slots["loop/evaluated"]
    assert unevaluated["step"].tolist() == [-1, -1, -1]
    assert unevaluated["metrics"]["loss"].isnan().all()
