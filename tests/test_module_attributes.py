"""Python state of modules: attributes set by a call are discarded, and state read by a later call is rejected."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import testing

X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])
BACKENDS = ["eager", pytest.param("traced", marks=pytest.mark.slow), "dynamo"]


class Base(nn.Module):
    """A linear layer, extended by each test."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 1)
        with torch.no_grad():
            self.inner.weight.copy_(torch.tensor([[0.5, -0.25]]))
            self.inner.bias.fill_(0.1)
        self.start()

    def start(self):
        pass


def loss_fn(model, batch):
    return model(batch).square().mean()


def losses(module, *, loss_fn=loss_fn, backend="eager", steps=4, rate=0.0):
    """Returns the losses of some steps. At the default learning rate of 0 they are equal for a pure module."""
    tx = fx.optim.sgd(rate)
    step = fx.train_step(loss_fn, tx)
    if backend != "eager":
        step = fx.compile(step) if backend == "traced" else fx.compile(step, backend="eager")
    state, found = fx.init(module, tx), []
    for _ in range(steps):
        state, output = step(state, X)
        found.append(float(output.metrics["loss"]))
    return found


class HooksOnce(Base):
    def start(self):
        self.done = False

    def forward(self, x):
        if not self.done:
            self.inner.register_forward_hook(lambda module, inputs, output: output * 2)
            self.done = True
        return self.inner(x)


class Caches(Base):
    """Writes attributes that libraries write: caches, flags, the last output, statistics for inspection."""

    def start(self):
        self.table, self.last, self.initialized, self.options = None, None, False, {"seen": set(), "shapes": []}

    def forward(self, x):
        if self.table is None or self.table.shape[0] < len(x):
            self.table = torch.linspace(1.0, 2.0, len(x))[:, None]
        self.initialized = True
        self.options["seen"].add(tuple(x.shape))
        if x.shape not in self.options["shapes"]:
            self.options["shapes"].append(x.shape)
        self.last = self.inner(x) * self.table
        self.memo = {"last": [self.last]}
        return self.last


class Counter(Base):
    def start(self):
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x) * self.calls


class CounterOfTheClass(Base):
    calls = 0
    forward = Counter.forward


class Threshold(Base):
    """Has state that affects neither the first nor the second output."""

    def start(self):
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x) * (2 if self.calls > 100 else 1)


class Hidden(Base):
    def start(self):
        self.hidden = None

    def forward(self, x):
        before = torch.zeros(()) if self.hidden is None else self.hidden
        y = self.inner(x) + before
        self.hidden = y.detach().mean()
        return y


class HiddenWithoutStart(Base):
    def forward(self, x):
        y = self.inner(x) + getattr(self, "hidden", 0.0)
        self.hidden = y.detach().mean()
        return y


class Grows(Base):
    def start(self):
        self.history = []

    def forward(self, x):
        self.history.append(self.inner(x))
        return self.history[-1] * len(self.history)


class Nested(Base):
    def start(self):
        self.stats = {"layers": [{"calls": 0}]}

    def forward(self, x):
        self.stats["layers"][0]["calls"] += 1
        return self.inner(x)


class Tally:
    def __init__(self):
        self.calls = 0


class SlottedTally:
    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0


class InAnObject(Base):
    kind = Tally

    def start(self):
        self.tally = self.kind()

    def forward(self, x):
        self.tally.calls += 1
        return self.inner(x)


class InSlots(InAnObject):
    kind = SlottedTally


class OnlyFirst(Base):
    """Has a flag that the first call sets and the second call reads."""

    def start(self):
        self.first = True

    def forward(self, x):
        scale, self.first = (2 if self.first else 1), False
        return self.inner(x) * scale


class Toggle(Base):
    def start(self):
        self.odd = False

    def forward(self, x):
        self.odd = not self.odd
        return self.inner(x)


class WritesInto(Base):
    def start(self):
        self.memory = None

    def forward(self, x):
        if self.memory is None:
            self.memory = torch.zeros(3)
        self.memory[0] = self.inner(x).detach().mean()
        return self.inner(x)


class HooksPileUp(Base):
    def forward(self, x):
        self.inner.register_forward_hook(lambda module, inputs, output: output * 2)
        return self.inner(x)


STATEFUL = {
    Counter: r"model\.calls \(0 before a call, 1 after it, 2 after a second one\)",
    CounterOfTheClass: r"model\.calls .*1 after it, 2 after a second one",
    Threshold: r"model\.calls \(0 before",
    Hidden: r"model\.hidden \(None before a call, a float32 tensor of shape \[\] after it",
    HiddenWithoutStart: r"model\.hidden \(missing before a call",
    Grows: r"model\.history\[1\]",
    Nested: r"model\.stats\['layers'\]\[0\]\['calls'\] \(0 before",
    InAnObject: r"model\.tally\.calls \(0 before",
    InSlots: r"model\.tally\.calls \(0 before",
    OnlyFirst: r"model\.first \(True before a call, False after it.*a second call then returns another result",
    Toggle: r"model\.odd \(False before a call, True after it, False",
    WritesInto: r"model\.memory \(None before",
    HooksPileUp: r"model\.inner\._forward_hooks\[",
}


class TestRejected:
    @pytest.mark.parametrize("kind", STATEFUL)
    def test_state_read_by_a_second_call_is_rejected(self, kind):
        with pytest.raises(RuntimeError, match=rf"{STATEFUL[kind]}.*self\.register_buffer"):
            losses(kind())

    @pytest.mark.parametrize("backend", BACKENDS[1:])
    @pytest.mark.parametrize("kind", [Counter, Hidden, OnlyFirst])
    def test_state_is_rejected_at_the_first_compiled_step(self, kind, backend):
        with pytest.raises(RuntimeError, match=STATEFUL[kind]):
            losses(kind(), backend=backend)

    def test_state_is_rejected_again_on_retry(self):
        tx = fx.optim.sgd(0.1)
        state, step = fx.init(Counter(), tx), fx.train_step(loss_fn, tx)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="0 before a call, 1 after it"):
                step(state, X)

    def test_state_is_rejected_in_evaluation_accumulation_and_partial_gradients(self):
        modules = {"body": nn.Sequential(nn.Linear(2, 2), Counter()), "rest": nn.Linear(1, 1)}

        def both(model, batch):
            return model["rest"](model["body"](batch)).mean()

        path = r"model\['body'\]\.1\.calls"
        with pytest.raises(RuntimeError, match=path):
            fx.eval_step(both)(fx.init(modules), X)
        with pytest.raises(RuntimeError, match=path):
            fx.gradients(both, wrt="rest")(fx.init(modules), X)
        tx = fx.optim.sgd(0.1)
        with pytest.raises(RuntimeError, match=r"model\.calls"):
            fx.train_step(loss_fn, tx, accumulate=3)(fx.init(Counter(), tx), X)

    def test_new_parameter_is_rejected(self):
        class Lazy(Base):
            def start(self):
                self.head = None

            def forward(self, x):
                if self.head is None:
                    self.head = nn.Linear(1, 1)
                return self.head(self.inner(x))

        with pytest.raises(RuntimeError, match=r"got a new one, model\.head\.weight, .* before fxtrain\.init"):
            losses(Lazy())

    def test_replaced_parameter_is_rejected(self):
        class Replaces(Base):
            def forward(self, x):
                y = self.inner(x)
                self.inner.weight = nn.Parameter(self.inner.weight * 0.5)
                return y

        with pytest.raises(RuntimeError, match=r"a new tensor assigned to model\.inner\.weight"):
            losses(Replaces())

    def test_in_place_write_to_unregistered_tensor_is_rejected(self):
        class Plain(Base):
            def start(self):
                self.total = torch.zeros(())

            def forward(self, x):
                self.total += 1
                return self.inner(x)

        state = fx.init(Plain())
        for run in (lambda: fx.eval_step(loss_fn)(state, X), lambda: fx.view(state)(X)):
            with pytest.raises(
                RuntimeError, match=r"got an in-place write \(add_\) to model\.total\. Register it as a buffer"
            ):
                run()


class TestHarmless:
    @pytest.mark.parametrize(
        ("kind", "backend"),
        [
            (HooksOnce, "eager"),
            (Caches, "eager"),
            (Caches, "dynamo"),  # Dynamo cannot register hooks
            pytest.param(HooksOnce, "traced", marks=pytest.mark.slow),
            pytest.param(Caches, "traced", marks=pytest.mark.slow),
        ],
    )
    def test_caches_and_one_time_hooks_keep_the_loss(self, kind, backend):
        wanted = float(loss_fn(kind(), X).detach())
        assert losses(kind(), backend=backend) == pytest.approx([wanted] * 4)

    def test_list_cleared_by_the_loss_is_accepted(self):
        def loss_fn(model, batch):
            model.history.clear()
            return model(batch).square().mean()

        assert len(set(losses(Grows(), loss_fn=loss_fn))) == 1

    def test_check_runs_only_at_the_first_step(self):
        calls = []

        class Counted(Caches):
            def forward(self, x):
                calls.append(1)
                return super().forward(x)

        losses(Counted(), steps=1)
        first = len(calls)
        losses(Counted(), steps=4)
        assert (first, len(calls) - first) == (2, 5)

    @pytest.mark.parametrize("per_call", ["gradients", "function"])
    def test_check_is_not_repeated_for_functions_created_per_call(self, per_call):
        calls = []

        class Counted(Caches):
            def forward(self, x):
                calls.append(1)
                return super().forward(x)

        def by_hand(state, batch):
            function = loss_fn if per_call == "gradients" else lambda model, batch: loss_fn(model, batch)
            return state, fx.StepOutput(fx.gradients(function)(state, batch).metrics)

        state, step = fx.init(Counted()), fx.Step(by_hand)
        for _ in range(20):
            step(state, X)
        assert len(calls) == 21 if per_call == "gradients" else len(calls) < 30
        compiled = fx.compile(by_hand, backend="eager")
        assert float(compiled(state, X)[1].metrics["loss"]) == pytest.approx(losses(Caches(), steps=1)[0])

    def test_pure_module_is_not_checked_by_a_second_call(self):
        calls = []

        class Counted(Base):
            def forward(self, x):
                calls.append(1)
                return self.inner(x)

        losses(Counted(), steps=3)
        assert len(calls) == 3

    def test_check_repeats_the_random_samples(self):
        class Drops(Caches):
            def forward(self, x):
                return super().forward(nn.functional.dropout(x, 0.5))

        assert len(set(losses(Drops()))) > 1


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
