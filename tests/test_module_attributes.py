"""Attributes of modules that a call sets are discarded, and state read by a later call is rejected."""

import pytest
import torch
from stateful_modules import Base, Caches, X, loss_fn, losses
from torch import nn

import fxtrain as fx

BACKENDS = ["eager", pytest.param("traced", marks=pytest.mark.slow), "dynamo"]


class HooksOnce(Base):
    def start(self):
        self.done = False

    def forward(self, x):
        if not self.done:
            self.inner.register_forward_hook(lambda module, inputs, output: output * 2)
            self.done = True
        return self.inner(x)


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
