"""Randomness is a function: of (seed, stream, step, microbatch, site, index), and of nothing else.

There is no generator. The same numbers come out eager, compiled and under ``torch.func.vmap``, and after a resume.
"""

from fxtrain.rng.mode import DataAssignmentError as DataAssignmentError
from fxtrain.rng.mode import functional as functional
from fxtrain.rng.mode import untouched as untouched
from fxtrain.rng.philox import Key as Key
from fxtrain.rng.philox import Stream as Stream
from fxtrain.rng.philox import key as key
from fxtrain.rng.philox import philox4x32 as philox4x32
from fxtrain.rng.samplers import bernoulli as bernoulli
from fxtrain.rng.samplers import bits as bits
from fxtrain.rng.samplers import categorical as categorical
from fxtrain.rng.samplers import dropout as dropout
from fxtrain.rng.samplers import exponential as exponential
from fxtrain.rng.samplers import multinomial as multinomial
from fxtrain.rng.samplers import normal as normal
from fxtrain.rng.samplers import permutation as permutation
from fxtrain.rng.samplers import randint as randint
from fxtrain.rng.samplers import uniform as uniform
