"""Random samples as pure functions of (seed, stream, step, microbatch, site, index).

There is no generator state. Samples are the same in eager, compiled and vmapped runs, and after a resume.
"""

from fxtrain.rng._mode import DataAssignmentError as DataAssignmentError
from fxtrain.rng._mode import functional as functional
from fxtrain.rng._mode import untouched as untouched
from fxtrain.rng._philox import Key as Key
from fxtrain.rng._philox import Stream as Stream
from fxtrain.rng._philox import key as key
from fxtrain.rng._philox import philox4x32 as philox4x32
from fxtrain.rng._samplers import bernoulli as bernoulli
from fxtrain.rng._samplers import bits as bits
from fxtrain.rng._samplers import categorical as categorical
from fxtrain.rng._samplers import dropout as dropout
from fxtrain.rng._samplers import exponential as exponential
from fxtrain.rng._samplers import multinomial as multinomial
from fxtrain.rng._samplers import normal as normal
from fxtrain.rng._samplers import permutation as permutation
from fxtrain.rng._samplers import randint as randint
from fxtrain.rng._samplers import uniform as uniform
