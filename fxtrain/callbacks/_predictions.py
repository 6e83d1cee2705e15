"""A table of a classifier's predictions for some examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Batch, Control, EvalStep, TrainState, Tree, check_int, check_positive_int, describe
from fxtrain.fold import Handler, on
from fxtrain.values import Image, Table

Logits = Callable[[Tree], Tensor]


def predictions(
    show: Callable[[Batch], Sequence[object] | Tensor | Image],
    *,
    truth: str = "y",
    logits: Logits | None = None,
    labels: Sequence[str] = (),
    limit: int = 16,
    batch: int = 0,
    name: str = "predictions",
) -> Handler:
    """Logs a table of examples at each evaluation, with input, prediction, truth and confidence.

        prediction = argmax(logits), confidence = max(softmax(logits))

    The evaluation step must return the logits as its outputs: ``fx.eval_step(measure, outputs=True)``.

    Args:
        show: Maps a batch of at most ``limit`` examples to the input column: strings, scalars, or
            ``fxtrain.values.Image``.
        truth: Key of the true classes in the batch, int64 [N].
        logits: Maps the evaluation step's outputs to logits [N, C]. By default the outputs are the logits, or a dict
            with the key ``"logits"``.
        labels: Class names; class indices by default.
        limit: Maximum number of examples, 1 or more.
        batch: Index of the evaluation batch to show, from 0.
        name: Name of the logged table.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: At run time, if the outputs have no logits.

    Example:
        >>> import torch, fxtrain as fx
        >>> callback = predictions(lambda batch: batch["x"][:, 0], labels=("cat", "dog"))
        >>> batch = {"x": torch.tensor([[1.0], [2.0]]), "y": torch.tensor([0, 1])}
        >>> event = fx.EvalStep(step=10, index=0, batch=batch, metrics={}, outputs=torch.tensor([[0.0, 9], [0, 9]]))
        >>> _, control = callback(fx.init(torch.nn.Linear(1, 1)), event)
        >>> print(control.log["predictions"].value.markdown())
        | input | prediction | truth | confidence |
        | --- | --- | --- | --- |
        | 1 | dog | cat | 0.9999 |
        | 2 | dog | dog | 0.9999 |
    """
    check_positive_int("limit", limit)
    check_int("batch", batch, minimum=0)

    def callback(state: TrainState, event: EvalStep) -> tuple[TrainState, Control]:
        if event.index != batch:
            return state, Control()
        scores = class_scores(name, event.outputs, logits)[:limit]
        few = _rows(event.batch, limit)
        confidence, predicted = scores.max(-1)
        columns = {
            "input": show(few),
            "prediction": _named(predicted, labels),
            "truth": _named(few[truth], labels),
            "confidence": confidence,
        }
        return state, Control(log={name: Table(columns)})

    callback.__name__ = name
    return on(EvalStep, callback)


def _rows(batch: Batch, limit: int) -> Batch:
    """Returns the first rows of a batch. Lists without tensors, such as texts, are columns too."""

    def is_column(part: object) -> bool:
        return isinstance(part, list | tuple) and not any(isinstance(leaf, Tensor) for leaf in tree.leaves(part))

    def cut(part: Tree) -> Tree:
        is_cut = is_column(part) or (isinstance(part, Tensor | np.ndarray) and part.ndim > 0)
        return part[:limit] if is_cut else part

    return tree.map(cut, batch, is_leaf=is_column)


def class_scores(name: str, outputs: Tree, logits: Logits | None) -> Tensor:
    """Returns class probabilities, float32 [N, C], from the outputs of an evaluation step.

    Args:
        name: The callback's name, for errors.
        outputs: Of the evaluation step.
        logits: Maps outputs to logits, if given.

    Raises:
        TypeError: If the outputs have no logits [N, C].
    """
    found = logits(outputs) if logits is not None else outputs["logits"] if isinstance(outputs, Mapping) else outputs
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise TypeError(
            f"expected logits [N, C] in the outputs of the evaluation step for {name}, got {describe(found)}. Return "
            "(loss, logits) from the function of fx.eval_step(measure, outputs=True), or select them with logits=."
        )
    return found.detach().float().softmax(-1)


def _named(classes: Tensor, labels: Sequence[str]) -> list[str | int]:
    indices: list[int] = classes.tolist()
    return [labels[index] if 0 <= index < len(labels) else index for index in indices]
