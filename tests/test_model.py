"""The functional model: its calls match the original module on the values of a state."""

import copy
import threading

import problem
import pytest
import torch
from example_modules import KINDS, Parts, close, example, seeded
from torch import nn

import fxtrain as fx
from fxtrain import rng, testing, tree


def loss_fn(model, batch):
    return model(batch).abs().square().mean().float()


def gradient(state, batch):
    return fx.gradients(loss_fn)(state, batch)


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
