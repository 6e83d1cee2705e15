"""In-place writes: kept for momentum encoders, made on a copy for batches, and refused for captured tensors."""

import copy
import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxtrain as fx
from fxtrain import testing

ROUTES = ["func", "autograd", "traced", "dynamo", "regions", "eager forward"]


def compiled(step, route, monkeypatch):
    """Returns the step compiled by a route. Graphs are interpreted, because Inductor is slow."""
    if route in ("func", "autograd"):
        return step
    if route == "traced":
        traced = importlib.import_module("fxtrain.compiler.lowering._trace")
        monkeypatch.setattr(traced, "_compiled", lambda graph, *_: lambda tensors: graph(*tensors))
        return fx.compile(step, fullgraph=True)
    if route == "dynamo":
        return fx.compile(step, backend="aot_eager", fullgraph=True)
    made = fx.compile(step, backend="eager")
    routes: Any = made._compiler
    routes._chosen = [chosen.name for chosen in routes._routes].index(f"eager, {route}")
    return made


def data(count=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


def plain(module, loss_fn, batches):
    """Trains a copy of the module in a plain PyTorch loop."""
    module = copy.deepcopy(module)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_fn(module, batch.clone())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return module, losses


def ours(module, loss_fn, batches, route="func", monkeypatch=None, **options):
    tx = fx.optim.sgd(0.1)
    way = "autograd" if route in ("autograd", "regions", "eager forward") else "func"
    step = compiled(fx.train_step(loss_fn, tx, differentiate=way, **options), route, monkeypatch)
    state, losses = fx.init(module, tx), []
    for batch in batches:
        state, output = step(state, batch)
        losses.append(float(output.metrics["loss"]))
    return state, losses


def assert_same(state, losses, module, wanted):
    assert losses == pytest.approx(wanted, abs=1e-12)
    for name, value in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
        found = state.params[name] if name in state.params else state.buffers[name]
        torch.testing.assert_close(found, value.detach(), rtol=0, atol=1e-12)


def squares(model, batch):
    return model(batch).square().mean()


def each(write):
    """Returns an update that applies ``write`` to each pair of parameters."""

    def update(module):
        for slow, fast in zip(module.slow.parameters(), module.fast.parameters(), strict=True):
            write(slow, fast)

    return update


def foreach(module):
    slow = list(module.slow.parameters())
    torch._foreach_mul_(slow, 0.9)
    torch._foreach_add_(slow, list(module.fast.parameters()), alpha=0.1)


def loads(module):
    fast = module.fast.state_dict()
    module.slow.load_state_dict(
        {name: 0.9 * value + 0.1 * fast[name] for name, value in module.slow.state_dict().items()}
    )


def assigns(slow, fast):
    slow.data = slow.data * 0.9 + fast.data * 0.1


def adds(slow, fast):
    slow *= 0.9
    slow += 0.1 * fast


def sets(slow, fast):
    slow[:] = 0.9 * slow + 0.1 * fast


UPDATES = {
    "data": each(assigns),
    "copy": each(lambda slow, fast: slow.copy_(0.9 * slow + 0.1 * fast)),
    "data_copy": each(lambda slow, fast: slow.data.copy_(0.9 * slow.data + 0.1 * fast.data)),
    "mul_add": each(lambda slow, fast: slow.mul_(0.9).add_(fast, alpha=0.1)),
    "detached": each(lambda slow, fast: slow.detach().lerp_(fast.detach(), 0.1)),
    "operators": each(adds),
    "items": each(sets),
    "foreach": foreach,
    "state_dict": loads,
}


class Momentum(nn.Module):
    """Two encoders with batch norm as in BYOL, and a queue as in MoCo."""

    def __init__(self, update=UPDATES["mul_add"], *, late=False):
        super().__init__()
        torch.manual_seed(0)
        self.fast = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
        self.slow = copy.deepcopy(self.fast).requires_grad_(False)
        self.register_buffer("queue", torch.ones(3, 12, dtype=torch.float64))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))
        self.update, self.late = update, late

    def forward(self, x):
        if not self.late:
            with torch.no_grad():
                self.update(self)
        with torch.no_grad():
            keys = self.slow(x)
        y = self.fast(x)
        logits = y @ self.queue.clone().detach()
        if self.late:
            with torch.no_grad():
                self.update(self)
        self.queue[:, :6] = keys.T
        self.place[0] = (self.place[0] + 6) % 12
        return logits + (y * keys).sum(1, keepdim=True)


class Small(nn.Module):
    """A minimal momentum encoder, which compiles fast."""

    def __init__(self, update):
        super().__init__()
        torch.manual_seed(0)
        self.fast = nn.Linear(4, 2).double()
        self.slow = copy.deepcopy(self.fast).requires_grad_(False)
        self.update = update

    def forward(self, x):
        with torch.no_grad():
            self.update(self)
        return self.fast(x) * self.slow(x)


class TestMomentumEncoders:
    @pytest.mark.parametrize("update", UPDATES)
    @pytest.mark.parametrize("route", ["func", "autograd"])
    def test_every_kind_of_write_equals_the_plain_loop(self, update, route):
        module = Momentum(UPDATES[update])
        assert_same(*ours(module, squares, data(), route), *plain(module, squares, data()))

    @pytest.mark.parametrize(
        ("route", "update"),
        [
            *(("traced", "data"), ("traced", "mul_add"), ("regions", "mul_add"), ("eager forward", "data")),
            pytest.param("dynamo", "mul_add", marks=pytest.mark.slow),
        ],
    )
    def test_every_route_equals_the_plain_loop(self, route, update, monkeypatch):
        module = Small(UPDATES[update])
        assert_same(*ours(module, squares, data(), route, monkeypatch), *plain(module, squares, data()))

    @pytest.mark.parametrize("route", ["func", "autograd"])
    def test_writes_after_the_forward_pass_and_in_the_loss_are_kept(self, route):
        def updates(model, batch):
            with torch.no_grad():
                model.update(model)
            return squares(model, batch)

        module = Momentum(UPDATES["data"], late=True)
        assert_same(*ours(module, updates, data(), route), *plain(module, updates, data()))

    def test_hard_copy_shares_no_storage(self):
        module = Momentum(each(lambda slow, fast: setattr(slow, "data", fast.data)))
        state, _ = ours(module, squares, data(1), "autograd")
        leaves = fx.tree.leaves(state.params)
        assert len({leaf.untyped_storage()._cdata for leaf in leaves}) == len(leaves)

    def test_replaced_parameter_equals_the_plain_loop(self):
        def replaced(module):
            module.slow[0].weight = nn.Parameter(0.9 * module.slow[0].weight + 0.1 * module.fast[0].weight, False)

        module = Momentum(replaced)
        assert_same(*ours(module, squares, data()), *plain(module, squares, data()))

    def test_first_write_at_a_later_step_is_kept(self):
        class Late(Momentum):
            def forward(self, x):
                self.late = int(self.place) == 0
                return super().forward(x)

        module = Late()
        assert_same(*ours(module, squares, data(), "autograd"), *plain(module, squares, data()))

    def test_microbatches_see_earlier_writes(self):
        module = Small(UPDATES["mul_add"])
        state, _ = ours(module, squares, data(1), accumulate=2)
        for part in data(1)[0].split(3):  # the second part reads the writes of the first
            (squares(module, part) / 2).backward()
        with torch.no_grad():
            for parameter in module.fast.parameters():
                parameter -= 0.1 * parameter.grad
        assert_same(state, [], module, [])

    def test_resume_is_exact(self, tmp_path):
        tx = fx.optim.sgd(0.1, momentum=0.9)
        step, start = fx.train_step(squares, tx), fx.init(Momentum(), tx)

        def run(folder, steps):
            return fx.fit(start, step, data(6), steps=steps, checkpointer=fx.checkpointer(folder), resume=True).state

        whole = run(tmp_path / "whole", 6)
        run(tmp_path / "cut", 3)
        testing.assert_equal(run(tmp_path / "cut", 6).params, whole.params, "params")

    def test_writes_in_evaluation_and_views_are_discarded(self):
        state = fx.init(Momentum())
        before = state.copy()
        fx.eval_step(squares)(state, data()[0])
        fx.view(state, train=True)(data()[0])
        testing.assert_equal(state, before, "the state")

    def test_vmapped_step_writes_each_member(self):
        tx = fx.optim.sgd(0.1)
        step, state = fx.train_step(squares, tx), fx.init(Small(UPDATES["data"]), tx)
        batches = torch.stack(data(2))
        many = torch.vmap(step, in_dims=(None, 0))(state, batches)[0]
        for index, batch in enumerate(batches):
            one = step(state, batch)[0].params
            torch.testing.assert_close({name: value[index] for name, value in many.params.items()}, one)

    @pytest.mark.parametrize("route", ["func", "autograd", "traced"])
    @pytest.mark.parametrize("update", ["data", "data_copy", "mul_add", "foreach"])
    def test_write_to_a_trained_parameter_is_refused(self, update, route, monkeypatch):
        module = Momentum(UPDATES[update])
        module.slow.requires_grad_(True)
        tx = fx.optim.sgd(0.1)
        state = fx.init(module, tx)
        before = state.copy()
        way = "func" if route == "traced" else route
        step = compiled(fx.train_step(squares, tx, differentiate=way), route, monkeypatch)
        with pytest.raises(RuntimeError, match=r"model\.slow\.0\.weight\. Call requires_grad_\(False\) before fxtrain"):
            step(state, data()[0])
        testing.assert_equal(state, before, "the state")

    def test_embedding_with_max_norm_is_refused(self):
        module = nn.Embedding(5, 3, max_norm=0.1)
        state, tokens = fx.init(module), torch.tensor([0, 1, 4])
        before = state.copy()
        with pytest.raises(RuntimeError, match=r"an in-place write \(embedding\) to model\.weight"):
            fx.gradients(squares)(state, tokens)
        testing.assert_equal(state, before, "the state")


def masks(model, batch):
    batch[batch > 1.0] = 0.0
    return squares(model, batch)


def scales_data(model, batch):
    batch.data.mul_(0.5)
    return squares(model, batch)


def activates(model, batch):
    return squares(model, F.relu(batch, inplace=True))


def a_view(model, batch):
    batch[0].zero_()
    return squares(model, batch)


class TestBatches:
    """Functions write into a copy of the batch, so the batch of the caller keeps its values."""

    @pytest.mark.parametrize("loss_fn", [masks, scales_data, activates, a_view])
    @pytest.mark.parametrize("route", ["func", "autograd"])
    def test_every_kind_of_write_equals_the_plain_loop(self, loss_fn, route):
        module, batches = nn.Linear(4, 2).double(), data()
        assert_same(*ours(module, loss_fn, batches, route), *plain(module, loss_fn, data()))
        testing.assert_equal(batches, data(), "the batches")

    @pytest.mark.parametrize("route", ROUTES[2:])
    def test_every_route_equals_the_plain_loop(self, route, monkeypatch):
        def writes(model, batch):
            batch.mul_(0.5)
            return squares(model, batch)

        module, batches = nn.Linear(4, 2).double(), data()
        assert_same(*ours(module, writes, batches, route, monkeypatch), *plain(module, writes, data()))
        testing.assert_equal(batches, data(), "the batches")

    def test_evaluation_and_in_place_modules_keep_the_batch(self):
        state, batch = fx.init(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2).double())), data()[0]
        for run in (fx.eval_step(squares), fx.view, fx.gradients(squares)):
            run(state)(batch) if run is fx.view else run(state, batch)
            testing.assert_equal(batch, data()[0], "the batch")

    def test_requires_grad_of_a_batch_makes_no_copy(self):
        def penalty(model, batch):
            seen.append(batch.data_ptr())
            batch.requires_grad_()
            return torch.autograd.grad(model(batch).sum(), batch, create_graph=True)[0].square().sum()

        batch, seen = data()[0], []
        state = fx.init(nn.Linear(4, 2).double())
        for _ in range(2):
            fx.gradients(penalty, differentiate="autograd")(state, batch)
        assert not batch.requires_grad
        assert set(seen) == {batch.data_ptr()}


class Holder:
    def __init__(self):
        self.value = torch.zeros(())


TOTAL = torch.zeros(())


def captures():
    """Returns loss functions that write into a captured tensor, by the name in the error."""
    total, many, holder, norm = torch.zeros(()), {"a": [torch.zeros(())]}, Holder(), nn.BatchNorm1d(4).double()

    def closure(model, batch):
        total.add_(1)
        return squares(model, batch)

    def globals_(model, batch):
        TOTAL.add_(1)
        return squares(model, batch)

    def default(model, batch, seen=torch.zeros(())):  # noqa: B008
        seen += 1
        return squares(model, batch)

    def container(model, batch):
        many["a"][0] += 1
        return squares(model, batch)

    def attribute(model, batch):
        holder.value.data.fill_(1)
        return squares(model, batch)

    def out(model, batch):
        torch.add(batch.detach().sum().float(), 1, out=total)
        return squares(model, batch)

    def module(model, batch):
        return squares(model, norm(batch))

    def follows(model, batch):
        with torch.no_grad():
            for slow, fast in zip(norm.parameters(), model.parameters(), strict=False):
                slow.mul_(0.5).add_(fast.sum())
        return squares(model, batch)

    return {
        "total": closure,
        "TOTAL": globals_,
        "seen": default,
        r"many\['a'\]\[0\]": container,
        r"holder\.value": attribute,
        r"\(add\) to total": out,
        r"norm\.num_batches_tracked": module,
        r"norm\.weight": follows,
    }


class TestCapturedTensors:
    @pytest.mark.parametrize("name", captures())
    @pytest.mark.parametrize("route", ["func", "autograd"])
    def test_writes_are_refused_by_name(self, name, route):
        with pytest.raises(RuntimeError, match=rf"got an in-place write .*{name}\. Register it as a buffer"):
            ours(nn.Linear(4, 2).double(), captures()[name], data(1), route)
        with pytest.raises(RuntimeError, match=rf"got an in-place write .*{name}\. Register it as a buffer"):
            fx.eval_step(captures()[name])(fx.init(nn.Linear(4, 2).double()), data()[0])

    @pytest.mark.parametrize("route", ["traced", "dynamo"])
    def test_writes_are_refused_at_the_first_compiled_step(self, route, monkeypatch):
        with pytest.raises(RuntimeError, match="to total"):
            ours(nn.Linear(4, 2).double(), captures()["total"], data(1), route, monkeypatch)
        assert not TOTAL.any()
