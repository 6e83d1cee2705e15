"""Laws of every gradient transformation: purity, preserved structure and dtypes, vmap, one graph, devices."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fxtrain import optim, schedules, tree

SCHEDULE = schedules.warmup_cosine_decay(0.0, 0.1, warmup_steps=2, decay_steps=20)

FACTORIES = {
    "adadelta": lambda: optim.adadelta(1.0, weight_decay=0.1),
    "adafactor": lambda: optim.adafactor(0.01, min_dim_size_to_factor=2, momentum=0.9, weight_decay_rate=1e-3),
    "adagrad": lambda: optim.adagrad(0.1),
    "adam": lambda: optim.adam(0.01),
    "adamax": lambda: optim.adamax(0.01),
    "adamw": lambda: optim.adamw(SCHEDULE, weight_decay=0.1, mask=lambda path, leaf: leaf.ndim > 1),
    "amsgrad": lambda: optim.adam(0.01, amsgrad=True),
    "apply_if_finite": lambda: optim.apply_if_finite(optim.adam(0.01), max_consecutive=3),
    "asgd": lambda: optim.from_torch(torch.optim.ASGD),
    "chain": lambda: optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(SCHEDULE)),
    "clipping": lambda: optim.chain(optim.clip_by_value(0.5), optim.clip_by_block_rms(0.2), optim.identity()),
    "every k": lambda: optim.every_k(optim.adam(0.01), lambda count: 1 + count // 2),
    "injected": lambda: optim.inject_hyperparams(optim.adamw)(learning_rate=0.1, b1=0.8, weight_decay=SCHEDULE),
    "injected, torch": lambda: optim.inject_hyperparams(optim.from_torch)(torch.optim.NAdam, lr=0.1, weight_decay=0.1),
    "lamb": lambda: optim.lamb(0.01, weight_decay=0.1),
    "lion": lambda: optim.lion(0.01),
    "lookahead": lambda: optim.lookahead(optim.adam(0.01), period=2),
    "masked": lambda: optim.masked(optim.sgd(0.1, momentum=0.9), lambda path, leaf: "weight" in path),
    "muon": lambda: optim.muon(0.02, weight_decay=0.1),
    "nadam": lambda: optim.nadam(0.01),
    "nadam, scheduled": lambda: optim.nadam(0.01, momentum_decay=0.1),
    "partition": lambda: optim.partition(
        {"slow": optim.sgd(0.1), "fast": optim.adam(0.1), "none": optim.set_to_zero()},
        lambda path, leaf: {0: "none", 1: "slow"}.get(leaf.ndim, "fast"),
    ),
    "radam": lambda: optim.radam(0.01),
    "rmsprop": lambda: optim.rmsprop(0.01, momentum=0.9, bias_correction=True),
    "rmsprop, centred": lambda: optim.rmsprop(0.01, centered=True),
    "rprop": lambda: optim.rprop(0.01),
    "sgd": lambda: optim.sgd(0.1, momentum=0.9, nesterov=True),
    "sgd, dampened": lambda: optim.sgd(0.1, momentum=0.9, dampening=0.5),
    "unfrozen": lambda: optim.unfreeze(optim.adam(0.01), {"layer.*": 2, "scale": (0, 2), "*": None}),
    "torch adafactor": lambda: optim.from_torch(torch.optim.Adafactor, weight_decay=0.1),
    "torch adagrad": lambda: optim.from_torch(torch.optim.Adagrad, lr_decay=0.1),
    "torch muon": lambda: optim.masked(optim.from_torch(torch.optim.Muon), lambda path, leaf: leaf.ndim == 2),
    "torch radam": lambda: optim.from_torch(torch.optim.RAdam, maximize=True),
}
SHAPES = {"layer.bias": (3,), "layer.weight": (3, 4), "scale": (), "stack": {"conv.weight": (2, 3, 2)}}


def draw(seed, dtype=torch.float32, batch=()):
    generator = torch.Generator().manual_seed(seed)

    def normal(shape):
        return torch.randn((*batch, *shape), generator=generator).to(dtype)

    return {
        name: {inner: normal(s) for inner, s in shape.items()} if isinstance(shape, dict) else normal(shape)
        for name, shape in SHAPES.items()
    }


def run(tx, params, steps=4, update=None, grads=draw):
    state = tx.init(params)
    for step in range(1, steps + 1):
        updates, state = (update or tx.update)(grads(step), state, params)
        params = optim.apply_updates(params, updates)
    return params, state


def layout(values):
    return tree.structure(values), [(leaf.shape, leaf.dtype, leaf.device) for leaf in tree.leaves(values)]


def assert_close(ours, theirs, **tolerance):
    assert tree.structure(ours) == tree.structure(theirs)
    for path, a, b in zip(tree.paths(ours), tree.leaves(ours), tree.leaves(theirs), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, p=path: f"{p}: {m}", **tolerance)


@pytest.fixture(params=FACTORIES)
def tx(request):
    return FACTORIES[request.param]()


def test_update_is_pure(tx):
    params, grads = draw(0), draw(1)
    state = tx.init(params)
    before = tree.clone((params, grads, state))
    first = tx.update(grads, state, params)
    second = tx.update(grads, state, params)
    assert_close((params, grads, state), before, rtol=0, atol=0)
    assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_structure_shapes_and_dtypes_are_preserved(tx, dtype):
    params = draw(0, dtype)
    state = tx.init(params)
    updates, new = tx.update(draw(1, dtype), state, params)
    assert layout(updates) == layout(params)
    assert layout(new) == layout(state)
    assert layout(optim.apply_updates(params, updates)) == layout(params)
    assert all(leaf.isfinite().all() for leaf in tree.leaves((updates, new)))


def test_half_precision_stays_near_exact_trajectory(tx):
    exact, _ = run(tx, draw(0, torch.float64), grads=lambda seed: draw(seed, torch.bfloat16))
    half, _ = run(tx, draw(0, torch.bfloat16), grads=lambda seed: draw(seed, torch.bfloat16))
    # Parameter and update are rounded in each of four steps, by up to 2^-8 relative to parameters of up to 3.
    assert_close(tree.map(lambda leaf: leaf.double(), half), exact, rtol=0.02, atol=0.06)


def test_optimizer_state_is_tensors_without_shared_storage(tx):
    params = draw(0)
    leaves = [*tree.leaves(params), *tree.leaves(tx.init(params))]
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    assert len({leaf.untyped_storage().data_ptr() for leaf in leaves}) == len(leaves)


def test_vmapped_optimizers_match_single_ones(tx, request):
    params, states = draw(0, batch=(3,)), []
    batched, batched_state = params, torch.func.vmap(tx.init)(params)
    for step in range(1, 4):
        updates, batched_state = torch.func.vmap(tx.update)(draw(step, batch=(3,)), batched_state, batched)
        batched = torch.func.vmap(optim.apply_updates)(batched, updates)
    for member in range(3):

        def pick(values, member=member):
            return tree.map(lambda leaf: leaf[member].clone(), values)

        states.append(run(tx, pick(params), 3, grads=lambda seed: pick(draw(seed, batch=(3,)))))
    # Batched bfloat16 matmuls round differently. A step of torch's Muon is 1e-3.
    tolerance = {"rtol": 0, "atol": 5e-4} if "torch muon" in request.node.name else {}
    assert_close((batched, batched_state), tree.map(lambda *leaves: torch.stack(leaves), *states), **tolerance)


def test_update_compiles_to_one_graph_for_all_steps(tx):
    def few(seed):  # one leaf of each number of dimensions that a transformation distinguishes
        return {name: leaf for name, leaf in draw(seed).items() if name != "stack"}

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(tx.update, fullgraph=True, backend=counter)
    assert_close(run(tx, few(0), update=compiled, grads=few), run(tx, few(0), grads=few))
    assert counter.frame_count == 1
    start = torch.compile(tx.init, fullgraph=True, backend="eager")
    assert_close(start(few(0)), tx.init(few(0)))


def test_empty_trees_and_empty_tensors_are_accepted(tx):
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == {}
    assert layout(state) == layout(tx.init({}))
    params = {"layer.bias": torch.zeros(0), "layer.weight": torch.zeros(0, 4), "scale": torch.tensor(1.0)}
    updates, state = tx.update(params, tx.init(params), params)
    assert layout(updates) == layout(params)
    assert layout(state) == layout(tx.init(params))
    assert all(leaf.isfinite().all() for leaf in tree.leaves((updates, state)))


def test_updates_and_state_are_on_the_parameters_device(tx):
    params = tree.map(lambda leaf: leaf.to("meta"), draw(0))
    updates, state = tx.update(params, tx.init(params), params)
    assert {leaf.device for leaf in tree.leaves((updates, state, tx.init(params)))} == {torch.device("meta")}


def test_frozen_parameters_may_be_none_and_batched(tx):
    # None is a leaf to torch's pytrees and vmap, so it must not occur in the optimizer state.
    params = {**draw(0, batch=(2,)), "layer.weight": None}
    state = torch.func.vmap(lambda stack: tx.init({"layer.weight": None, "stack": stack}))(params["stack"])

    def update(stack, state):
        frozen = {"layer.weight": None, "stack": stack}
        updates, state = tx.update(frozen, state, frozen)
        return updates["stack"], state

    assert layout(torch.func.vmap(update)(params["stack"], state)) == layout((params["stack"], state))


def test_inductor_compiled_chain_matches_eager():
    torch._dynamo.reset()
    tx = optim.chain(
        optim.clip_by_global_norm(1.0),
        optim.apply_if_finite(
            optim.inject_hyperparams(optim.adamw)(learning_rate=SCHEDULE, weight_decay=0.1), max_consecutive=2
        ),
    )
    compiled = torch.compile(tx.update, fullgraph=True)
    assert_close(run(tx, draw(0), update=compiled), run(tx, draw(0)))


def test_compiled_vmap_matches_eager_vmap():
    torch._dynamo.reset()
    tx = FACTORIES["muon"]()
    params = draw(0, batch=(3,))
    state = torch.func.vmap(tx.init)(params)

    def update(grads, state, params):
        return torch.func.vmap(tx.update)(grads, state, params)

    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    grads = draw(1, batch=(3,))
    assert_close(compiled(grads, state, params), update(grads, state, params))


def test_gradients_flow_through_update():
    # Differentiates by the learning rate, as in meta-learning.
    tx = optim.adam(0.1, eps_root=1e-8)
    params = torch.tensor([1.0, -2.0])

    def after(rate):
        updates, _ = optim.adam(rate, eps_root=1e-8).update(2 * params, tx.init(params), params)
        return optim.apply_updates(params, updates).square().sum()

    slope = torch.func.grad(after)(torch.tensor(0.1))
    numeric = (after(torch.tensor(0.101)) - after(torch.tensor(0.099))) / 0.002
    torch.testing.assert_close(slope, numeric, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("name", "leaves"),
    [("sgd", 0), ("adam", 3), ("adamw", 4), ("lion", 1), ("momentum", 1), ("adafactor", 3), ("muon", 6)],
)
def test_optimizer_state_has_no_extra_leaves(name, leaves):
    """Counts the leaves for one matrix (for muon also a vector), because each leaf costs time in every step."""
    made = {
        "sgd": optim.sgd(0.1),
        "adam": optim.adam(0.1),
        "adamw": optim.adamw(SCHEDULE),
        "lion": optim.lion(0.1),
        "momentum": optim.sgd(0.1, momentum=0.9),
        "adafactor": optim.adafactor(0.1, min_dim_size_to_factor=2),
        "muon": optim.muon(0.1),
    }[name]
    params = {"w": torch.ones(4, 4)} | ({"b": torch.ones(4)} if name == "muon" else {})
    expected = 5 if name == "muon" else leaves
    assert len(tree.leaves(made.init(params))) == expected
