"""Steps that train several models: events that name the model, monitors and guards for each, and subscriptions."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxtrain as fx
from fxtrain import callbacks as cb
from fxtrain import testing

NAMES = ("discriminator", "generator")
RATE = fx.schedules.linear(0.1, 0.0, transition_steps=10)
TX = {"generator": fx.optim.adam(2e-2), "discriminator": fx.optim.sgd(RATE)}
DATA = list(torch.randn(6, 8, 2, generator=torch.Generator().manual_seed(0)) * 0.1 + 1)


def discriminator_loss(model, batch):
    made = model["generator"](torch.randn(len(batch), 2))
    loss = model["discriminator"](made).exp().mean() - model["discriminator"](batch).mean()
    return loss, {"size": made.abs().mean()}


def generator_loss(model, batch):
    return -model["discriminator"](model["generator"](torch.randn(len(batch), 2))).mean()


def build(callbacks):
    find = {
        "discriminator": fx.gradients(discriminator_loss, wrt="discriminator"),
        "generator": fx.gradients(generator_loss, wrt="generator"),
    }

    def gan(state, batch):
        found = find["discriminator"](state, batch)
        state, first = fx.step.update(state, found, TX["discriminator"], callbacks, wrt="discriminator")
        found = find["generator"](state, batch, 1)
        state, second = fx.step.update(state, found, TX["generator"], callbacks, wrt="generator", control=first.control)
        metrics = {"loss": second.metrics["loss"], "discriminator_loss": first.metrics["loss"]}
        return state, fx.StepOutput(metrics, second.control)

    return fx.Step(gan, callbacks=callbacks, fires=[fx.Gradients, fx.Updated], rebuild=build)


def start(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)]
        return fx.init({"generator": nn.Sequential(*layers), "discriminator": nn.Linear(2, 1)}, TX, seed=seed)


def fit(*callbacks, step=None, data=DATA, **options):
    return fx.fit(start(), step or build(fx.compose()), data, callbacks=callbacks, **{"steps": 6, **options})


def grads_of_first_step():
    state = start()
    first = fx.gradients(discriminator_loss, wrt="discriminator")(state, DATA[0])
    state, _ = fx.step.apply_gradients(state, first.grads, TX["discriminator"], wrt="discriminator")
    second = fx.gradients(generator_loss, wrt="generator")(state, DATA[0], 1)
    return {"discriminator": first.grads, "generator": second.grads}


@pytest.mark.parametrize("compiled", [False, True])
def test_grad_norms_are_published_for_each_model(compiled):
    step = fx.compile(build(fx.compose()), backend="aot_eager") if compiled else None
    history = fit(cb.grad_norms(layer="*"), step=step, steps=1).history
    for name, grads in grads_of_first_step().items():
        total = float(fx.tree.global_norm(grads))
        assert history[f"grad_norm/{name}/total"].values == pytest.approx([total], rel=1e-5)
    layers = {"generator/0", "generator/2", "discriminator/weight", "discriminator/bias"}
    assert {f"grad_norm/{layer}" for layer in layers} <= set(history)


def test_all_monitors_publish_under_the_model_name():
    monitors = [cb.grad_norms(), cb.weight_stats(), cb.update_ratios(), cb.watch("parameters", every=1), cb.nan_guard()]
    logged = set()

    def look(state, event: fx.StepEnd, control):
        logged.update(control.log)

    fit(*monitors, cb.spike_guard(warmup=2), observers=look, steps=3)
    for name in NAMES:
        for prefix in ("grad_norm", "weights", "update_ratio", "histograms/weights", "nan_guard", "spike_guard"):
            assert any(each.startswith(f"{prefix}/{name}/") for each in logged), (prefix, name)
    assert all(any(f"/{name}/" in each for name in NAMES) for each in logged)


def test_events_name_the_model_and_of_model_selects_one():
    seen = []

    def note(state, event: fx.Gradients | fx.Updated):
        seen.append((type(event).__name__, event.model))
        return state, fx.Control()

    fit(note, steps=1)
    assert seen == [(kind, name) for name in NAMES for kind in ("Gradients", "Updated")]
    seen.clear()
    fit(fx.when(fx.of_model("generator"), note), steps=1)
    assert seen == [("Gradients", "generator"), ("Updated", "generator")]


def test_selected_monitor_publishes_its_model_only():
    history = fit(fx.when(fx.of_model("generator"), cb.grad_norms())).history
    assert "grad_norm/generator/total" in history
    assert "grad_norm/discriminator/total" not in history


def test_skipped_update_keeps_only_its_model():
    def skip(state, event: fx.Gradients):
        return state, fx.Control(skip_update=True, reason="frozen")

    before, after = start(), fit(fx.when(fx.of_model("generator"), skip), steps=2).state
    testing.assert_equal(after.params["generator"], before.params["generator"], "generator")
    testing.assert_equal(after.opt_state["generator"], before.opt_state["generator"], "optimizer state")
    assert not torch.equal(after.params["discriminator"]["weight"], before.params["discriminator"]["weight"])


def test_nan_guard_counts_and_names_the_model():
    """The generator's gradients stay finite, which must not reset the count of the discriminator's."""

    def broken(model, batch):
        return discriminator_loss(model, batch)[0] * float("nan")

    find = fx.gradients(broken, wrt="discriminator"), fx.gradients(generator_loss, wrt="generator")

    def make(callbacks):
        def gan(state, batch):
            state, first = fx.step.update(state, find[0](state, batch), TX[NAMES[0]], callbacks, wrt=NAMES[0])
            found = find[1](state, batch, 1)
            return fx.step.update(state, found, TX[NAMES[1]], callbacks, wrt=NAMES[1], control=first.control)

        return fx.Step(gan, callbacks=callbacks, fires=[fx.Gradients, fx.Updated], rebuild=make)

    result = fit(cb.nan_guard(patience=3), step=make(fx.compose()))
    assert int(result.state.step) == 3
    assert "discriminator: first non-finite: grads['bias'] at step 3" in result.reason
    assert cb.first_not_finite(result.state) == "grads['discriminator']['bias'] at step 3"
    guards = result.state.slots["nan_guard"]
    assert [int(guards[name].skipped) for name in NAMES] == [3, 0]


def test_monitored_gan_resumes_bitwise(tmp_path):
    callbacks = cb.grad_norms(), cb.nan_guard(), cb.spike_guard(warmup=2), cb.stop_on_overfitting("loss", patience=9)
    evaluation = {"eval_step": fx.eval_step(generator_loss), "eval_data": DATA[:2], "eval_when": fx.every(2)}
    whole = fit(*callbacks, **evaluation).state
    fit(*callbacks, steps=3, checkpointer=fx.checkpointer(tmp_path), **evaluation)
    again = fit(*callbacks, checkpointer=fx.checkpointer(tmp_path), resume=True, **evaluation).state
    testing.assert_equal(again, whole, "resumed")


def test_monitored_gan_is_one_graph():
    graphs = CompileCounterWithBackend("aot_eager")
    fit(cb.grad_norms(), cb.nan_guard(), step=fx.compile(build(fx.compose()), backend=graphs), steps=3)
    assert graphs.frame_count == 1


def test_one_event_for_all_models_is_measured_for_each():
    find = fx.gradients(lambda model, batch: generator_loss(model, batch))

    def make(callbacks):
        def joint(state, batch):
            found = find(state, batch)
            event = fx.Gradients(step=state.step + 1, loss=found.loss, metrics=found.metrics, grads=found.grads)
            updates = fx.tree.map(torch.zeros_like, found.grads)
            skipped = torch.zeros_like(state.due.stop)
            state, control = callbacks(state, fx.Updated(updates=updates, skipped=skipped, **event.__dict__))
            return state, fx.StepOutput(found.metrics, control)

        return fx.Step(joint, callbacks=callbacks, fires=[fx.Updated], rebuild=make)

    history = fit(cb.grad_norms(), step=make(fx.compose()), steps=1).history
    assert {f"grad_norm/{name}/total" for name in NAMES} <= set(history)


def test_ema_averages_at_the_updates_of_one_model():
    state = fit(cb.ema(0.5, model="generator"), steps=2).state
    assert int(state.slots["ema"].count) == 2
    with pytest.raises(ValueError, match=r"expected an update of all models for ema, got one of the model 'disc"):
        fit(cb.ema(0.5))


def test_event_of_an_unknown_model_is_refused():
    event = fx.Gradients(step=torch.tensor(1), loss=torch.tensor(0.0), metrics={}, grads={}, model="encoder")
    guard = fx.compose(cb.nan_guard())
    with pytest.raises(ValueError, match=r"Gradients for nan_guard to name one of the models .*got model='encoder'"):
        guard(fx.attach(start(), guard), event)
    single = fx.init(nn.Linear(1, 1), fx.optim.sgd(0.1))
    with pytest.raises(ValueError, match=r"there is one optimizer, got model='encoder'\. Fire it with"):
        guard(fx.attach(single, guard), event)


def test_of_model_needs_names():
    with pytest.raises(ValueError, match="of_model: expected the name of at least one model, got none"):
        fx.of_model()
    with pytest.raises(TypeError, match="of_model: expected the names of models, got 3"):
        fx.of_model(3)


def test_callbacks_reach_models_by_name():
    """Names of parameters begin with the key of the model, so patterns select models."""
    names = []

    def look(state, event: fx.FitBegin):
        names.extend(fx.view(state)[name].__class__.__name__ for name in state.params)
        return state, fx.Control()

    fit(look, steps=1)
    assert names == ["View", "View"]
    frozen = fx.with_trainable(start(), TX, "generator.*")
    assert fx.tree.leaves(frozen.model.split(frozen.params, "discriminator")) == []
