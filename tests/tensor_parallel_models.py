"""Models and steps for checks of tensor parallel training."""

import torch
import torch.nn.functional as F
from torch import nn

import fxtrain as fx
from fxtrain import tree
from fxtrain.cli._transformer import Config, Transformer
from tests.sharded_states import batch_of, placement, traced

ROWS, BATCH = 48, 12
GATED_PLAN = {"0.up": "column", "0.gate": "column", "*.out": "row", "2": "column", "4": "row"}
TRANSFORMER_PLAN = {"blocks.*.qkv": "column", "blocks.*.up": "column", "blocks.*.out": "row"}


class Gated(nn.Module):
    """A gated perceptron, whose two column modules have one input."""

    def __init__(self, width):
        super().__init__()
        self.up, self.gate = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width, bias=False)
        self.out = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        return x + self.dropout(self.out(F.silu(self.gate(x)) * self.up(x)))


def network():
    torch.manual_seed(0)
    layers = [Gated(6), nn.LayerNorm(6), nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3), nn.Dropout(0.1)]
    return nn.Sequential(*layers).double()


def loss_fn(model, batch):
    logits = model(batch["x"])
    accuracy = fx.metrics.Accuracy.from_model_output(logits=logits, labels=batch["y"])
    return F.cross_entropy(logits, batch["y"]), {"accuracy": accuracy, "size": logits.square().mean()}


def examples(rows=ROWS, seed=1):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return {
        "x": torch.randn(rows, 6, dtype=torch.float64, generator=generator),
        "y": torch.randint(0, 3, (rows,), generator=generator),
    }


def transformer(**options):
    shape = Config(**{"layers": 1, "width": 16, "heads": 2, "length": 8, "dropout": 0.2, **options})
    with torch.device("cpu"):
        network = Transformer(shape, torch.Generator().manual_seed(0))
    return network.double().to(torch.get_default_device())


def text_loss(model, batch):
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())


def texts(rows=BATCH, seed=1):
    tokens = torch.randint(0, 256, (rows, 9), generator=torch.Generator(torch.get_default_device()).manual_seed(seed))
    return {"x": tokens[:, :-1], "y": tokens[:, 1:]}


def optimizer():
    rate = fx.schedules.warmup_cosine_decay(0.0, 0.02, warmup_steps=5, decay_steps=20)
    return fx.optim.chain(fx.optim.clip_by_global_norm(0.5), fx.optim.adamw(rate))


MODELS = {
    "perceptron": (network, GATED_PLAN, loss_fn, examples),
    "transformer": (transformer, TRANSFORMER_PLAN, text_loss, texts),
}


def callbacks():
    return [fx.callbacks.grad_norms(), fx.callbacks.ema(0.9), fx.callbacks.nan_guard()]


def train(mesh, name, tx, *, steps=20, is_traced=False, is_split=True, compiled=None, dtype=None, **options):
    """Returns the last state and output of a model. Without a mesh, those of one process."""
    make, plan, loss, make_batch = MODELS[name]
    options = {"callbacks": callbacks(), "accumulate": 2, **options}
    step = fx.train_step(loss, tx, mesh=mesh, **options)
    state = step.attached(fx.init(make().to(dtype), tx, seed=3))

    def batch(seed):
        whole = make_batch(BATCH, seed=seed)
        whole["x"] = whole["x"] if dtype is None else whole["x"].to(dtype)
        return whole if mesh is None else batch_of(mesh, whole)

    if mesh is not None and is_split:
        state = fx.shard(state, mesh, fx.distributed.tensor_parallel(plan))
        before = placement(state)
        assert any(axis == 1 for axis in before)
    if is_traced:
        step = traced(step, state, batch(0))
    step = step if compiled is None else compiled(step)
    for seed in range(steps):
        state, output = step(state, batch(seed))
    if mesh is not None and is_split:
        assert placement(state) == before
    return state, output


def assert_close(found, expected, tolerance=1e-10):
    found, expected = map(whole, (found, expected))
    for path, one, other in zip(tree.paths(expected), tree.leaves(found), tree.leaves(expected), strict=True):
        assert type(one) is torch.Tensor, path
        limit = max(tolerance, 1e-6) if other.dtype == torch.float32 else tolerance
        torch.testing.assert_close(one, other, rtol=0, atol=limit, msg=lambda text, path=path: f"{path}: {text}")


def whole(value):
    return fx.distributed.gathered(value) if isinstance(value, fx.TrainState) else value


def assert_as_alone(mesh, name, tx=None, **options):
    tx = optimizer() if tx is None else tx
    alone = {key: value for key, value in options.items() if key not in ("is_traced", "compiled", "is_split")}
    expected, expected_output = train(None, name, tx, **alone)
    state, output = train(mesh, name, tx, **options)
    assert_close(state, expected)
    assert_close(output, expected_output)
    assert_same_bits(mesh, whole(state))
    return state


def assert_same_bits(mesh, value):
    leaves = [leaf.tolist() for leaf in tree.leaves(value)]
    assert all(other == leaves for other in mesh.gather(leaves, "values"))
