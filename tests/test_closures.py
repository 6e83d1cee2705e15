"""Functions that modules hold reach the parameters of the state, as methods do."""

import copy
import functools
import pickle
import weakref

import pytest
import torch
from torch import nn

import fxtrain as fx

TX = fx.optim.sgd(0.1)
X = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(8, 4).sin()


class Holder(nn.Module):
    """A layer, a scale, a buffer, and whatever ``attach`` adds. Calls ``function``."""

    def __init__(self, attach):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.full((4,), 0.5))
        self.register_buffer("mean", torch.zeros(4))
        self.function = None
        attach(self)

    def forward(self, x):
        return (self.function or self.layer)(x)


class Child(nn.Module):
    def __init__(self, parent):
        super().__init__()
        self.parent = weakref.ref(parent)

    def forward(self, x):
        return self.parent().layer(x) * self.parent().scale


def a_lambda(module):
    module.function = lambda x: module.layer(x) * module.scale


def a_hook(module):
    module.layer.register_forward_hook(lambda layer, inputs, output: output + inputs[0] * module.scale)


def lists_and_tuples(module):
    module.functions = [lambda x: x * module.scale], (lambda x: module.layer(x),)
    module.function = lambda x: module.functions[0][0](module.functions[1][0](x))


def a_weak_reference(module):
    module.function = Child(module)


def a_weak_method(module):
    method = weakref.WeakMethod(module.layer.forward)
    module.function = lambda x: method()(x) * 2


def a_replaced_forward(module):
    before = module.layer.forward
    module.layer.forward = lambda x: before(x) * 2


def a_partial(module):
    module.function = functools.partial(lambda layer, x, *, scale: layer(x) * scale, module.layer, scale=module.scale)


def defaults(module):
    module.function = lambda x, layer=module.layer, *, more=(module,): layer(x) * more[0].scale


def a_recursive_function(module):
    def apply(x, times):
        return apply(module.layer(x), times - 1) if times else x

    module.function = lambda x: apply(x, 2)


def a_decorated_function(module):
    def doubled(function):
        @functools.wraps(function)
        def call(x):
            return 2 * function(x)

        return call

    module.function = doubled(lambda x: module.layer(x))


def a_write_to_a_buffer(module):
    def track(layer, inputs, output):
        module.mean.mul_(0.9).add_(output.detach().mean(0), alpha=0.1)
        return output - module.mean

    module.layer.register_forward_hook(track)


def features(module):
    found = module.found = {}
    module.layer.register_forward_hook(lambda layer, inputs, output: found.update(at=output))
    module.function = lambda x: module.layer(x) + module.found["at"].square()


def shared_variables(module):
    layers = {"layer": module.layer}

    def put(layer):
        layers["layer"] = layer

    def use(x):
        put(module.layer)
        return layers["layer"](x)

    module.function = use


WAYS = (
    *(a_lambda, a_hook, lists_and_tuples, a_weak_reference, a_weak_method, a_replaced_forward, a_partial, defaults),
    *(a_recursive_function, a_decorated_function, a_write_to_a_buffer, features, shared_variables),
)


def made(attach):
    torch.manual_seed(0)
    return Holder(attach).double()


def loss_fn(model, batch):
    return (model(batch) - 1).square().mean()


def losses_of_loop(module):
    optimizer, losses = torch.optim.SGD(module.parameters(), 0.1), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_fn(module, X)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def losses_of_steps(state, step):
    losses = []
    for _ in range(3):
        state, output = step(state, X)
        losses.append(output.metrics["loss"])
    return state, torch.stack(losses)


@pytest.mark.parametrize("attach", WAYS)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_steps_equal_a_plain_loop(attach, is_compiled):
    module, reference = made(attach), made(attach)
    step = fx.train_step(loss_fn, TX)
    step = fx.compile(step, backend="eager") if is_compiled else step
    before = copy.deepcopy(module.state_dict())
    state, losses = losses_of_steps(fx.init(module, TX, seed=0), step)
    torch.testing.assert_close(losses, losses_of_loop(reference))
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)  # of the user's module
    evaluated = fx.eval_step(loss_fn)(state, X).metrics["loss"]
    with torch.no_grad():
        torch.testing.assert_close(evaluated, loss_fn(reference.eval(), X))
        torch.testing.assert_close(loss_fn(fx.to_module(state, made(attach)).eval(), X), evaluated)


def test_copied_states_train_alike():
    state, step = fx.init(made(a_hook), TX, seed=0), fx.train_step(loss_fn, TX)
    expected = losses_of_steps(state, step)[1]
    assert copy.deepcopy(state).model == state.model
    torch.testing.assert_close(losses_of_steps(copy.deepcopy(state), step)[1], expected, rtol=0, atol=0)


def test_functions_without_the_model_stay_the_same_objects():
    seen = []

    def log(layer, inputs, output):
        seen.append(tuple(output.shape))

    module = made(lambda module: module.layer.register_forward_hook(log))
    state = fx.init(module, TX)
    fx.eval_step(loss_fn)(state, X)
    assert set(seen) == {(8, 4)}
    assert fx.init(module, TX).model == state.model


def test_counters_of_hooks_are_refused():
    def attach(module):
        module.calls = 0

        def count(layer, inputs, output):
            module.calls += 1
            return output / module.calls

        module.layer.register_forward_hook(count)

    with pytest.raises(RuntimeError, match=r"attributes do not depend on earlier calls, got model\.calls \(0 before"):
        fx.train_step(loss_fn, TX)(fx.init(made(attach), TX), X)


@pytest.mark.parametrize("in_dict", [False, True])
def test_tensors_that_calls_replace_and_read_are_refused(in_dict):
    def attach(module):
        module.state = {"calls": torch.zeros(())}

        def use(x):
            # A new dict, or a new tensor in the same one.
            state = module.state if in_dict else dict(module.state)
            state["calls"] = state["calls"] + 1
            module.state = state
            return module.layer(x) / state["calls"]

        module.function = use

    message = r"do not depend on earlier calls, got model\.state\['calls'\] \(a float32 tensor of shape \[\] before"
    with pytest.raises(RuntimeError, match=message):
        fx.train_step(loss_fn, TX)(fx.init(made(attach), TX), X)


def test_tensors_that_no_call_reads_may_be_replaced():
    def attach(module):
        module.last = torch.zeros(1)
        module.layer.register_forward_hook(lambda layer, inputs, output: setattr(module, "last", output))

    _, losses = losses_of_steps(fx.init(made(attach), TX), fx.train_step(loss_fn, TX))
    torch.testing.assert_close(losses, losses_of_loop(made(attach)))


def hooked_by_a_global_name(layer, inputs, output):
    return output * GLOBAL.scale


GLOBAL = made(lambda module: module.layer.register_forward_hook(hooked_by_a_global_name))


def test_global_modules_in_hooks_are_refused():
    message = r"got model\.layer\._forward_hooks, hooked_by_a_global_name at .*which reads the global GLOBAL"
    with pytest.raises(ValueError, match=message):
        fx.init(GLOBAL, TX)
    # Another model that reads it has it as a constant.
    other = made(lambda module: module.layer.register_forward_hook(hooked_by_a_global_name))
    fx.eval_step(loss_fn)(fx.init(other, TX), X)


def a_variable(module):
    scale = module.scale
    module.function = lambda x: module.layer(x) * scale


def a_default(module):
    module.function = lambda x, scale=module.scale: module.layer(x) * scale


def a_tuple_in_a_decorated_function(module):
    scale = module.scale, 1
    a_decorated_function(module)
    function = module.function
    module.function = functools.wraps(function)(lambda x: function(x) * scale[0])


@pytest.mark.parametrize("attach", [a_variable, a_default, a_tuple_in_a_decorated_function])
def test_tensors_of_the_model_in_variables_are_refused(attach):
    message = r"got model\.function, .* which holds the tensor scale\. .* Read an attribute of self"
    with pytest.raises(ValueError, match=message):
        fx.init(made(attach), TX)


def hooked_when_saved(*_):
    return SAVED.scale


SAVED = made(lambda module: module.register_state_dict_pre_hook(hooked_when_saved))


def test_global_modules_in_hooks_of_saving_are_allowed():
    fx.eval_step(loss_fn)(fx.init(SAVED, TX), X)


class Features:
    """Stores the output of a layer."""

    def __init__(self, layer):
        self.output = None
        layer.register_forward_hook(self.store)

    def store(self, layer, inputs, output):
        self.output = output


@pytest.mark.parametrize("is_in_list", [False, True])
def test_losses_that_read_the_owner_of_a_hook_are_refused(is_in_list):
    module = made(lambda module: None)
    stored = Features(module.layer)
    module(X)
    found = [stored] if is_in_list else stored

    def loss(model, batch):
        features = found[0] if is_in_list else found
        return model(batch).square().mean() + features.output.square().mean()

    message = r"expected loss to read features from what the model returns, got found, .* a hook of the model"
    with pytest.raises(RuntimeError, match=message):
        fx.train_step(loss, TX)(fx.init(module, TX), X)


@pytest.mark.parametrize("attach", WAYS)
def test_models_of_one_module_are_equal(attach):
    module = made(attach)
    assert fx.init(module, TX, seed=0).model == fx.init(module, TX, seed=1).model


def test_functions_are_compared_by_what_they_read():
    def scaled(factor):
        def attach(module):
            module.function = lambda x: module.layer(x) * module.scale * factor

        return attach

    def model(attach):
        return fx.init(made(attach), TX).model

    one, same, other = model(scaled(2)), model(scaled(2)), model(scaled(3))
    assert one == same
    assert one != other
    assert model(a_lambda) != one
    # A list may change later.
    factors = [2]
    assert model(scaled(factors)) == model(scaled(factors)) != model(scaled([2]))


def test_modules_with_lambdas_are_stacked():
    states = [fx.init(made(a_lambda), TX, seed=seed) for seed in range(2)]
    runs = fx.ensemble.stack(states)
    result = fx.fit(runs, fx.train_step(loss_fn, TX), [X], steps=3)
    expected = fx.fit(states[0], fx.train_step(loss_fn, TX), [X], steps=3)
    torch.testing.assert_close(fx.ensemble.member(result.state, 0).params, expected.state.params)


class Activated(nn.Module):
    """Has a function of a module, and a method of its own, among its attributes."""

    def __init__(self):
        super().__init__()
        self.layer, self.function, self.method = nn.Linear(4, 4), nn.functional.relu, self.doubled

    def doubled(self, x):
        return 2 * self.layer(x)

    def forward(self, x):
        return self.function(self.method(x))


@pytest.mark.parametrize("make", [Activated, lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)])
def test_models_with_functions_that_can_be_pickled_are_equal_after_it(make):
    state, step = fx.init(make().double(), TX), fx.train_step(loss_fn, TX)
    loaded = pickle.loads(pickle.dumps(state))
    assert loaded.model == state.model
    torch.testing.assert_close(losses_of_steps(loaded, step)[1], losses_of_steps(state, step)[1], rtol=0, atol=0)
