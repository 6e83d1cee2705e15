"""Python values outside the state: compiled steps that change them are rejected, except for caches and logs."""

import collections
import functools
import importlib

import pytest
import torch
from torch import nn

import fxtrain as fx

X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])
CALLS = 0


class Holder:
    def __init__(self):
        self.count = 0


class OfTheClass(nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 1)

    def forward(self, x):
        type(self).calls += 1
        return self.inner(x) * type(self).calls


class OfAGlobal(OfTheClass):
    def forward(self, x):
        global CALLS
        CALLS += 1
        return self.inner(x) * CALLS


def squares(model, batch):
    return model(batch).square().mean()


def losses_from_outside():
    calls, hidden, counts, outputs, holder = 0, None, {"n": 0}, [], Holder()

    def counts_calls(model, batch):
        nonlocal calls
        calls += 1
        return squares(model, batch) * calls

    def keeps_a_hidden_state(model, batch):
        nonlocal hidden
        y = model(batch)
        y = y if hidden is None else y + hidden
        hidden = y.detach()
        return y.square().mean()

    def counts_in_a_dict(model, batch):
        counts["n"] += 1
        return squares(model, batch) * counts["n"]

    def collects_outputs(model, batch):
        outputs.append(model(batch).detach())
        return squares(model, batch) * len(outputs)

    def counts_in_an_object(model, batch):
        holder.count += 1
        return squares(model, batch) * holder.count

    return {
        "calls": counts_calls,
        "hidden": keeps_a_hidden_state,
        "counts": counts_in_a_dict,
        "outputs": collects_outputs,
        r"holder\.count": counts_in_an_object,
    }


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Runs graphs without Inductor."""
    traced = importlib.import_module("fxtrain.compiler.lowering._trace")
    monkeypatch.setattr(traced, "_compiled", lambda graph, *_: lambda tensors: graph(*tensors))


def train(module, loss_fn=squares, *, compiled=True, steps=3):
    tx = fx.optim.sgd(0.1)
    step, state, losses = fx.train_step(loss_fn, tx), fx.init(module, tx), []
    step = fx.compile(step) if compiled else step
    for _ in range(steps):
        state, output = step(state, X)
        losses.append(float(output.metrics["loss"]))
    return losses


@pytest.mark.parametrize("name", losses_from_outside())
def test_stateful_loss_is_rejected_when_compiled(name):
    with pytest.raises(RuntimeError, match=rf"got changes to {name}, which a compiled step would not repeat"):
        train(nn.Linear(2, 1), losses_from_outside()[name])


@pytest.mark.parametrize(("kind", "name"), [(OfTheClass, r"OfTheClass\.calls"), (OfAGlobal, "CALLS")])
def test_class_and_global_state_is_rejected_when_compiled(kind, name):
    with pytest.raises(RuntimeError, match=rf"got changes to {name}, which a compiled step would not repeat"):
        train(kind())


@pytest.mark.parametrize("name", losses_from_outside())
def test_uncompiled_stateful_loss_matches_plain_torch(name):
    loss_fn = losses_from_outside()[name]
    torch.manual_seed(0)
    module = nn.Linear(2, 1)
    found = train(module, losses_from_outside()[name], compiled=False)
    optimizer, wanted = torch.optim.SGD(module.parameters(), 0.1), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_fn(module, X)
        loss.backward()
        optimizer.step()
        wanted.append(float(loss.detach()))
    assert found == pytest.approx(wanted)


def test_activation_stored_by_forward_hook_is_accepted():
    module, seen = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)), {}
    module[0].register_forward_hook(lambda part, inputs, output: seen.__setitem__("last", output))

    def penalized(model, batch):
        return squares(model, batch) + seen["last"].square().mean()

    assert train(module, penalized) == pytest.approx(train(module, penalized, compiled=False))


def test_caches_hold_real_tensors():
    tables = {}

    class Cached(OfTheClass):
        @functools.lru_cache  # noqa: B019
        def table(self, size):
            return torch.linspace(0, 1, size)[:, None]

        def forward(self, x):
            if len(x) not in tables:
                tables[len(x)] = torch.linspace(1, 2, len(x))[:, None]
            return self.inner(x) * self.table(len(x)) * tables[len(x)]

    module = Cached()
    found = train(module)
    assert type(tables[3]) is torch.Tensor
    assert found == pytest.approx(train(module, compiled=False))


def test_write_only_log_warns():
    log = []

    def logs(model, batch):
        log.append("called")
        return squares(model, batch)

    module = nn.Linear(2, 1)
    with pytest.warns(RuntimeWarning, match="logs adds to log while it is traced"):
        train(module, logs)
    assert log == ["called"]


class MakesValues(collections.OrderedDict):
    """A table whose values are made when they are read, as that of the activations of transformers."""

    def __getitem__(self, key):
        return super().__getitem__(key)(reads=1)


class MakesElements(list):
    def __iter__(self):
        return iter([object() for _ in range(len(self))])

    def copy(self):
        raise AssertionError("copied by the subclass")


@pytest.mark.parametrize("table", [MakesValues(relu=dict), MakesElements([1, 2])])
def test_container_that_makes_its_elements_when_read_is_unchanged(table):
    def loss_fn(model, batch):
        return squares(model, batch) * len(table)

    tx = fx.optim.sgd(0.1)
    step = fx.compile(fx.train_step(loss_fn, tx))
    step(fx.init(nn.Linear(2, 1), tx), X)
    assert step.route == "inductor, traced"


def test_counts_in_a_table_that_makes_its_values_are_found():
    table = MakesValues(relu=dict)

    def loss_fn(model, batch):
        table[f"call {len(table)}"] = dict
        return squares(model, batch) * len(table)

    with pytest.raises(fx.model.CapturedStateError, match="table"):
        train(nn.Linear(2, 1), loss_fn)
