"""The canaries of private interfaces by path, and the functions that they trace and compile."""

import torch

from fxtrain import _torch_internals as internals

# One canary for each private interface. It calls the interface as fxtrain does.
CANARIES = {}


def canary(*paths):
    def register(function):
        CANARIES.update(dict.fromkeys(paths, function))
        return function

    return register


def recorded(function, *tensors):
    return internals.tracing.make_fx(function, tracing_mode="real")(*tensors)


# torch.compile splits it from its callers.
@torch._dynamo.disable(recursive=False)
def uncompiled(x):
    return x.mean(), x.sum(), x.exp(), x.neg(), torch.relu(x)
