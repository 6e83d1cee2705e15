"""Graph passes on random programs: each alone and all together, against the untouched graph."""

import importlib
import random

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from fxtrain import rng
from fxtrain.compiler.passes import _matmuls as matmuls
from fxtrain.compiler.passes._concatenation import replace_trivial_concatenations
from fxtrain.compiler.passes._dropout import merge_dropout_masks
from fxtrain.compiler.passes._reductions import keep_softmax, reduce_from_memory
from fxtrain.compiler.passes._scalars import hoist_scalars, make_bias_corrections_exact

trace = importlib.import_module("fxtrain.compiler.lowering._trace")

pytestmark = pytest.mark.slow

PROGRAMS = 200
OPERATIONS = 12
ROWS, COLUMNS = 4, 12  # large enough for the passes to see vectors in them

PASSES = {
    "dropout": merge_dropout_masks,
    "bias corrections": make_bias_corrections_exact,
    "concatenations": replace_trivial_concatenations,
    "scalars": hoist_scalars,
    "softmax": keep_softmax,
    "reductions": reduce_from_memory,
    "matmuls": matmuls.speed_up_matmuls,
}
EXACT = ("dropout", "bias corrections", "concatenations", "scalars", "softmax", "reductions")
"""Passes that promise the same bits. A matmul with a separate bias rounds differently."""


class Program:
    """A random function of a state and a batch. It writes in place, takes views, and computes values it never uses.

    Args:
        seed: Decides the operations, so that each call runs the same program.
    """

    def __init__(self, seed):
        self.seed = seed

    def inputs(self):
        generator = torch.Generator().manual_seed(self.seed)
        floats = [
            torch.randn(ROWS, COLUMNS, generator=generator, dtype=dtype) for dtype in (torch.float32, torch.float64)
        ]
        return [
            *floats,
            torch.randn(COLUMNS, generator=generator),
            torch.tensor(0.3),
            torch.tensor(0.7, dtype=torch.float64),
            torch.randint(1, 9, (5,), generator=generator),
            torch.randint(0, 9, (ROWS, COLUMNS), generator=generator),
            torch.tensor(5),  # the seed of the random samples
            torch.tensor(3),  # their step
        ]

    def __call__(self, *inputs):
        choose = random.Random(self.seed)
        *values, seed, step = inputs
        values, written = list(values), []
        # Random samples are most of the time to trace a program, so every third program has them.
        names = sorted(OPERATIONS_BY_NAME.keys() - (SAMPLING if self.seed % 3 else set()))
        with rng.functional(rng.key(seed, step=step)):
            for _ in range(OPERATIONS):
                name = choose.choice(names)
                made = OPERATIONS_BY_NAME[name](choose, values)
                if made is None:  # no value fits the operation
                    continue
                (written if name in IN_PLACE else values).append(made)
        kept = [value for value in values[7:] if choose.random() < 0.6] or values[-1:]
        state = choose.sample(range(3), choose.randint(0, 2))
        changed = [(inputs[index], self._like(inputs[index], kept, choose)) for index in state]
        # The outputs of a step are copied if they share memory with an input, and the state is written last.
        outputs = trace.copy_aliases(kept, inputs)
        for old, new in changed:
            old.copy_(new)
        return outputs

    @staticmethod
    def _like(old, kept, choose):
        alike = [value for value in kept if value.shape == old.shape and value.dtype == old.dtype]
        return (choose.choice(alike) if alike else old * 0.5).clone()


def pick(choose, values, fits):
    found = [value for value in values if fits(value)]
    return choose.choice(found) if found else None


def is_float(value):
    return value.is_floating_point()


def is_matrix(value):
    return value.is_floating_point() and value.ndim == 2


def pointwise(choose, values):
    x = pick(choose, values, is_float)
    return choose.choice([torch.exp, torch.tanh, torch.sigmoid, torch.sin, torch.relu, torch.neg])(x.clamp(-3, 3))


def binary(choose, values):
    x = pick(choose, values, is_float)
    y = pick(choose, values, lambda y: y.dtype == x.dtype and y.shape in ((), x.shape, x.shape[-1:]))
    return None if y is None else choose.choice([torch.add, torch.mul, torch.sub, torch.maximum])(x, y)


def scale_by_scalar(choose, values):
    """A scheduled rate: expensive scalars that each element reads."""
    x, scalar = pick(choose, values, is_matrix), pick(choose, values, lambda value: is_float(value) and not value.ndim)
    rate = choose.choice([torch.exp, torch.cos, lambda s: s**3, lambda s: -torch.expm1(s)])(scalar.clamp(-2, 2))
    return x * rate.to(x.dtype)


def correct_bias(choose, values):
    """Bias corrections of several parameters, from their counts."""
    counts = pick(choose, values, lambda value: value.dtype == torch.int64 and value.ndim == 1)
    x = pick(choose, values, is_matrix)
    corrections = -torch.expm1(counts.to(x.dtype) * -0.1)
    return x / corrections[choose.randrange(len(counts))]


def view(choose, values):
    x = pick(choose, values, lambda value: value.ndim == 2 and len(value) > 1)
    return choose.choice([lambda: x.t(), lambda: x[1:], lambda: x[:, ::2], lambda: x[0], lambda: x.unsqueeze(0)[0]])()


def write_view(choose, values):
    """Writes through a view of an intermediate value, whose other readers see it."""
    x = pick(choose, values[7:], lambda value: is_matrix(value) and len(value) > 1)
    if x is None or x._is_view():
        return None
    part = choose.choice([x[0], x[:, 1], x.t()[0]])
    return part.mul_(0.5) if choose.random() < 0.5 else part.add_(1.0)


def write_scalar(choose, values):
    scalar = pick(choose, values[7:], lambda value: is_float(value) and not value.ndim)
    return None if scalar is None else scalar.mul_(2.0)


def reduce(choose, values):
    return choose.choice([torch.sum, torch.mean, torch.amax])(pick(choose, values, is_float))


def matmul(choose, values):
    x = pick(choose, values, is_matrix)
    y = pick(choose, values, lambda y: is_matrix(y) and y.dtype == x.dtype and y.shape[1] == x.shape[1])
    return x @ y.t() / COLUMNS


def linear(choose, values):
    x = pick(choose, values, is_matrix)
    return F.linear(x, x / COLUMNS, x.mean(1))


def drop(choose, values):
    return F.dropout(pick(choose, values, is_matrix), choose.choice([0.1, 0.5]))


def sample(choose, values):
    x = pick(choose, values, is_matrix)
    return x + torch.rand_like(x)


def concatenate(choose, values):
    x = pick(choose, values, is_matrix)
    empty = x.new_empty((0, x.shape[1]))
    return torch.cat(choose.choice([[empty, x], [x, empty], [x, x], [empty, x.t().contiguous().t()]]))


def cast(choose, values):
    return pick(choose, values, is_float).to(choose.choice([torch.float32, torch.float64, torch.bfloat16])).float()


def count(choose, values):
    x = pick(choose, values, lambda value: value.dtype == torch.int64)
    return choose.choice([lambda: x + 1, lambda: x ^ 3, lambda: (x > 2).to(torch.int64)])()


def fill(choose, values):
    return torch.full((5,), choose.randrange(2))


def write_count(choose, values):
    x = pick(choose, values[7:], lambda value: value.dtype == torch.int64 and not value._is_view())
    return None if x is None else x.add_(1)


OPERATIONS_BY_NAME = {
    function.__name__: function
    for function in (
        *(pointwise, binary, scale_by_scalar, correct_bias, view, write_view, write_scalar, reduce, matmul, linear),
        *(drop, sample, concatenate, cast, count, fill, write_count),
    )
}
IN_PLACE = ("write_view", "write_scalar", "write_count")
SAMPLING = {"drop", "sample"}


def run(graph, inputs):
    """Returns the outputs of a graph and its inputs afterwards."""
    copies = [value.clone() for value in inputs]
    return [*graph(*copies), *copies]


def optimized(traced, names):
    """Returns a copy of a traced graph after these passes, and whether they changed it."""
    made = torch.fx.GraphModule(traced, torch.fx.Graph())
    made.graph.graph_copy(traced.graph, mapping := {})
    [output] = traced.graph.find_nodes(op="output")
    made.graph.output(torch.fx.map_arg(output.args[0], mapping.__getitem__))
    before = contents(made.graph)
    for name in names:
        PASSES[name](made.graph)
    if contents(made.graph) == before:
        return traced, False
    made.graph.lint()
    made.recompile()
    return made, True


def contents(graph):
    return [(node, node.target, node.args, node.kwargs) for node in graph.nodes]


def assert_same(got, expected, what, *, exact):
    for value, other in zip(got, expected, strict=True):
        wide = value.dtype == torch.float64
        tolerance = (0, 0) if exact or not value.is_floating_point() else (1e-10, 1e-10) if wide else (1e-4, 1e-4)
        torch.testing.assert_close(
            value, other, rtol=tolerance[0], atol=tolerance[1], equal_nan=True, msg=lambda text: f"{what}: {text}"
        )


@pytest.fixture(scope="module")
def graphs():
    """The untouched graphs of all programs, with their inputs and results."""
    found = []
    for seed in range(PROGRAMS):
        program = Program(seed)
        inputs = program.inputs()
        traced = make_fx(program, tracing_mode="fake")(*inputs)
        found.append((traced, inputs, run(traced, inputs)))
    return found


@pytest.mark.parametrize("name", PASSES)
def test_pass_alone_keeps_values(graphs, name):
    changed = 0
    for seed, (traced, inputs, expected) in enumerate(graphs):
        made, is_changed = optimized(traced, [name])
        changed += is_changed
        if is_changed:
            assert_same(run(made, inputs), expected, f"program {seed}", exact=name in EXACT)
    assert changed >= 10  # the programs reach the pass


@pytest.mark.parametrize("names", [EXACT, tuple(PASSES)], ids=["exact", "all"])
def test_all_passes_together_keep_values(graphs, names):
    changed = 0
    for seed, (traced, inputs, expected) in enumerate(graphs):
        made, is_changed = optimized(traced, names)
        changed += is_changed
        if is_changed:
            assert_same(run(made, inputs), expected, f"program {seed}", exact=names == EXACT)
    assert changed >= 100


def test_large_matmuls_by_onednn_keep_values(graphs, monkeypatch):
    monkeypatch.setattr(matmuls, "_pays", lambda: torch.backends.mkldnn.is_available())
    monkeypatch.setattr(matmuls, "_MIN_ONEDNN_FLOPS", 1)
    for seed, (traced, inputs, expected) in enumerate(graphs[:100]):
        made, _ = optimized(traced, tuple(PASSES))
        assert_same(run(made, inputs), expected, f"program {seed}", exact=False)


def test_untouched_graph_equals_the_program(graphs):
    for seed, (_, inputs, expected) in enumerate(graphs[:100]):
        copies = [value.clone() for value in inputs]
        outputs = Program(seed)(*copies)
        assert_same([*outputs, *copies], expected, f"program {seed}", exact=True)
