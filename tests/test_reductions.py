"""Compiled steps have the same bits whether activations are kept or recomputed."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxtrain as fx
from fxtrain import testing
from fxtrain.compiler.passes._recompute import is_backward, recompute
from fxtrain.compiler.passes._reductions import keep_softmax, reduce_from_memory
from fxtrain.core._graph_marks import marking_pass


class Attention(nn.Module):
    """Attention that is written out, as Inductor recognizes it."""

    def __init__(self, scale):
        super().__init__()
        self.scale, self.norm, self.project, self.out = scale, nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        query, key, value = self.project(self.norm(x)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        scores = self.scale(query @ key.transpose(2, 3))
        return x + self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


class Mixer(nn.Module):
    """Mixes positions and then features, each in the last dimension."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(16) for _ in range(2)])
        self.mixers = nn.ModuleList(
            [nn.Sequential(nn.Linear(n, 2 * n), nn.GELU(), nn.Linear(2 * n, n)) for n in (9, 16)]
        )

    def forward(self, x):
        x = x + self.mixers[0](self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.mixers[1](self.norms[1](x))


class Patches(nn.Module):
    """Embeds the patches of images, whose features are strided in memory from then on."""

    def __init__(self):
        super().__init__()
        self.convolution, self.positions = nn.Conv2d(3, 16, 3, 3), nn.Parameter(torch.zeros(9, 16))

    def forward(self, images):
        return self.convolution(images).flatten(2).transpose(1, 2) + self.positions


class Residual(nn.Module):
    """A residual block of convolutions over images whose sizes are no multiples of a vector."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(x + self.norm(self.convolution(x)))


class Channels(nn.Module):
    """Normalizes and mixes the channels of images, as ConvNeXt does."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.LayerNorm(16)
        self.mixer, self.scale = (
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)),
            nn.Parameter(torch.ones(16)),
        )

    def forward(self, x):
        features = self.norm(self.convolution(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.mixer(features)).permute(0, 3, 1, 2)


def encoder(is_norm_first):
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=is_norm_first)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


def three(make, *args):
    return nn.Sequential(*(make(*args) for _ in range(3)))


NETWORKS = {
    "encoder, norms first": (lambda: encoder(True), (2, 7, 16)),
    "encoder, norms last": (lambda: encoder(False), (2, 7, 16)),
    "scores multiplied": (lambda: three(Attention, lambda scores: scores * 8**-0.5), (2, 9, 16)),
    "scores divided": (lambda: three(Attention, lambda scores: scores / math.sqrt(8)), (2, 9, 16)),
    "mixer": (lambda: three(Mixer), (2, 9, 16)),
    "patches": (lambda: nn.Sequential(Patches(), three(Attention, lambda scores: scores * 8**-0.5)), (2, 3, 9, 9)),
    "convolutions": (lambda: three(Residual), (2, 4, 9, 9)),
    "channels": (lambda: three(Channels), (2, 16, 9, 9)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_loops_have_the_same_bits_with_and_without_recomputation(name):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    network, x, tx, ends = make(), torch.randn(shape), fx.optim.sgd(1.0), []
    for memory in ("save", "recompute"):
        step = fx.compile(fx.train_step(lambda model, batch: model(batch).square().mean(), tx), memory=memory)
        ends.append(step(fx.init(network, tx), x)[0])
    testing.assert_equal(*((end.params, end.buffers) for end in ends), "parameters and buffers")


def operators(function, *given, change):
    """Returns the operators of fxtrain in a graph after a pass, and their arguments."""
    graph = change(make_fx(function, tracing_mode="fake")(*given).graph)
    nodes = [node for node in graph.nodes if str(node.target).startswith("fxtrain")]
    return [(str(node.target).split(".")[1], node.args[0].target, *node.args[1:]) for node in nodes]


def test_sum_of_what_matmuls_read_is_taken_from_memory():
    def gradients(slope, weight):
        both = slope * 2
        return both.sum(0), both @ weight, (slope * 3).sum(0), (slope * 4) @ weight, slope.sum(0), slope @ weight

    (only,) = operators(gradients, torch.ones(3, 4), torch.ones(4, 5), change=reduce_from_memory)
    assert only == ("once", torch.ops.aten.mul.Tensor)


def test_reductions_of_permuted_elements_are_taken_from_memory_of_one_layout():
    def normalized(x, y):
        mixed = x + y.transpose(0, 1)
        return F.layer_norm(mixed, (4,)), (y.transpose(0, 1) * 2).sum(0), F.layer_norm(x + 1, (4,)), y.t().sum(0)

    found = operators(normalized, torch.ones(3, 4), torch.ones(4, 3), change=reduce_from_memory)
    assert found == [
        ("laid_out", torch.ops.aten.add.Tensor, (4, 1)),
        ("laid_out", torch.ops.aten.mul.Tensor, (1, 3)),
    ]


def test_overwritten_values_are_not_read_through_memory():
    def overwritten(x, y):
        scores = x * 2 + y.t()
        largest = scores.amax(0)
        scores.add_(1)
        return scores.softmax(0), largest

    for change in (reduce_from_memory, keep_softmax):
        assert not operators(overwritten, torch.ones(3, 4), torch.ones(4, 3), change=change)


def test_all_that_reads_scores_reads_what_is_not_recognized():
    def attention(x, y):
        scores = x @ y / 2
        return scores.softmax(-1), scores.sum(), (x * 2).amax(0), x.softmax(0)

    graph = keep_softmax(make_fx(attention)(torch.ones(3, 4), torch.ones(4, 3)).graph)
    kept = [node for node in graph.nodes if node.target == torch.ops.fxtrain.unrecognized.default]
    assert [node.args[0].target for node in kept] == [torch.ops.aten.div.Tensor, torch.ops.aten.mul.Tensor]


@pytest.mark.parametrize("name", ["native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"])
def test_recomputed_batch_norm_leaves_its_statistics_unchanged(name):
    normalize = getattr(torch.ops.aten, name)

    def step(x, weight, mean, variance):
        with marking_pass("loss", is_backward=False):
            normalized = normalize(x, weight, weight, mean, variance, True, 0.1, 1e-5)[0]
            loss = normalized.sin().sum()
        with marking_pass("loss", is_backward=True):
            return loss, normalized.cos()

    graph = make_fx(step, tracing_mode="fake")(torch.ones(4, 3), *torch.ones(3, 3)).graph
    recompute(graph, [node for node in graph.nodes if node.op == "call_function" and not is_backward(node)])
    once, again = graph.find_nodes(op="call_function", target=normalize.default)
    assert None not in once.args
    assert again.args[3:5] == (None, None)
