"""Keras 3 on torch: ``fit`` over the very module, in Keras's wrapper for it, so its own layers cost nothing here."""

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
    output_shape = (None, *workload.module()(example["x"]).shape[1:])  # of another: running means move in a call
    outputs = keras.layers.TorchModuleWrapper(module, output_shape=output_shape)(inputs)
    model = keras.Model(inputs, outputs)
    # Keras adds its epsilon before the root is corrected for its start, where 1e-9 acts as 1e-8 does afterwards.
    optimizer = keras.optimizers.AdamW(workload.learning_rate, weight_decay=workload.weight_decay, epsilon=1e-9)
    model.compile(optimizer, loss=LOSSES[workload.loss.__name__]())
    feed.convert(lambda batch: (batch["x"], batch["y"]))
    model.fit(feed.loader(), epochs=1, verbose=0)
    return module.state_dict()
