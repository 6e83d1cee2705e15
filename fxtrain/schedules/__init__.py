"""Functions from the step to a value, such as a learning rate. They are tensor operations, so steps do not recompile.

A schedule takes the step, an int64 tensor of shape [] or a Python int, and returns a float64 tensor of shape [], or
float32 on devices without float64. Multiplied by a float32 tensor of more dimensions, it gives float32. Any function
with this signature is a schedule. Parameters of type ``Scalar`` may be 0-d tensors, so that a schedule can be
vectorized over them with ``vmap``.
"""

from fxtrain.schedules._joins import cycle, join, one_cycle, piecewise, warmup, warmup_cosine_decay
from fxtrain.schedules._schedule import Schedule, constant, cosine, exponential, inverse_sqrt, linear, polynomial

__all__ = [
    "Schedule",
    "constant",
    "cosine",
    "cycle",
    "exponential",
    "inverse_sqrt",
    "join",
    "linear",
    "one_cycle",
    "piecewise",
    "polynomial",
    "warmup",
    "warmup_cosine_decay",
]
