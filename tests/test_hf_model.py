"""The model and the optimizer that callbacks of transformers see: writes reach the state or raise."""

import itertools

import pytest
import torch
from hugging_face import Model, TrainerCallback, batches, fit, loss_fn, transformers
from torch import nn

import fxtrain as fx
from fxtrain import testing


def calling(hook, function):
    """Returns a callback whose method calls ``function(model, **kwargs)``."""

    def method(self, args, state, control, model, **kwargs):
        function(model, **kwargs)

    return fx.interop.hf(type("Calling", (TrainerCallback,), {hook: method})())


def in_place(model, **kwargs):
    with torch.no_grad():
        model.linear.weight.mul_(0.5)


def through_data(model, **kwargs):
    model.linear.weight.data *= 0.5


def by_assignment(model, **kwargs):
    model.linear.weight.data = model.linear.weight.data * 0.5


def by_a_reversed_view(model, **kwargs):
    model.linear.weight.data = model.linear.weight.data.flip(1)
    model.linear.weight.data = model.linear.weight.data.flip(1)
    model.linear.weight.data *= 0.5


def by_state_dict(model, **kwargs):
    values = {name: value * 0.5 if name == "linear.weight" else value for name, value in model.state_dict().items()}
    model.load_state_dict(values)


def by_a_view(model, **kwargs):
    model.linear.weight.detach()[0].copy_(model.linear.weight.detach()[0] * 0.5)


WRITES = [in_place, through_data, by_assignment, by_a_reversed_view, by_state_dict, by_a_view]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("hook", ["on_step_end", "on_epoch_end", "on_evaluate", "on_optimizer_step"])
def test_written_weights_are_those_of_the_next_step(write, hook):
    event = {"on_epoch_end": fx.EpochEnd, "on_evaluate": fx.EvalEnd}.get(hook, fx.StepEnd)

    def halve(state, event):
        params = {**state.params, "linear.weight": state.params["linear.weight"] * 0.5}
        return state.replace(params=params), fx.Control()

    ours = fit(fx.on(event, halve), epochs=2).state
    theirs = fit(calling(hook, write), epochs=2).state
    torch.testing.assert_close(theirs.params, ours.params, rtol=0, atol=0)


@pytest.mark.parametrize("write", WRITES)
def test_state_that_a_callback_was_given_is_left_as_it_was(write):
    callback = calling("on_step_end", write)
    state = fx.attach(fx.init(Model()), callback)
    before = state.copy()
    after, _ = callback(state, fx.StepEnd(step=1, metrics={"loss": torch.tensor(1.0)}))
    testing.assert_equal(state, before, "the state")
    torch.testing.assert_close(after.params["linear.weight"], before.params["linear.weight"] * 0.5, rtol=0, atol=0)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("hook", ["on_init_end", "on_train_begin", "on_pre_optimizer_step"])
def test_writes_that_cannot_reach_the_state_raise(write, hook):
    with pytest.raises(RuntimeError, match=rf"expected Calling.{hook} to leave the model as it is, got an"):
        fit(calling(hook, write), epochs=1)


def test_write_at_a_save_raises(tmp_path):
    callbacks = [fx.callbacks.save(every=1), calling("on_save", in_place)]
    with pytest.raises(RuntimeError, match=r"expected Calling\.on_save to leave the model as it is, got an in-place"):
        fit(callbacks, epochs=2, checkpointer=fx.checkpointer(tmp_path))


def test_weights_written_at_the_end_are_those_of_the_result():
    callback = calling("on_train_end", in_place)
    result = fit(callback, steps=2)
    half = result.continue_from.params["linear.weight"] * 0.5
    assert torch.equal(result.state.params["linear.weight"], half)


def freeze(model, **kwargs):
    model.linear.weight.requires_grad_(False)


def hook_layer(model, **kwargs):
    model.linear.register_forward_hook(lambda module, args, output: None)


def set_dropout(model, **kwargs):
    model.drop.p = 0.5


def replace_layer(model, **kwargs):
    model.linear = nn.Linear(2, 1)


def replace_parameter(model, **kwargs):
    model.linear.weight = nn.Parameter(torch.ones(1, 2))


def add_parameter(model, **kwargs):
    model.extra = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (freeze, "linear.weight"),
        (hook_layer, "linear.hooks"),
        (set_dropout, "drop.p"),
        (replace_layer, "linear"),
        (replace_parameter, "linear.weight"),
        (add_parameter, "extra"),
    ],
)
def test_changes_that_no_state_can_hold_raise(change, name):
    with pytest.raises(
        RuntimeError, match=rf"Calling.on_step_end to change values of the model at most, got another {name}"
    ):
        fit(calling("on_step_end", change), steps=2)


def test_config_of_the_model_cannot_be_changed():
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(config)

    def change(model, **kwargs):
        assert model.config.to_json_string()
        model.config.use_cache = False

    callback = calling("on_step_end", change)
    state = fx.attach(fx.init(model), callback)
    with pytest.raises(RuntimeError, match=r"got another (\S*)config\.use_cache"):
        callback(state, fx.StepEnd(step=1, metrics={"loss": torch.tensor(1.0)}))


def test_model_can_be_called_and_switched_to_eval_mode():
    seen = []

    def evaluate(model, **kwargs):
        model.eval()
        seen.append(float(model(torch.ones(1, 2), torch.ones(1, 1))["loss"].detach()))

    fit(calling("on_step_end", evaluate), steps=3)
    assert len(set(seen)) == 3


def test_model_is_one_object_and_empty_between_events():
    kept = []
    fit(calling("on_step_end", lambda model, **kwargs: kept.append(model)), steps=3)
    assert kept[0] is kept[2]
    assert kept[0].linear.weight.numel() == 0


def test_gradients_are_those_of_the_step():
    grads = []

    def look(model, **kwargs):
        grads.append((model.linear.weight.detach().clone(), model.linear.weight.grad.clone()))

    result = fit(calling("on_pre_optimizer_step", look), steps=3)
    for (before, grad), (after, _) in itertools.pairwise(grads):
        torch.testing.assert_close(after, before - 0.1 * grad)
    last, grad = grads[-1]
    torch.testing.assert_close(result.state.params["linear.weight"], last - 0.1 * grad)


def test_donated_states_are_shown_and_released():
    tx = fx.optim.sgd(0.1)
    step = fx.compile(fx.train_step(loss_fn, tx), backend="eager")
    weights = []
    callback = calling("on_step_end", lambda model, **kwargs: weights.append(float(model.linear.weight.detach()[0, 0])))
    result = fx.fit(fx.init(Model(), tx), step, batches(), callbacks=callback, steps=4)
    plain = fit(fx.compose(), steps=4)
    assert float(plain.state.params["linear.weight"][0, 0]) == pytest.approx(weights[-1], abs=1e-6)
    assert float(result.state.params["linear.weight"][0, 0]) == weights[-1]


class TestOptimizer:
    def test_learning_rates_are_those_of_the_step(self):
        seen = []

        def look(model, optimizer, lr_scheduler, **kwargs):
            [group] = optimizer.param_groups
            assert [p.shape for p in group["params"]] == [p.shape for p in model.parameters()]
            assert lr_scheduler.get_last_lr() == [group["lr"]]
            seen.append(group["lr"])

        tx = fx.optim.sgd(fx.schedules.linear(0.1, 0.0, transition_steps=4))
        fit(calling("on_step_end", look), tx=tx, steps=4)
        assert seen == pytest.approx([0.1, 0.075, 0.05, 0.025])

    def test_injected_rate_can_be_set(self):
        def halve(model, optimizer, **kwargs):
            optimizer.param_groups[0]["lr"] *= 0.5

        tx = fx.optim.inject_hyperparams(fx.optim.sgd)(0.1)
        result = fit(calling("on_step_end", halve), tx=tx, steps=3)
        assert result.history["train/learning_rate"].values == pytest.approx([0.1, 0.05, 0.025])

    def test_rate_that_is_not_in_the_state_cannot_be_set(self):
        def set_rate(model, optimizer, **kwargs):
            optimizer.param_groups[0]["lr"] = 0.5

        tx = fx.optim.inject_hyperparams(fx.optim.sgd)(0.1)
        with pytest.raises(RuntimeError, match="expected the optimizer to be left as it is, got another learning_rate"):
            fit(calling("on_train_begin", set_rate), tx=tx, steps=3)
        with pytest.raises(ValueError, match="expected a hyperparameter in the optimizer state"):
            fit(calling("on_epoch_end", set_rate), steps=3)

    @pytest.mark.parametrize(
        ("act", "error"),
        [
            (lambda optimizer, **_: optimizer.step(), r"expected an attribute that the optimizer of a callback has"),
            (lambda lr_scheduler, **_: lr_scheduler.step(), r"expected an attribute that the scheduler of a callback"),
        ],
    )
    def test_other_attributes_are_errors(self, act, error):
        with pytest.raises(AttributeError, match=error):
            fit(calling("on_step_end", lambda model, **kwargs: act(**kwargs)), steps=1)
