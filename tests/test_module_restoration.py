"""Modules are restored after each call, and shared, tied and hidden parameters train as in torch or are rejected."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from stateful_modules import Base, Caches, X, loss_fn, losses
from torch import nn

import fxtrain as fx
from fxtrain import testing


class TestRestoration:
    """Every call leaves the modules unchanged."""

    @staticmethod
    def contents(module):
        """Returns the identities of all objects reachable from the attributes, with the elements of containers."""

        def seen(value):
            if isinstance(value, nn.Module):
                return id(value), {name: seen(part) for name, part in vars(value).items()}
            if isinstance(value, dict):
                return id(value), [(key, seen(part)) for key, part in value.items()]
            if isinstance(value, list):
                return id(value), list(map(seen, value))
            return (id(value), frozenset(value)) if isinstance(value, set) else id(value)

        return seen(module)

    def test_modules_are_restored_after_calls_and_errors(self):
        def writes(model, batch):
            y = loss_fn(model, batch)
            model.inner.register_forward_hook(lambda *_: None)
            model.inner.extra = nn.ReLU()
            model.options["seen"].add("more")
            model.options["shapes"] += [1, 2]
            model.options["new"] = 1
            model.train(not model.training)
            del model.last, model.initialized
            return y

        def fails(model, batch):
            writes(model, batch)
            raise KeyError("in the middle")

        state = fx.init(Caches())
        modules = [state.model.named_modules(train=train)[""] for train in (True, False)]
        before = list(map(self.contents, modules))
        for function in (writes, fails):
            for train in (True, False):
                try:
                    state.model.call(state.params, state.buffers, function, X, train=train, key=fx.rng.key(0))
                except KeyError:
                    assert function is fails
                assert list(map(self.contents, modules)) == before
        fx.train_step(loss_fn, fx.optim.sgd(0.1))(fx.init(Caches(), fx.optim.sgd(0.1)), X)
        fx.view(state)(X)
        torch.vmap(lambda x: fx.view(state)(x))(X[None])
        assert list(map(self.contents, modules)) == before

    def test_modules_are_restored_after_compiled_calls(self):
        tx = fx.optim.sgd(0.1)
        state = fx.init(Caches(), tx)
        before = self.contents(state.model.named_modules(train=True)[""])
        step = fx.compile(fx.train_step(loss_fn, tx), backend="eager", on_recompile="error")
        for _ in range(3):
            state, _ = step(state, X)
            assert self.contents(state.model.named_modules(train=True)[""]) == before

    def test_returned_containers_keep_their_contents(self):
        class Reports(Base):
            def start(self):
                self.metrics = {}

            def forward(self, x):
                y = self.inner(x)
                self.metrics["mean"] = y.mean()
                return y

        def reports(model, batch):
            return model(batch).square().mean(), model.metrics

        found = fx.gradients(reports)(fx.init(Reports()), X)
        assert sorted(found.metrics) == ["loss", "mean"]
        view = fx.view(fx.init(Reports()))
        assert view.metrics == {}

    def test_tensors_of_a_call_are_freed(self):
        class Keeps(Base):
            def forward(self, x):
                self.last = self.inner(x)
                seen.append(weakref.ref(self.last))
                return self.last

        seen = []
        losses(Keeps(), steps=3)
        gc.collect()
        assert not [ref for ref in seen if ref() is not None]

    def test_dicts_without_update_and_clear_are_restored(self):
        class Strict(dict):
            def update(self, *_):
                raise NotImplementedError

            clear = update

        class Uses(Base):
            def start(self):
                self.strict = Strict(a=1)

            def forward(self, x):
                self.strict["b"] = 2
                return self.inner(x)

        state = fx.init(Uses())
        fx.view(state)(X)
        assert fx.view(state).strict == {"a": 1}

    def test_global_objects_are_not_restored(self):
        import logging

        class Logs(Base):
            def start(self):
                self.logger = logging.getLogger("fxtrain.test")

            def forward(self, x):
                self.logger.setLevel(17)
                return self.inner(x)

        losses(Logs())
        assert logging.getLogger("fxtrain.test").level == 17

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
    def test_copied_states_have_separate_modules(self, copied):
        first = fx.init(Caches())
        fx.eval_step(loss_fn)(first, X)
        state = copied(first)
        assert state.model == first.model
        before = self.contents(state.model.named_modules(train=False)[""])
        testing.assert_equal(fx.view(state)(X), fx.view(first)(X), "outputs")
        fx.eval_step(loss_fn)(state, X)
        assert self.contents(state.model.named_modules(train=False)[""]) == before


class TestSharing:
    def test_shared_and_tied_modules_train_as_in_torch(self):
        class Shared(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Embedding(5, 3)
                self.again = self.embed
                self.head = nn.Linear(3, 5, bias=False)
                self.head.weight = self.embed.weight

            def forward(self, x):
                return self.head(self.embed(x) + self.again(x))

        torch.manual_seed(0)
        module, tokens, tx = Shared(), torch.tensor([0, 1, 4]), fx.optim.sgd(0.1)
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for backend in ("eager", "dynamo"):
            start, step = fx.init(module, tx), fx.train_step(loss_fn, tx)
            state, step = start, step if backend == "eager" else fx.compile(step, backend="eager")
            for _ in range(4):
                state, output = step(state, tokens)
            assert {leaf.device.type for leaf in start.model.named_modules(train=True)[""].parameters()} == {"meta"}
            if backend == "eager":
                wanted = state
        testing.assert_equal(state.params, wanted.params, "compiled")
        for _ in range(4):
            optimizer.zero_grad()
            loss = loss_fn(module, tokens)
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(output.metrics["loss"], loss.detach())
        torch.testing.assert_close(wanted.params["embed.weight"], module.embed.weight.detach())

    def test_parameters_in_lists_and_dicts_are_replaced(self):
        class Listed(Base):
            def start(self):
                self.weights = [self.inner.weight]
                self.named = {"b": (2.0, self.inner.bias)}
                self.__dict__["plain"] = self.inner.weight

            def forward(self, x):
                return x @ self.weights[0].T + self.named["b"][1] + 0 * self.plain.sum()

        state = fx.init(Listed())
        found = fx.gradients(loss_fn)(state, X)
        module = Listed()
        loss_fn(module, X).backward()
        torch.testing.assert_close(found.grads["inner.weight"], module.inner.weight.grad)
        torch.testing.assert_close(found.grads["inner.bias"], module.inner.bias.grad)
        for template in [state.model.named_modules(train=train)[""] for train in (True, False)]:
            assert template.weights[0].is_meta

    def test_parameter_hidden_in_an_object_is_rejected(self):
        class Holder:
            def __init__(self, scale):
                self.scale = {"deep": ((scale,),)}

        class Hides(Base):
            def start(self):
                self.scale = nn.Parameter(torch.tensor(2.0))
                self.holder = Holder(self.scale)

            def forward(self, x):
                return self.inner(x) + torch.zeros_like(self.scale, device="cpu") * 1 + self.peek()

            def peek(self):
                return float(self.holder.scale["deep"][0][0].is_meta)

        class Uses(Hides):
            def peek(self):
                self.seen = self.holder.scale["deep"][0][0] * 2
                return 0.0

        fx.gradients(loss_fn)(fx.init(Hides()), X)
        with pytest.raises(RuntimeError, match=r"got model\.scale through another reference"):
            fx.gradients(loss_fn)(fx.init(Uses()), X)

    def test_buffer_aliasing_a_parameter_gets_gradients(self):
        class Aliased(Base):
            def start(self):
                self.register_buffer("alias", self.inner.weight)

            def forward(self, x):
                return x @ self.alias.T

        found = fx.gradients(loss_fn)(fx.init(Aliased()), X)
        assert float(found.grads["inner.weight"].abs().sum()) > 0

    def test_nested_call_starts_from_clean_modules(self):
        state = fx.init(Caches())
        seen = []

        def nested(model, batch):
            hook = model.inner.register_forward_hook(lambda *_: seen.append("outer"))
            model.table = torch.full((3, 1), 7.0)
            inside = fx.view(state)(batch)
            outside = model(batch)
            hook.remove()
            assert not model.inner.weight.is_meta
            return {"ratio": (outside / inside)[0, 0]}

        assert float(fx.eval_step(nested)(state, X).metrics["ratio"]) == pytest.approx(7.0)
        assert seen == ["outer"] * 2  # the purity check calls it twice

    def test_concurrent_threads_do_not_interfere(self):
        state = fx.init(Caches())
        wanted, wrong = fx.view(state)(X), []

        def use():
            for _ in range(50):
                if not torch.equal(fx.view(state)(X), wanted):
                    wrong.append(1)

        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
