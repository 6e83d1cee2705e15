"""Parameters without a gradient keep their values and their optimizer state, as in ``torch.optim``."""

import pytest
import torch
from test_optim_laws import FACTORIES, SHAPES, assert_close, draw
from test_optim_torch import IDS, TABLE
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

import fxtrain as fx
from fxtrain import optim, testing, tree

MATRICES = {"a": (6, 4), "b": (3, 5), "c": (2, 2)}
VECTORS = {"a": (7,), "b": (4, 6), "c": ()}


def normal(seed, shapes):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize(("name", "options"), TABLE, ids=IDS)
def test_sometimes_used_parameters_match_torch(name, options, double):
    kind, shapes = getattr(torch.optim, name), MATRICES if name == "Muon" else VECTORS
    tx, params = optim.from_torch(kind, **options), normal(0, shapes)
    theirs = {name: value.clone() for name, value in params.items()}
    optimizer = kind(list(theirs.values()), **options)
    state = tx.init(params)
    for step in range(1, 16):
        grads = normal(step, shapes)
        used = {"a": True, "b": step % 3 == 0, "c": 4 <= step != 9}
        updates, state = optim.update_used(
            tx, tree.map(lambda g, use: g if use else torch.zeros_like(g), grads, used), state, params, used
        )
        params = optim.apply_updates(params, updates)
        for path, value in theirs.items():
            value.grad = grads[path].clone() if used[path] else None
        optimizer.step()
        for path, value in theirs.items():
            torch.testing.assert_close(params[path], value, rtol=1e-12, atol=1e-12, msg=lambda m, p=path: p + m)


def without(values, path):
    return {name: value for name, value in values.items() if name != path}


@pytest.mark.parametrize("name", [name for name in FACTORIES if name != "every k"])
def test_unused_parameters_do_not_affect_the_others(name):
    tx, path = FACTORIES[name](), "layer.weight"
    params = draw(0)
    rest = without(params, path)
    state, alone = tx.init(params), tx.init(rest)
    before = [leaf.clone() for leaf in tree.leaves(state)]
    used = tree.map(lambda _: True, params) | {path: False}
    for step in range(1, 4):
        grads = draw(step)
        updates, state = optim.update_used(tx, grads | {path: torch.zeros(3, 4)}, state, params, used)
        expected, alone = tx.update(without(grads, path), alone, rest)
        assert not updates[path].any()
        assert_close(without(updates, path), expected, rtol=0, atol=0)
        params, rest = optim.apply_updates(params, updates), optim.apply_updates(rest, expected)
    kept = dict(zip(tree.paths(state), zip(before, tree.leaves(state), strict=True), strict=True))
    for place, (old, new) in kept.items():
        if f"'{path}'" in place:
            assert torch.equal(old, new), place
    # After both kinds of steps, the state still accepts an update of all parameters.
    updates, state = optim.update_used(tx, draw(9), state, params, tree.map(lambda _: True, params))
    assert all(leaf.isfinite().all() for leaf in tree.leaves((updates, state)))


def test_update_used_compiles_to_one_graph_and_vmaps():
    tx = FACTORIES["chain"]()
    params, used = draw(0), tree.map(lambda _: True, draw(0)) | {"scale": False}

    def update(grads, state, params):
        return optim.update_used(tx, grads, state, params, used)

    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(update, fullgraph=True, backend=counter)
    state = tx.init(params)
    assert_close(compiled(draw(1), state, params), update(draw(1), state, params))
    assert counter.frame_count == 1
    batched = draw(0, batch=(2,))
    states = torch.func.vmap(tx.init)(batched)
    updates, states = torch.func.vmap(update)(draw(1, batch=(2,)), states, batched)
    one, _ = update(tree.map(lambda leaf: leaf[1], draw(1, batch=(2,))), state, tree.map(lambda leaf: leaf[1], batched))
    assert_close(tree.map(lambda leaf: leaf[1], updates), one)
    assert set(updates) == set(SHAPES)


def test_accumulation_keeps_gradients_of_earlier_steps():
    tx = optim.every_k(optim.sgd(1.0), 2)
    params = {"always": torch.tensor(0.0), "once": torch.tensor(0.0)}
    state = tx.init(params)
    for grads, used in (({"always": 1.0, "once": 4.0}, True), ({"always": 1.0, "once": 0.0}, False)):
        grads = tree.map(torch.tensor, grads)
        updates, state = optim.update_used(tx, grads, state, params, {"always": True, "once": used})
    assert {name: float(update) for name, update in updates.items()} == {"always": -1.0, "once": -2.0}


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RMSprop", "Adafactor"])
def test_accumulation_skips_unused_parameters_as_in_torch(kind, double):
    torch.manual_seed(0)
    options = {"momentum": 0.9, "weight_decay": 0.1} if kind == "SGD" else {"weight_decay": 0.1}
    module, make = Routed(), getattr(torch.optim, kind)
    tx = optim.chain(optim.every_k(optim.from_torch(make, lr=0.1, **options), 2))
    state, step = fx.init(module, tx), fx.train_step(routed_loss, tx)
    optimizer = make(module.parameters(), lr=0.1, **options)
    for index, rows in enumerate([3, 2, 2, 2, 2, 3, 3, 3]):
        batch = {"x": torch.randn(rows, 2)}
        (routed_loss(module, batch) / 2).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
        state, _ = step(state, batch)
        for name, value in module.named_parameters():
            if index % 2:
                assert_close(state.params[name], value.detach(), rtol=1e-12, atol=1e-12)


class Routed(torch.nn.Module):
    """A layer that only some batches use."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        self.never = torch.nn.Parameter(torch.tensor([-0.0, 1.0]))

    def forward(self, batch):
        hidden = self.always(batch["x"])
        return self.sometimes(hidden) if batch["x"].shape[0] == 3 else hidden


def routed_loss(model, batch):
    return model(batch).square().mean()


class TestTrainStep:
    @pytest.mark.parametrize("differentiate", ["func", "autograd"])
    def test_routed_model_trains_as_in_torch(self, differentiate, double):
        torch.manual_seed(0)
        module, tx = Routed(), optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(0.1, weight_decay=0.1))
        state = fx.init(module, tx)
        step = fx.train_step(routed_loss, tx, differentiate=differentiate)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
        for index in range(8):
            batch = {"x": torch.randn(3 if index % 3 == 2 else 2, 2)}
            state, _ = step(state, batch)
            optimizer.zero_grad()
            routed_loss(module, batch).backward()
            # torch's clip_grad_norm_ adds 1e-6 to the norm, so the clipping is written out.
            norm = torch.stack([p.grad.square().sum() for p in module.parameters() if p.grad is not None]).sum().sqrt()
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad *= min(1.0, 0.5 / float(norm))
            optimizer.step()
        for name, value in module.named_parameters():
            torch.testing.assert_close(state.params[name], value.detach(), rtol=1e-12, atol=1e-12)
        assert state.opt_state[1][0].count["never"] == 0
        assert state.opt_state[1][0].count["sometimes.bias"] == 2

    def test_traced_step_keeps_unused_parameters(self):
        tx = optim.adamw(0.1, weight_decay=0.1)
        state = fx.init(Routed(), tx)
        step = fx.train_step(routed_loss, tx)
        eager, _ = step(state, {"x": torch.ones(2, 2)})
        structure = tree.structure(state)

        def flat(*leaves):
            return tree.leaves(step(tree.unflatten(structure, leaves), {"x": torch.ones(2, 2)})[0])

        traced = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*tree.leaves(state))
        testing.assert_equal(tree.unflatten(structure, traced(*tree.leaves(state))), eager, "the traced step")

    def test_unused_zero_applies_weight_decay(self):
        tx = optim.adamw(0.1, weight_decay=0.1)
        state = fx.init(Routed(), tx)
        after, _ = fx.train_step(routed_loss, tx, unused="zero")(state, {"x": torch.ones(2, 2)})
        assert float(after.params["never"][1]) == pytest.approx(0.99)
        with pytest.raises(ValueError, match="expected unused to be one of 'keep', 'zero', got 'skip'"):
            fx.train_step(routed_loss, tx, unused="skip")


class TestHandWritten:
    def test_dict_state_is_split_by_parameter(self):
        def init(params):
            return {"m": {name: torch.zeros_like(value) for name, value in params.items()}}

        def update(updates, state, params=None):
            m = {name: 0.9 * state["m"][name] + grad for name, grad in updates.items()}
            return {name: -0.1 * (m[name] + params[name]) for name in m}, {"m": m}

        tx = optim.GradientTransformation(init, update)
        params = {"busy": torch.ones(2), "idle": torch.ones(2)}
        updates, state = optim.update_used(tx, params, tx.init(params), params, {"busy": True, "idle": False})
        assert updates["idle"].tolist() == [0, 0]
        assert state["m"]["idle"].tolist() == [0, 0]
        assert state["m"]["busy"].tolist() == [1, 1]

    def test_init_may_read_parameter_values(self):
        def init(params):
            return {"size": torch.tensor(sum(leaf.sum().item() for leaf in tree.leaves(params)))}

        tx = optim.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
        params = {"busy": torch.ones(2), "idle": torch.ones(2)}
        _, state = optim.update_used(tx, params, tx.init(params), params, {"busy": True, "idle": False})
        assert float(state["size"]) == 4.0

    @pytest.mark.parametrize(
        "init",
        [
            lambda params: [torch.zeros_like(leaf) for leaf in tree.leaves(params)],
            lambda params: dict(enumerate(map(torch.zeros_like, tree.leaves(params)))),
            lambda params: {"all": torch.zeros(sum(leaf.numel() for leaf in tree.leaves(params)))},
        ],
    )
    def test_state_without_parameter_structure_is_rejected(self, init):
        tx = optim.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
        params = {"busy": torch.ones(2), "idle": torch.ones(2)}
        with pytest.raises(ValueError, match="expected optimizer state that has the structure of the parameters"):
            optim.update_used(tx, params, tx.init(params), params, {"busy": True, "idle": False})


@pytest.mark.parametrize(
    ("used", "message"),
    [
        ({"a": True}, r"expected used to be a tree like grads, got \['b'\] missing in used"),
        (
            {"a": True, "b": torch.tensor(True)},
            r"expected True or False at used\['b'\], got a bool tensor of shape \[\]",
        ),
    ],
)
def test_mismatched_used_tree_is_rejected(used, message):
    params = {"a": torch.ones(1), "b": torch.ones(1)}
    tx = optim.adam(0.1)
    with pytest.raises(ValueError, match=message):
        optim.update_used(tx, params, tx.init(params), params, used)


def test_apply_gradients_keeps_unused_parameters_bitwise():
    tx = optim.adamw(0.1, weight_decay=0.1)
    state = fx.init({"busy": torch.ones(2), "idle": torch.tensor([-0.0, 1.0])}, tx)
    grads = {"busy": torch.ones(2), "idle": torch.zeros(2)}
    after, updates = fx.step.apply_gradients(state, grads, tx, used={"busy": True, "idle": False})
    assert after.params["idle"] is state.params["idle"]
    assert not updates["idle"].any()
    assert not torch.equal(after.params["busy"], state.params["busy"])
    testing.assert_equal(after.opt_state[0].mu["idle"], state.opt_state[0].mu["idle"], "momenta")


def test_counts_are_indexed_by_dotted_path():
    count = optim.start_counts({"a": torch.ones(1), "b": {"c": torch.ones(1)}})
    assert int((count + 1)["b.c"]) == 1
    with pytest.raises(KeyError, match=r"expected a parameter among a, b\.c, got 'd'\."):
        count["d"]
