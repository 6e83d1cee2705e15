"""Ways to recompute a function, and networks whose parts are recomputed in one of these ways."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import fxtrain as fx

# Ways to recompute a function. Each takes the function, its arguments, and options of ``checkpoint``.


def plain(function, *args, **kwargs):
    return function(*args, **kwargs)


def without_reentry(function, *args, **kwargs):
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


def reentrant(function, *args, **kwargs):
    return checkpoint(function, *args, use_reentrant=True, **kwargs)


def nested(function, *args, **kwargs):
    return without_reentry(lambda *inner: without_reentry(function, *inner, **kwargs), *args)


def mixed(function, *args):
    return reentrant(lambda *inner: without_reentry(reentrant, function, *inner), *args)


def selective(function, *args, **kwargs):
    operators = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    return without_reentry(
        function, *args, context_fn=lambda: create_selective_checkpoint_contexts(operators), **kwargs
    )


def by_policy(function, *args):
    def policy(context, operator, *args, **kwargs):
        return (
            CheckpointPolicy.MUST_SAVE if operator == torch.ops.aten.gelu.default else CheckpointPolicy.MUST_RECOMPUTE
        )

    return without_reentry(function, *args, context_fn=functools.partial(create_selective_checkpoint_contexts, policy))


def marked(function, *args, **kwargs):
    return fx.remat(function)(*args, **kwargs)


def marked_but_matmuls(function, *args, **kwargs):
    return fx.remat(function, "matmuls")(*args, **kwargs)


def without_generator_state(function, *args):
    return without_reentry(function, *args, preserve_rng_state=False)


def reentrant_without_generator_state(function, *args):
    return reentrant(function, *args, preserve_rng_state=False)


def with_other_options(function, *args):
    return without_reentry(function, *args, early_stop=False, determinism_check="none", debug=True)


def without_early_stop(function, *args):
    with set_checkpoint_early_stop(False):
        return without_reentry(function, *args)


def after_an_error(function, *args):
    def fails(*args):
        raise KeyError

    with pytest.raises(KeyError):
        without_reentry(fails, *args)
    return without_reentry(function, *args)


HOWS = [
    *(without_reentry, reentrant, nested, mixed, selective, by_policy, marked, marked_but_matmuls),
    *(without_generator_state, reentrant_without_generator_state, with_other_options, without_early_stop),
    after_an_error,
]
IN_GRAPH = without_reentry, mixed, by_policy


class Block(nn.Module):
    """A residual block with dropout."""

    def __init__(self, how=plain, *, width=8, dropout=0.3):
        super().__init__()
        self.how, self.up, self.down = how, nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def inner(self, x, scale=1.0, signs=None):
        return self.down(self.dropout(F.gelu(self.up(x)))) * scale

    def forward(self, x):
        return x + self.how(self.inner, x)


class Attention(nn.Module):
    """Residual blocks of attention."""

    def __init__(self, *, layers):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(layers))
        self.inputs = nn.ModuleList(nn.Linear(16, 48) for _ in range(layers))
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        for norm, inputs in zip(self.norms, self.inputs, strict=True):
            heads = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in inputs(norm(x)).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(x)


class Arguments(Block):
    """A region with keyword arguments, results that are no tensors, and its input among the results."""

    def region(self, x, /, others, scale):
        y = self.inner(x, scale)
        return y, {"same": x, "tanh": y.tanh(), "number": others["number"]}, None

    def forward(self, x):
        y, others, nothing = self.how(self.region, x, others={"number": 2}, scale=x.mean())
        assert nothing is None
        return others["same"] + y + others["tanh"] * others["number"]


class Writes(Block):
    """A region that reads and writes a buffer, normalizes by batch statistics, and writes in place."""

    average: torch.Tensor

    def __init__(self, how=plain):
        super().__init__(how, dropout=0.0)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("average", torch.ones(8))

    def region(self, x):
        y = self.inner(self.norm(x) * self.average.clone())
        self.average.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        y += 1
        return y

    def forward(self, x):
        return x + self.how(self.region, x)


class Captures(Block):
    """A region that reads an activation of outside, samples, has parts without gradients and in bfloat16."""

    def forward(self, x):
        outside = x.tanh()

        def region(x):
            with torch.no_grad():
                gate = self.inner(x).sigmoid()
            with torch.autocast("cpu", torch.bfloat16):
                y = self.inner(x).float()
            return y * gate * outside + 0.1 * torch.randn_like(x)

        return x + self.how(region, x)


class Penalty(Block):
    """A region in a function that is differentiated twice."""

    def forward(self, x):
        return x + torch.autograd.grad(self.how(self.inner, x).square().sum(), x, create_graph=True)[0]


class Sequence(nn.Module):
    """A sequence in segments, each of which is a region."""

    def __init__(self, how, use_reentrant):
        super().__init__()
        layers = nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)
        self.layers, self.how, self.use_reentrant = nn.Sequential(*layers), how, use_reentrant

    def forward(self, x):
        if self.how is plain:
            return self.layers(x)
        return checkpoint_sequential(self.layers, 2, x, use_reentrant=self.use_reentrant)


def network(hows, is_recomputed):
    """Returns a network with each of these ways, and all kinds of regions, or the same without recomputation."""

    def way(how):
        return how if is_recomputed else plain

    kinds = zip((Writes, Captures), hows, strict=False)
    return nn.Sequential(
        *(Block(way(how)) for how in hows),
        *(kind(way(how)) for kind, how in kinds),
        *(Arguments(way(how), dropout=0.0) for how in (nested, selective, marked)[: len(hows) - 2]),
        Penalty(way(without_reentry), dropout=0.0),
        Sequence(way(None), use_reentrant=len(hows) % 2 > 0),
        nn.Linear(8, 1),
    )
