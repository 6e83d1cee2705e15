"""Keras 3 on torch: ``fit`` with the torch module in ``TorchModuleWrapper``, without layers of Keras."""

import os
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras

from benchmarks.feed import Feed
from benchmarks.workloads import Workload

LOSSES = {
    "cross_entropy": lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    "squared_error": lambda: keras.losses.MeanSquaredError(),
}


def train(workload: Workload, feed: Feed) -> dict[str, Any]:
    module = workload.module()
    example = workload.batches[0]
    inputs = keras.Input(tuple(example["x"].shape[1:]), dtype=str(example["x"].dtype).removeprefix("torch."))
    # A second module computes the output shape, because a call updates running statistics.
    output_shape = (None, *workload.module()(example["x"]).shape[1:])
    outputs = keras.layers.TorchModuleWrapper(module, output_shape=output_shape)(inputs)
    model = keras.Model(inputs, outputs)
    # Keras adds epsilon before bias correction, where 1e-9 has the effect of 1e-8 after it.
    optimizer = keras.optimizers.AdamW(workload.learning_rate, weight_decay=workload.weight_decay, epsilon=1e-9)
    model.compile(optimizer, loss=LOSSES[workload.loss.__name__]())
    feed.convert(lambda batch: (batch["x"], batch["y"]))
    model.fit(feed.loader(), epochs=1, verbose=0)
    return module.state_dict()
