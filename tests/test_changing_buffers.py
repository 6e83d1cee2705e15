"""Buffers that a forward pass adds, reshapes or removes: caches are recomputed, all others are rejected."""

import pytest
import torch
from torch import nn
from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver

import fxtrain as fx

X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(2, 1)
        self.start()

    def start(self):
        pass


class Registers(Base):
    """Registers a buffer in the first call, as ALiBi does in x-transformers."""

    def forward(self, x):
        if getattr(self, "table", None) is None:
            self.register_buffer("table", torch.linspace(0, 1, len(x))[:, None], persistent=False)
        return self.inner(x) + self.table


class RegistersAlways(Base):
    def forward(self, x):
        self.register_buffer("table", torch.linspace(0, 1, len(x))[:, None], persistent=False)
        return self.inner(x) + self.table


class WasNone(Base):
    def start(self):
        self.register_buffer("table", None)

    def forward(self, x):
        if self.table is None:
            self.table = torch.linspace(0, 1, len(x))[:, None]
        return self.inner(x) + self.table


class Grows(Base):
    """Replaces a buffer by a longer one, as rotary tables do."""

    def start(self):
        self.register_buffer("table", torch.zeros(0, 1), persistent=False)

    def forward(self, x):
        if len(self.table) < len(x):
            self.table = torch.linspace(0, 1, len(x))[:, None]
        return self.inner(x) + self.table[: len(x)]


class Casts(Base):
    def start(self):
        self.register_buffer("table", torch.linspace(0, 1, 3, dtype=torch.float64)[:, None])

    def forward(self, x):
        self.table = self.table.to(x.dtype)
        return self.inner(x) + self.table


class GrowsLater(Base):
    """Replaces a buffer only for a batch longer than three rows."""

    def start(self):
        self.register_buffer("table", torch.arange(3.0)[:, None], persistent=False)

    def forward(self, x):
        if len(self.table) < len(x):
            self.table = torch.arange(float(len(x)))[:, None]
        return self.inner(x) + self.table[: len(x)]


class Counts(Base):
    def forward(self, x):
        if not hasattr(self, "calls"):
            self.register_buffer("calls", torch.zeros(()))
        self.calls += 1
        return self.inner(x) * self.calls


class Averages(Base):
    def start(self):
        self.register_buffer("mean", None)

    def forward(self, x):
        y = self.inner(x)
        self.mean = y.detach().mean() if self.mean is None else 0.9 * self.mean + 0.1 * y.detach().mean()
        return y - self.mean


class Collects(Base):
    def start(self):
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x):
        self.seen = torch.cat([self.seen, self.inner(x).detach().mean()[None]])
        return self.inner(x) * self.seen.sum()


class CastsAndKeeps(Base):
    def start(self):
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.mean = self.mean.double() + x.mean()
        return self.inner(x) * self.mean


class Drops(Base):
    def start(self):
        self.register_buffer("once", torch.ones(()))

    def forward(self, x):
        y = self.inner(x) if self.once is None else self.inner(x) * 2
        self.once = None
        return y


class Deletes(Base):
    def start(self):
        self.register_buffer("once", torch.ones(()))

    def forward(self, x):
        y = self.inner(x) * (2 if hasattr(self, "once") else 1)
        if hasattr(self, "once"):
            del self.once
        return y


class Observes(Base):
    def start(self):
        self.observer = PerChannelMinMaxObserver()

    def forward(self, x):
        return self.inner(self.observer(x)) * self.observer.max_val.sum()


CACHES = [Registers, RegistersAlways, WasNone, Grows, Casts]
STATES = {
    Counts: r"model\.calls \(missing before a call, a float32 tensor of shape \[\] after it",
    Averages: r"model\.mean \(missing before a call, a float32 tensor of shape \[\] after it",
    Collects: r"model\.seen \(a float32 tensor of shape \[0\] before a call, .* \[2\] after a second",
    CastsAndKeeps: r"model\.mean \(a float32 tensor of shape \[\] before a call, a float64 tensor",
    Drops: r"model\.once \(a float32 tensor of shape \[\] before a call, None after it",
    Deletes: r"model\.once \(a float32 tensor of shape \[\] before a call, missing after it",
    Observes: r"model\.observer\.min_val \(a float32 tensor of shape \[0\] before a call",
}


def squares(model, batch):
    return model(batch).square().mean()


def train(module, batches, route="eager", way="func"):
    tx = fx.optim.sgd(0.1)
    step, losses = fx.train_step(squares, tx, differentiate=way), []
    step = fx.compile(step, on_recompile="allow") if route == "traced" else step
    state = fx.init(module, tx)
    for batch in batches:
        state, output = step(state, batch)
        losses.append(float(output.metrics["loss"]))
    return state, losses


def plain(module, batches):
    optimizer, losses = torch.optim.SGD(module.parameters(), 0.1), []
    for batch in batches:
        optimizer.zero_grad()
        loss = squares(module, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(("route", "way"), [("eager", "func"), ("eager", "autograd"), ("traced", "func")])
def test_cached_buffer_trains_as_in_plain_torch(kind, route, way, interpreted):
    state, losses = train(kind(), [X] * 3, route, way)
    assert losses == pytest.approx(plain(kind(), [X] * 3))
    assert state.buffers.keys() == dict(kind().named_buffers()).keys()
    assert float(fx.eval_step(squares)(state, X).metrics["loss"]) < losses[-1]


@pytest.mark.parametrize("route", ["eager", "traced"])
def test_cached_buffer_may_grow_with_a_later_batch(route, interpreted):
    batches = [X, torch.cat([X, X]), X, torch.cat([X, X])]
    assert train(GrowsLater(), batches, route)[1] == pytest.approx(plain(GrowsLater(), batches))


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("way", ["func", "autograd"])
def test_stateful_buffer_is_rejected_by_name(kind, way):
    with pytest.raises(RuntimeError, match=rf"buffers keep their names.* got {STATES[kind]}.* before fxtrain\.init"):
        train(kind(), [X], way=way)
    with pytest.raises(RuntimeError, match=STATES[kind]):
        fx.eval_step(squares)(fx.init(kind()), X)


@pytest.mark.parametrize("kind", [Counts, Collects])
def test_stateful_buffer_is_rejected_at_first_compiled_step(kind, interpreted):
    with pytest.raises(RuntimeError, match=STATES[kind]):
        train(kind(), [X], "traced")


def test_quantization_observer_trains_after_one_call():
    module = Observes()
    module(X)
    assert train(module, [X] * 3)[1] == pytest.approx(plain(module, [X] * 3))


def test_fixed_shape_observer_buffer_is_threaded():
    class Whole(Observes):
        def start(self):
            self.observer = MinMaxObserver()

    batches = [X, 2 * X, 3 * X]
    state, losses = train(Whole(), batches)
    assert losses == pytest.approx(plain(Whole(), batches))
    assert float(state.buffers["observer.max_val"]) == 9.0


def test_x_transformers_alibi_trains_as_in_plain_torch():
    transformers = pytest.importorskip("x_transformers")
    torch.manual_seed(0)
    module = transformers.Encoder(dim=8, depth=1, heads=2, attn_dim_head=4, alibi_pos_bias=True)
    batches = [torch.randn(1, 4, 8) for _ in range(3)]
    assert train(module, batches)[1] == pytest.approx(plain(module, batches))
