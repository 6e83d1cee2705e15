"""Random functions of torch that have no replacement are refused by name."""

import pytest
import torch
from torch import nn

from fxtrain import rng
from fxtrain.rng import _functional as mode
from fxtrain.rng import _torch_functions as replacements

X = torch.ones(3, 4, 8)

REFUSED = {
    "poisson": lambda: torch.poisson(X.abs()),
    "binomial": lambda: torch.binomial(torch.ones(3), torch.ones(3)),
    "_standard_gamma": lambda: torch.distributions.Gamma(torch.ones(3), 1.0).rsample(),
    "_sample_dirichlet": lambda: torch.distributions.Dirichlet(torch.ones(3)).sample(),
    "native_dropout": lambda: torch.native_dropout(X, 0.5, True),
    "rand.default": lambda: torch.ops.aten.rand.default([3]),
    "rand_like.generator": lambda: torch.ops.aten.rand_like.generator(X, generator=None),
    "lstm": lambda: nn.LSTM(8, 3, num_layers=2, dropout=0.5)(X),
    "gru": lambda: nn.GRU(8, 3, num_layers=2, dropout=0.5)(X),
    "rnn_tanh": lambda: nn.RNN(8, 3, num_layers=2, dropout=0.5)(nn.utils.rnn.pack_sequence([X[0], X[1]])),
    "rand without generator= inside": lambda: torch.rand(3, generator=torch.Generator()),
    "normal_ without generator= inside": lambda: torch.empty(3).normal_(generator=torch.Generator()),
    "randn without out= inside": lambda: torch.randn(3, out=torch.empty(3)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_functions_without_replacement_are_refused_by_name(name):
    with rng.functional(rng.key(0)), rng.untouched(), pytest.raises(NotImplementedError, match=name):
        REFUSED[name]()


@pytest.mark.parametrize("name", ["poisson", "_standard_gamma", "rand.default"])
def test_functions_without_replacement_are_refused_while_tracing(name):
    @torch.compile(fullgraph=True, backend="eager")
    def draw(seed):
        with rng.functional(rng.key(seed)):
            return REFUSED[name]()

    with pytest.raises(Exception, match=f"NotImplementedError.*can replace, got {name}"):
        draw(torch.tensor(17))


def test_backward_operators_are_let_through():
    """They repeat the samples of their forward operators, though that of cuDNN's attention is tagged as random.

    A dispatch mode around the step, such as one that counts operations, calls them from Python.
    """
    backward = [name for name in dir(torch.ops.aten) if name.endswith("_backward")]
    assert "_scaled_dot_product_cudnn_attention_backward" in backward
    with rng.functional(rng.key(0)):
        for name in backward:
            packet = getattr(torch.ops.aten, name)
            for overload in packet.overloads():
                with pytest.raises((TypeError, RuntimeError), match="argument"):
                    getattr(packet, overload)()


def test_every_seeded_function_of_torch_is_replaced_or_refused():
    known = {*replacements.REPLACED, *replacements.SOMETIMES, *mode.REFUSED}
    seeded = {
        name
        for name in dir(torch.ops.aten)
        for packet in [getattr(torch.ops.aten, name)]
        if isinstance(packet, torch._ops.OpOverloadPacket)
        for overload in packet.overloads()
        if torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags
    }
    assert len(seeded) > 40
    public = {name for name in seeded if any(hasattr(home, name) for home in (torch, torch.Tensor, torch._C._nn))}
    # Kernels of attention and recurrence are reached through the functions above.
    kernels = {name for name in public if name.startswith("_") and ("attention" in name or "rnn" in name)}
    assert public - known - kernels - {"miopen_rnn", "rrelu_with_noise_functional"} == set()
