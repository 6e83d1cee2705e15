"""Errors for losses that depend on no parameter, parameter hooks that would not run, and assignments to ``.data``."""

import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import testing

X = torch.ones(4, 2)
OUTSIDE = nn.Linear(2, 1)


def squares(model, batch):
    return model(batch).square().mean()


def by_global(model, batch):
    return OUTSIDE(batch).square().mean()


def without_model(model, batch):
    return batch.square().mean()


def detached(model, batch):
    return squares(model, batch).detach()


def without_grad(model, batch):
    with torch.no_grad():
        return squares(model, batch)


def read_as_number(model, batch):
    return torch.tensor(squares(model, batch).item())


def by_inference(model, batch):
    with torch.inference_mode():
        output = squares(model, batch)
    return output.clone()


def accuracy(model, batch):
    return (model(batch).argmax(-1) == 0).float().mean()


def outside_parameter(model, batch):
    return OUTSIDE.bias[0]


def start(module=None, rate=0.1):
    tx = fx.optim.sgd(rate)
    return fx.init(module or nn.Linear(2, 1), tx), tx


class TestLossWithoutParameters:
    @pytest.mark.parametrize(
        ("loss_fn", "cause"),
        [
            (by_global, "instead of OUTSIDE"),
            (without_model, "Call the model that is passed to the loss function, outside"),
            (detached, r"trained\. \.detach\(\) at .*gradient.py:27 detaches the loss"),
            (without_grad, r"trained\. linear at .*gradient.py:15 runs under torch.no_grad\(\)\. Move"),
            (by_inference, r"trained\. linear at .*gradient.py:15 runs under torch.inference_mode\(\)\. Move"),
            (read_as_number, r"trained\. \.item\(\) at .*gradient.py:36 detaches the loss"),
            (accuracy, r"trained\. argmax at .* has no gradient\. Compute"),
            (outside_parameter, "instead of OUTSIDE"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:by_inference is differentiated")
    def test_each_step_raises_and_names_the_cause(self, loss_fn, cause):
        state, tx = start()
        step = fx.train_step(loss_fn, tx)
        for _ in range(2):
            with pytest.raises(
                ValueError, match=rf"got one from {loss_fn.__name__} \(.*\) that depends on none, .*{cause}"
            ):
                step(state, X)

    def test_error_names_the_captured_module(self):
        module = nn.Linear(2, 1)
        state, tx = start(module)

        def loss_fn(model, batch):
            return module(batch).square().mean()

        with pytest.raises(ValueError, match="the loss function instead of module, which it captures, outside"):
            fx.train_step(loss_fn, tx)(state, X)
        with pytest.raises(ValueError, match="instead of OUTSIDE"):
            fx.train_step(by_global, tx)(state, X)

    def test_fit_raises_before_the_first_step(self):
        state, tx = start()
        with pytest.raises(ValueError, match="depends on none"):
            fx.fit(state, fx.train_step(by_global, tx), [X], epochs=5)

    @pytest.mark.parametrize("backend", [None, "eager"])
    def test_compiled_step_raises(self, backend):
        state, tx = start()
        with pytest.raises(ValueError, match=r"got one from by_global \(.*\) that depends on none"):
            fx.compile(fx.train_step(by_global, tx), backend=backend)(state, X)

    def test_torch_compile_raises(self):
        state, tx = start()
        torch.compile(fx.train_step(squares, tx), fullgraph=True, backend="eager")(state, X)
        with pytest.raises(Exception, match="ValueError"):
            torch.compile(fx.train_step(by_global, tx), fullgraph=True, backend="eager")(state, X)

    def test_wrt_of_an_unused_entry_raises(self):
        state = fx.init({"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)})

        def loss_fn(model, batch):
            return squares(model["a"], batch)

        assert fx.gradients(loss_fn)(state, X).grads["b"]["weight"].tolist() == [[0.0, 0.0]]
        with pytest.raises(ValueError, match="a trainable parameter of the entry 'b'"):
            fx.gradients(loss_fn, wrt="b")(state, X)

    def test_loss_of_only_frozen_parameters_raises(self):
        state, tx = start(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
        step = fx.train_step(lambda model, batch: model[0](batch).sum(), tx)
        step(state, X)
        with pytest.raises(ValueError, match="depends on none"):
            step(fx.with_trainable(state, tx, "1.*"), X)

    def test_accumulating_step_raises(self):
        state, tx = start()
        with pytest.raises(ValueError, match="depends on none"):
            fx.train_step(by_global, tx, accumulate=2)(state, X)

    def test_vmapped_step_raises(self):
        state, tx = start()
        with pytest.raises(ValueError, match="depends on none"):
            torch.vmap(fx.train_step(by_global, tx), (None, 0))(state, X[None])


class TestZeroGradients:
    def test_zero_gradients_of_used_parameters_are_allowed(self):
        module = nn.Linear(2, 1)
        with torch.no_grad():
            module.bias.fill_(-1e6)
        for loss_fn in (
            lambda model, batch: model(batch).relu().sum(),
            lambda model, batch: model(batch).sum() * 0.0,
            lambda model, batch: model(batch).sign().sum(),
            lambda model, batch: torch.where(batch.sum() > 0, 0.0, model(batch).sum()),
        ):
            state, tx = start(module)
            new, _ = fx.train_step(loss_fn, tx)(state, X)
            assert torch.equal(new.params["weight"], state.params["weight"])

    def test_loss_of_one_parameter_among_many_is_allowed(self):
        state, tx = start(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
        new, _ = fx.train_step(lambda model, batch: by_global(model, batch) + model[1].bias.sum(), tx)(state, X)
        assert not torch.equal(new.params["1.bias"], state.params["1.bias"])


class TestHooksOnParameters:
    @pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
    @pytest.mark.parametrize("backend", ["uncompiled", None, "eager"])
    def test_first_step_refuses_hooks_by_parameter_name(self, kind, backend):
        module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        getattr(module[1].weight, kind)(lambda value: None)
        state, tx = start(module)
        step = fx.train_step(squares, tx)
        step = step if backend == "uncompiled" else fx.compile(step, backend=backend)
        with pytest.raises(NotImplementedError, match=r"got hooks on state\.params\['1\.weight'\] \(register_hook or"):
            step(state, X)

    def test_hooks_of_a_bare_tensor_are_refused(self):
        weight = torch.ones(2, requires_grad=True)
        weight.register_hook(lambda grad: grad * 0)
        with pytest.raises(NotImplementedError, match=r"state\.params\['w'\]"):
            fx.gradients(lambda model, batch: model["w"].sum())(fx.init({"w": weight}), X)

    def test_hooks_of_frozen_parameters_and_in_evaluation_are_allowed(self):
        module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        module[0].weight.register_hook(lambda grad: grad)
        state, tx = start(module)
        fx.eval_step(squares)(state, X)
        fx.train_step(squares, tx)(fx.with_trainable(state, tx, "1.*"), X)
        handle = module[1].weight.register_hook(lambda grad: grad)
        handle.remove()
        module[0].requires_grad_(False)
        state, tx = start(module)
        fx.train_step(squares, tx)(state, X)

    def test_hooks_registered_in_a_call_run_or_are_refused(self):
        def zeroed(model, batch):
            model.weight.register_hook(lambda grad: grad * 0)
            return squares(model, batch)

        def dropped(model, batch):
            model.weight.register_post_accumulate_grad_hook(lambda parameter: None)
            return squares(model, batch)

        state, _ = start()
        found = fx.gradients(zeroed)(state, X).grads
        assert float(found["weight"].abs().sum()) == 0.0 < float(found["bias"].abs().sum())
        with pytest.raises(NotImplementedError, match=r"hooks on model\.weight"):
            fx.gradients(dropped)(state, X)


class TestAssigningData:
    """A frozen parameter carries the new value over to the next state. A trained one would lose it."""

    @staticmethod
    def follows(model, batch):
        slow, fast = model["slow"].weight, model["fast"].weight
        slow.data = 0.9 * slow.data + 0.1 * fast.data
        return squares(model["slow"], batch) + squares(model["fast"], batch)

    @pytest.mark.parametrize("backend", ["uncompiled", "eager"])
    @pytest.mark.parametrize("frozen", [True, False])
    def test_assignment_in_a_loss_is_never_silently_lost(self, backend, frozen):
        modules = {"fast": nn.Linear(2, 1), "slow": nn.Linear(2, 1).requires_grad_(not frozen)}
        state = fx.init(modules)
        before = state.copy()

        def by_hand(state, batch):
            found = fx.gradients(self.follows)(state, batch)
            return state, fx.StepOutput(found.metrics)

        step = fx.Step(by_hand) if backend == "uncompiled" else fx.compile(by_hand, backend=backend)
        if frozen:
            with pytest.raises(
                RuntimeError, match=r"got state\.params\['slow'\]\['weight'\] from before it\. Use state"
            ):
                step(state, X)
            fx.eval_step(self.follows)(state, X)
        else:
            for run in (step, fx.eval_step(self.follows)):
                with pytest.raises(RuntimeError, match=r"an assignment to \.data of model\['slow'\]\.weight"):
                    run(state, X)
        testing.assert_equal(state, before, "the state")

    def test_assignment_in_a_view_is_refused(self):
        state = fx.init(nn.Linear(2, 1))
        before = state.copy()
        with pytest.raises(RuntimeError, match=r"\.data of model\.weight"):
            fx.view(state).double()
        testing.assert_equal(state, before, "the state")

    def test_module_to_its_current_device_and_dtype_changes_nothing(self):
        def moved(model, batch):
            return squares(model.to(batch.device, batch.dtype), batch)

        state, _ = start()
        testing.assert_equal(fx.gradients(moved)(state, X), fx.gradients(squares)(state, X), "gradients")
