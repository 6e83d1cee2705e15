"""Random samples as pure functions of (seed, stream, step, microbatch, site, index).

There is no generator state. Samples are the same in eager, compiled and vmapped runs, and after a resume.
"""

from fxtrain.rng._continuous import exponential, normal
from fxtrain.rng._discrete import bernoulli, categorical, dropout, multinomial
from fxtrain.rng._functional import DataAssignmentError, functional, untouched
from fxtrain.rng._philox import Key, Stream, key, philox4x32
from fxtrain.rng._uniform import bits, permutation, randint, uniform

__all__ = [
    "DataAssignmentError",
    "Key",
    "Stream",
    "bernoulli",
    "bits",
    "categorical",
    "dropout",
    "exponential",
    "functional",
    "key",
    "multinomial",
    "normal",
    "permutation",
    "philox4x32",
    "randint",
    "uniform",
    "untouched",
]
