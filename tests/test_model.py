"""The functional model: calls match the original module on the values of a state, and have no side effects."""

import copy
import threading

import problem
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxtrain as fx
from fxtrain import rng, testing, tree


class Tied(nn.Module):
    """An embedding whose weight is tied to the head, with a method besides ``forward``."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens, *, scale=1.0):
        return self.head(self.embed(tokens)) * scale

    def score(self, tokens):
        return self(tokens, scale=2.0).logsumexp(-1)


class Parts(nn.Module):
    """A list and a dict of submodules, a plain parameter, and buffers of all kinds."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.by_name = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Tanh()})
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("calls", torch.tensor(0), persistent=False)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.calls = self.calls + 1
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        for layer in self.layers:
            x = layer(x).relu()
        return self.by_name["b"](self.by_name["a"](x)) * self.scale


class Recurrent(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def convolutions():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 2))


KINDS = {
    "sequence": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), (5, 4)),
    "convolutions, batch norm": (convolutions, (5, 1, 6, 6)),
    "tied": (Tied, "tokens"),
    "parts and buffers": (Parts, (5, 4)),
    "recurrent": (lambda: Recurrent(4, 3, num_layers=2), (6, 5, 4)),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), (2, 5, 4)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)), (5, 4)),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 2)), (5, 4)),
    "bfloat16": (lambda: nn.Linear(4, 2).bfloat16(), (5, 4)),
    "float16": (lambda: nn.Linear(4, 2).half(), (5, 4)),
    "double": (lambda: nn.Linear(4, 2).double(), (5, 4)),
    "complex": (lambda: nn.Linear(4, 2, dtype=torch.complex64), (5, 4)),
}


def example(kind):
    make, shape = KINDS[kind]
    module = seeded(make)
    generator = torch.Generator().manual_seed(1)
    if shape == "tokens":
        return module, torch.randint(0, 7, (3, 5), generator=generator)
    return module, torch.randn(shape, generator=generator).to(next(module.parameters()).dtype)


def loss_fn(model, batch):
    return model(batch).abs().square().mean().float()


def gradient(state, batch):
    return fx.gradients(loss_fn)(state, batch)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


class TestMatchesModule:
    @pytest.mark.parametrize("kind", KINDS)
    def test_gradients_and_buffers_match_autograd(self, kind):
        module, batch = example(kind)
        found = gradient(fx.init(module), batch)
        loss_fn(module, batch).backward()
        close(found.grads, {name: value.grad for name, value in module.named_parameters()})
        close(found.buffers, dict(module.named_buffers()))

    @pytest.mark.parametrize("kind", KINDS)
    def test_view_matches_module_in_eval_mode(self, kind):
        module, batch = example(kind)
        view = fx.view(fx.init(module))
        close(view(batch), module.eval()(batch).detach())

    def test_loss_can_use_methods_and_parameters(self):
        module, tokens = example("tied")

        def everything(model, batch):
            penalty = sum(parameter.square().sum() for parameter in model.parameters())
            return model(batch, scale=0.5).mean() + model.score(batch).mean() + penalty + model.head.weight.sum()

        found = fx.gradients(everything)(fx.init(module), tokens).grads
        everything(module, tokens).backward()
        close(found, {"embed.weight": module.embed.weight.grad})


class TestInit:
    def test_original_module_is_unchanged(self):
        module = problem.module()
        module[0].weight.requires_grad_(False)
        module[1].eval()
        calls = []
        module.register_forward_hook(lambda *_: calls.append(1))
        module[4].weight.grad = torch.ones(1, 8)
        attributes = {name: dict(part.__dict__) for name, part in module.named_modules()}
        values = copy.deepcopy(module.state_dict())
        state, step = fx.init(module, problem.transform()), problem.step()
        for batch in problem.data(3):
            state, _ = step(state, batch)
        fx.view(state)(batch["x"])
        testing.assert_equal(module.state_dict(), values, "the module's values")
        assert {name: dict(part.__dict__) for name, part in module.named_modules()} == attributes
        assert [p.requires_grad for p in module.parameters()] == [False, *[True] * 5]
        assert [part.training for part in module] == [True, False, True, True, True]
        assert torch.equal(module[4].weight.grad, torch.ones(1, 8))
        assert module[0].weight.device.type == "cpu"
        assert len(calls) == 4  # the copy keeps the hooks

    def test_state_leaves_share_no_memory(self):
        module = Parts()
        state = fx.init(module, fx.optim.adamw(1e-3))
        leaves = [*tree.leaves(state), *module.parameters(), *module.buffers()]
        assert len({leaf.untyped_storage().data_ptr() for leaf in leaves}) == len(leaves)
        assert not any(leaf.requires_grad for leaf in tree.leaves(state))

    def test_architecture_is_on_meta_device(self, monkeypatch):
        def copy_without_memory(self, memo):
            assert self.is_meta, "a weight was copied"
            return nn.Parameter(torch.empty_like(self))

        monkeypatch.setattr(nn.Parameter, "__deepcopy__", copy_without_memory)
        state = fx.init(Parts())
        for skeleton in (state.model.named_modules(train=train)[""] for train in (True, False)):
            values = [*skeleton.parameters(), *skeleton.buffers()]
            assert values
            assert {value.device.type for value in values} == {"meta"}

    def test_dtype_and_device_are_applied(self):
        module = Parts()
        module.register_parameter("counts", nn.Parameter(torch.arange(2), requires_grad=False))
        state = fx.init(module, fx.optim.adamw(1e-3), dtype=torch.bfloat16)
        assert {name for name, leaf in state.params.items() if leaf.dtype != torch.bfloat16} == {"counts"}
        assert state.params["counts"].tolist() == [0, 1]
        assert {name: leaf.dtype for name, leaf in state.buffers.items()} == {
            "calls": torch.int64,
            "mean": torch.float32,
        }
        state = fx.init(Parts(), fx.optim.adamw(1e-3), device="meta")
        assert {leaf.device.type for leaf in tree.leaves(state)} == {"meta"}

    def test_non_persistent_buffers_are_in_the_state(self):
        module, batch = example("parts and buffers")
        state, step = fx.init(module, fx.optim.sgd(0.1)), fx.train_step(loss_fn, fx.optim.sgd(0.1))
        for _ in range(3):
            state, _ = step(state, batch)
        assert int(state.buffers["calls"]) == 3

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: [nn.Linear(1, 1), 3], r"got 3 at model\[1\]"),
            (lambda: nn.LazyLinear(3), "got lazy parameters in model. Run it once on a batch first"),
            (lambda: {"a": nn.LazyBatchNorm1d(affine=False)}, r"lazy parameters in model\['a'\]"),
            (
                lambda: torch.compile(nn.Linear(1, 1), backend="eager"),
                "got a compiled one .* at model\\. Give the original module",
            ),
        ],
    )
    def test_non_models_are_rejected(self, make, message):
        with pytest.raises(TypeError, match=message):
            fx.init(make())

    def test_uncopyable_module_is_rejected(self):
        module = nn.Linear(1, 1)
        module.lock = threading.Lock()
        with pytest.raises(TypeError, match=r"expected modules that copy.deepcopy can copy, .*lock.*\. Remove locks"):
            fx.init(module)

    @pytest.mark.parametrize("seed", [1.0, True, None, 2**63])
    def test_non_integer_seed_is_rejected(self, seed):
        with pytest.raises(TypeError, match="expected seed to be a 64-bit int"):
            fx.init(nn.Linear(1, 1), seed=seed)

    @pytest.mark.parametrize(
        ("tx", "error", "message"),
        [
            (torch.optim.SGD, TypeError, "got the class torch.optim.SGD. Use fx.optim.sgd"),
            ({"a": fx.optim.sgd(0.1)}, ValueError, r"keys of the model \(\['a', 'b'\]\), got \['a'\]"),
            ({"a": fx.optim.sgd(0.1), "b": 0.1}, TypeError, "got 0.1"),
        ],
    )
    def test_non_transformations_are_rejected(self, tx, error, message):
        with pytest.raises(error, match=message):
            fx.init({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}, tx)


class TestSharedMemory:
    """Overlapping tensors change together in torch, but a state would copy them apart."""

    @staticmethod
    def pair(change):
        module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        change(module["a"], module["b"])
        return module

    @pytest.mark.parametrize(
        ("change", "names"),
        [
            (lambda a, b: setattr(b.weight, "data", a.weight.data), "model.a.weight and model.b.weight"),
            (lambda a, b: setattr(b.weight, "data", a.weight.data.T), "model.a.weight and model.b.weight"),
            (
                lambda a, b: setattr(b.bias, "data", a.weight.data[0]),
                "model.b.bias and model.a.weight",
            ),
            (lambda a, b: b.register_buffer("last", a.weight.data[1]), "model.a.weight and model.b.last"),
        ],
        ids=["same", "transposed", "part", "buffer"],
    )
    def test_overlapping_parameter_is_rejected(self, change, names):
        with pytest.raises(ValueError, match=f"got ({names}), which overlap.*assigning one Parameter"):
            fx.init(self.pair(change))

    def test_disjoint_frozen_and_tied_parameters_are_accepted(self):
        memory = torch.arange(8.0)

        def beside(a, b):
            a.weight.data, b.weight.data = memory[:4].view(2, 2), memory[4:].view(2, 2)

        def interleaved(a, b):
            a.weight.data, b.weight.data = memory.view(2, 4)[:, :2], memory.view(2, 4)[:, 2:]

        def frozen(a, b):
            b.weight.data = a.weight.data
            a.weight.requires_grad_(False)
            b.weight.requires_grad_(False)

        def tied(a, b):
            b.weight = a.weight

        for change in (beside, interleaved, frozen, tied):
            fx.init(self.pair(change))


class TestTrainableParameters:
    @pytest.mark.parametrize("tx", [problem.transform(), fx.optim.from_torch(torch.optim.Adam, lr=0.1)])
    def test_frozen_parameters_are_unchanged_and_have_no_optimizer_state(self, tx):
        module = problem.module()
        module[0].requires_grad_(False)
        state = fx.init(module, tx)
        shapes = [leaf.shape for leaf in tree.leaves(state.opt_state)]
        assert module[0].weight.shape not in shapes
        assert module[4].weight.shape in shapes
        new, _ = fx.train_step(problem.loss_fn, tx)(state, problem.data()[0])
        for name, value in new.params.items():
            assert torch.equal(value, state.params[name]) == name.startswith("0."), name

    def test_integer_parameters_are_unchanged(self):
        module = nn.Linear(2, 1)
        module.register_parameter("counts", nn.Parameter(torch.arange(2), requires_grad=False))
        tx = fx.optim.adamw(0.1)
        new, _ = fx.train_step(loss_fn, tx)(fx.init(module, tx), torch.ones(3, 2))
        assert new.params["counts"].tolist() == [0, 1]
        assert not torch.equal(new.params["weight"], module.weight)

    def test_bare_tensors_are_parameters(self):
        frozen = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        state = fx.init({"w": torch.tensor(3.0), "i": torch.tensor(4), "frozen": frozen}, fx.optim.sgd(0.5))
        step = fx.train_step(lambda model, batch: model["w"] * model["i"] * model["frozen"] * batch, fx.optim.sgd(0.5))
        state, _ = step(state, torch.tensor(1.0))
        assert tree.map(float, state.params) == {"w": -1.0, "i": 4.0, "frozen": 2.0}
        both = torch.vmap(step, (0, None))(tree.map(lambda leaf: torch.stack([leaf] * 2), state), torch.tensor(1.0))
        assert both[0].params["w"].tolist() == [-5.0, -5.0]

    def test_tied_weights_are_one_leaf(self):
        module, tokens = example("tied")
        tx = fx.optim.sgd(0.5)
        state = fx.init(module, tx)
        assert list(state.params) == ["embed.weight"]
        state, _ = fx.train_step(loss_fn, tx)(state, tokens)
        view = fx.view(state)
        assert torch.equal(view.embed.weight, view.head.weight)
        assert not torch.equal(view.embed.weight, module.embed.weight)

    def test_dict_of_modules_may_share_parameters_and_modules(self):
        first, second = seeded(lambda: (nn.Linear(3, 3), nn.Linear(3, 3)))
        second.weight = first.weight
        modules = {"first": first, "second": second, "again": first}
        state = fx.init(modules)
        assert tree.map(lambda _: None, state.params) == {
            "again": {"bias": None, "weight": None},
            "first": {},
            "second": {"bias": None},
        }

        def loss_fn(model, batch):
            return model["again"](model["second"](model["first"](batch))).square().mean()

        batch = torch.ones(2, 3)
        found = fx.gradients(loss_fn)(state, batch).grads
        loss_fn(modules, batch).backward()
        close(found["again"], {"weight": first.weight.grad, "bias": first.bias.grad})
        close(found["second"], {"bias": second.bias.grad})

    def test_model_without_trainable_parameters_is_rejected(self):
        state = fx.init(nn.Linear(1, 1).requires_grad_(False))
        with pytest.raises(ValueError, match="expected a trainable parameter, got none"):
            gradient(state, torch.ones(1, 1))


class TestModes:
    def test_module_in_eval_mode_trains_in_train_mode(self):
        module = problem.module().eval()
        found = fx.gradients(problem.loss_fn)(fx.init(module), problem.data()[0])
        assert int(found.buffers["1.num_batches_tracked"]) == 1
        assert not module.training

    def test_submodule_in_eval_mode_stays_in_eval_mode(self):
        module = problem.module()
        module[1].eval()
        found = fx.gradients(problem.loss_fn)(fx.init(module), problem.data()[0])
        assert int(found.buffers["1.num_batches_tracked"]) == 0

    def test_dropout_follows_the_mode_of_the_view(self):
        x = torch.ones(100)
        state = fx.init(nn.Dropout(0.5))
        assert torch.equal(fx.view(state)(x), x)
        assert set(fx.view(state, train=True)(x).tolist()) == {0.0, 2.0}
        assert torch.equal(fx.eval_step(lambda model, batch: model(batch).sum())(state, x).metrics["loss"], x.sum())


class TestPurity:
    def test_buffers_are_threaded_and_input_state_is_unchanged(self):
        module, tx = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)), fx.optim.sgd(0.1)
        state, step = fx.init(module, tx), fx.train_step(problem.loss_fn, tx, accumulate=2)
        first, second = problem.data(2)
        before = state.copy()
        after, _ = step(step(state, first)[0], second)
        testing.assert_equal(state, before, "the state that the step was given")
        for part in (*first["x"].chunk(2), *second["x"].chunk(2)):
            module(part)
        close(after.buffers, dict(module.named_buffers()))

    def test_attributes_set_by_a_call_are_discarded(self):
        class Stores(nn.Linear):
            def forward(self, x):
                self.last = super().forward(x)
                return self.last

        def loss_fn(model, batch):
            return (model(batch) + model.last).sum()

        state, tx = fx.init(Stores(2, 1), fx.optim.sgd(0.0)), fx.optim.sgd(0.0)
        step = fx.train_step(loss_fn, tx)
        first, second = step(state, torch.ones(3, 2)), step(state, torch.ones(3, 2))
        testing.assert_equal(first, second, "the second call")
        with pytest.raises(AttributeError, match="last"):
            fx.view(state).last  # noqa: B018

    @pytest.mark.parametrize("write", [lambda p: p.detach().zero_(), lambda p: p.data.zero_()])
    def test_writing_into_a_parameter_is_rejected(self, write):
        def writes(model, batch):
            write(model.weight)
            return model(batch).sum()

        tx = fx.optim.sgd(0.1)
        with pytest.raises(RuntimeError, match=r"got an in-place write \(zero_\) to model\.weight"):
            fx.train_step(writes, tx)(fx.init(nn.Linear(1, 1), tx), torch.ones(1, 1))

    def test_model_is_usable_after_an_error(self):
        module, batch = example("sequence")
        state = fx.init(module)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            fx.view(state)(torch.ones(1, 3))
        close(fx.view(state)(batch), module(batch).detach())


class TestRandomness:
    """A seed determines the run in every mode, independently of the global generator."""

    def test_random_samples_match_eager_compiled_and_vmapped(self):
        def loss_fn(model, batch):
            x = model(batch) + torch.randn_like(batch) + torch.rand(batch.shape[0], 1) + torch.normal(0.0, 1.0, (4,))
            return F.dropout(x, 0.3).square().mean()

        first = fx.init(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), fx.optim.sgd(0.1))
        states = [first, first.replace(seed=first.seed + 1)]
        step, batch = fx.train_step(loss_fn, fx.optim.sgd(0.1)), torch.ones(8, 4)
        compiled = fx.compile(step, backend="aot_eager")
        with rng.untouched():
            alone = [step(state, batch) for state in states]
            close([compiled(state, batch)[0].params for state in states], [state.params for state, _ in alone])
            together, output = torch.vmap(step, (0, None))(
                tree.map(lambda *leaves: torch.stack(leaves), *states), batch
            )
        close(output.metrics["loss"], torch.stack([output.metrics["loss"] for _, output in alone]))
        for index, (state, _) in enumerate(alone):
            close(tree.map(lambda leaf, index=index: leaf[index], together.params), state.params)
        assert alone[0][1].metrics["loss"] != alone[1][1].metrics["loss"]

    def test_random_samples_depend_only_on_step_microbatch_and_seed(self):
        model, batch = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), torch.ones(32, 2)
        state = fx.init(model)
        find = fx.gradients(lambda model, batch: model(batch).square().mean())
        losses = {
            "first": find(state, batch).loss,
            "step": find(state.replace(step=state.step + 1), batch).loss,
            "microbatch": find(state, batch, 1).loss,
            "seed": find(state.replace(seed=state.seed + 1), batch).loss,
        }
        assert len({float(loss) for loss in losses.values()}) == 4
        torch.manual_seed(99)
        assert torch.equal(find(state, batch).loss, losses["first"])

    def test_microbatches_get_different_random_samples(self):
        losses, tx = [], fx.optim.sgd(0.1)

        def watch(state, event: fx.Microbatch):
            losses.append(float(event.loss))
            return state, fx.Control()

        step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx, accumulate=3, callbacks=watch)
        step(fx.init(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), tx), torch.ones(96, 2))
        assert len(set(losses)) == 3

    def test_unsupported_random_operation_is_named(self):
        state = fx.init(nn.Linear(1, 1))
        with pytest.raises(NotImplementedError, match="poisson"):
            fx.gradients(lambda model, batch: torch.poisson(batch).mean())(state, torch.ones(2))


class TestView:
    def start(self):
        return fx.init(seeded(Parts))

    def test_view_reaches_methods_submodules_and_parameters(self):
        module, tokens = example("tied")
        view = fx.view(fx.init(module))
        close(view.score(tokens), module.score(tokens).detach())
        close(view(tokens, scale=3.0), module(tokens, scale=3.0).detach())
        assert torch.equal(view.head.weight, module.head.weight)
        module, view, x = seeded(Parts), fx.view(self.start()), torch.ones(2, 4)
        close(view.layers[1](x), module.layers[1](x).detach())
        close(view.by_name["a"](x), module.by_name["a"](x).detach())
        close(view.get_submodule("by_name.a")(x), module.by_name["a"](x).detach())
        assert [layer.out_features for layer in view.layers] == [4, 4, 4]
        assert torch.equal(view.scale, module.scale)
        testing.assert_equal(dict(view.named_parameters()), fx.init(module).params, "named_parameters")
        testing.assert_equal(dict(view.state_dict()), dict(module.state_dict()), "state_dict")

    def test_view_indexes_a_dict_of_modules(self):
        first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        view = fx.view(fx.init({"a": first, "b": {"c": second}, "t": torch.tensor(3.0)}))
        x = torch.ones(1, 2)
        close(view["b"]["c"](view["a"](x)), second(first(x)).detach())
        assert float(view["t"]) == 3.0

    def test_calls_of_a_view_leave_the_state_unchanged(self):
        state = self.start()
        before = state.copy()
        view = fx.view(state, train=True)
        view(torch.ones(2, 4))
        view.mean.add_(1.0)
        assert int(view.calls) == 0
        testing.assert_equal(state, before, "the state viewed")
        with pytest.raises(RuntimeError, match=r"a call of the view .* an in-place write .* to model\.layers\.0\."):
            view.layers[0].reset_parameters()

    def test_random_samples_of_a_view_depend_only_on_key_and_step(self):
        state, x = fx.init(nn.Dropout(0.5)), torch.ones(64)
        view = fx.view(state, train=True)
        assert torch.equal(view(x), view(x))
        assert not torch.equal(view(x), fx.view(state, train=True, key=rng.key(1))(x))
        assert not torch.equal(view(x), fx.view(state.replace(step=state.step + 1), train=True)(x))

    def test_view_works_as_teacher_inside_a_loss(self):
        module, batch = example("sequence")
        state = fx.init(module)
        teacher = state.copy()

        def distil(model, batch):
            return (model(batch) - fx.view(teacher)(batch)).square().mean()

        assert float(fx.gradients(distil)(state, batch).loss) == 0.0

    def test_missing_attribute_error_names_the_module_class(self):
        view = fx.view(self.start())
        with pytest.raises(AttributeError, match="'Parts' object has no attribute 'missing'"):
            view.missing  # noqa: B018
        assert repr(view) == "View of Model(Parts) at step 0"

    def test_state_without_model_is_rejected(self):
        with pytest.raises(ValueError, match="expected a state with a model, got one without"):
            fx.view(self.start().replace(model=None))
