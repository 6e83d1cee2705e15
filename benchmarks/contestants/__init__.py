"""The measured training loops.

Each is a function ``train(workload, feed)`` that trains on all batches of the feed, and returns the trained parameters
and buffers under the names of the module's ``state_dict``.
"""

import importlib
from collections.abc import Callable
from typing import Any

FXTRAIN = "fxtrain"
AHEAD = "fxtrain, ahead of time"
EIGHT = "fxtrain, eight steps a call"
FIT = "fxtrain, fit"
UNDONATED = "fxtrain, not donated"
GRAPHS = "fxtrain, CUDA graphs"
EAGER = "by hand, eager"
MODEL_COMPILED = "by hand, model compiled"
BOTH_COMPILED = "by hand, model and optimizer compiled"
BOTH_GRAPHS = "by hand, model and optimizer compiled, CUDA graphs"
LIGHTNING = "Lightning"
HUGGING_FACE = "Hugging Face Trainer"
IGNITE = "Ignite"
KERAS = "Keras 3 on torch"
TORCHTNT = "torchtnt"
FLAX = "flax + optax"
FLAX_NUMPY = "flax + optax, numpy batches"

BY_HAND = (EAGER, MODEL_COMPILED, BOTH_COMPILED)
ANY_FLAX = (FLAX, FLAX_NUMPY)
TRAINERS = (LIGHTNING, HUGGING_FACE, IGNITE, KERAS, TORCHTNT)
ALL = (FXTRAIN, AHEAD, EIGHT, FIT, UNDONATED, *BY_HAND, *TRAINERS, *ANY_FLAX)
BY_HAND_ON_GPU = (*BY_HAND, BOTH_GRAPHS)
ON_GPU = (FXTRAIN, GRAPHS, FIT, UNDONATED, *BY_HAND_ON_GPU, LIGHTNING, HUGGING_FACE)

ENDLESS = 10**9
"""The number of steps for trainers that require one."""

_FUNCTIONS = {
    FXTRAIN: ("fxtrain", "donated"),
    AHEAD: ("fxtrain", "ahead"),
    EIGHT: ("fxtrain", "eight"),
    FIT: ("fxtrain", "fit"),
    UNDONATED: ("fxtrain", "undonated"),
    GRAPHS: ("fxtrain", "graphs"),
    EAGER: ("by_hand", "eager"),
    MODEL_COMPILED: ("by_hand", "model_compiled"),
    BOTH_COMPILED: ("by_hand", "both_compiled"),
    BOTH_GRAPHS: ("by_hand", "both_graphs"),
    LIGHTNING: ("lightning_", "train"),
    HUGGING_FACE: ("hf_trainer", "train"),
    IGNITE: ("ignite_", "train"),
    KERAS: ("keras_", "train"),
    TORCHTNT: ("torchtnt_", "train"),
    FLAX: ("flax_", "device_batches"),
    FLAX_NUMPY: ("flax_", "numpy_batches"),
}


def contestant(name: str) -> Callable[[Any, Any], dict[str, Any]]:
    module, function = _FUNCTIONS[name]
    return getattr(importlib.import_module(f"benchmarks.contestants.{module}"), function)
