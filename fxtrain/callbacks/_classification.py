"""Confusion matrices and ROC and precision-recall curves of a classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fxtrain.core import (
    Batch,
    Control,
    EvalBegin,
    EvalEnd,
    EvalStep,
    TrainState,
    Tree,
    check_int,
    describe,
)
from fxtrain.fold import Handler, stateful
from fxtrain.values import ConfusionMatrix, Figure

Logits = Callable[[Tree], Tensor]


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


Seen = EvalBegin | EvalStep | EvalEnd


def confusion_matrix(
    classes: int,
    *,
    truth: str = "y",
    logits: Logits | None = None,
    labels: Sequence[str] = (),
    name: str = "confusion_matrix",
) -> Handler:
    """Logs a confusion matrix of each evaluation.

        counts[i, j] = number of examples of class i with argmax(logits) = j

    The evaluation step must return the logits as its outputs: ``fx.eval_step(measure, outputs=True)``. Rows that the
    batch's ``"mask"``, bool [N], excludes are not counted.

    Args:
        classes: Number of classes C, 2 or more.
        truth: Key of the true classes in the batch, int64 [N].
        logits: Maps the evaluation step's outputs to logits [N, C]. By default the outputs are the logits, or a dict
            with the key ``"logits"``.
        labels: Class names; class indices by default.
        name: The slot, and the name of the logged matrix.

    Raises:
        ValueError: If ``classes`` is below 2, or ``labels`` does not name each class.
        TypeError: At run time, if the outputs have no logits or the batch has no true classes.

    Example:
        >>> import torch, fxtrain as fx
        >>> callback = fx.compose(confusion_matrix(2))
        >>> state = fx.attach(fx.init(torch.nn.Linear(1, 1)), callback)
        >>> batch = {"y": torch.tensor([0, 1])}
        >>> event = fx.EvalStep(step=1, index=0, batch=batch, metrics={}, outputs=torch.tensor([[0.0, 9], [0, 9]]))
        >>> state, _ = callback(state, event)
        >>> _, control = callback(state, fx.EvalEnd(step=1, metrics={}))
        >>> control.log["confusion_matrix"].value.counts.tolist()
        [[0, 1], [0, 1]]
    """
    _check_classes(classes, labels)

    def update(state: TrainState, event: Seen, slot: Tensor) -> tuple[Tensor, Control]:
        if isinstance(event, EvalBegin):
            return torch.zeros_like(slot), Control()
        if isinstance(event, EvalEnd):
            return slot, Control(log={name: ConfusionMatrix(slot, tuple(labels))})
        predicted = class_scores(name, event.outputs, logits).argmax(-1)
        true, taken = _one_hot(true_classes(name, event.batch, truth), classes), _one_hot(predicted, classes)
        # A matmul of zeros and ones in float64 is exact up to 2**53 examples, so the result is the same on any device.
        counts = (true.double() * _row_weights(event.batch)[:, None]).T @ taken.double()
        return slot + counts.to(torch.int64), Control()

    return stateful(name, lambda state: _zeros(state, classes, classes), update)


def curves(
    classes: int,
    *,
    truth: str = "y",
    logits: Logits | None = None,
    labels: Sequence[str] = (),
    bins: int = 1000,
    name: str = "curves",
) -> Handler:
    """Logs one-vs-rest ROC and precision-recall curves of each evaluation.

        tpr(t) = positives with score >= t / positives,  fpr(t) = negatives with score >= t / negatives
        precision(t) = positives with score >= t / all with score >= t
        auc = area under tpr over fpr,  average precision = sum of precision(t) times the increase of tpr at t

    Scores are softmax probabilities, counted in ``bins`` buckets. Memory therefore does not grow with the data, and the
    areas are accurate to about 1 / ``bins``. ``<name>/auc`` and ``<name>/average_precision`` are means over the classes
    that have both positives and negatives.

    Args:
        classes: As for ``confusion_matrix``.
        truth: As for ``confusion_matrix``.
        logits: As for ``confusion_matrix``.
        labels: As for ``confusion_matrix``.
        bins: Number of buckets between 0 and 1, 2 or more.
        name: The slot, and the prefix of the logged names: the figures ``<name>/roc`` and ``<name>/precision_recall``,
            and the scalars above.

    Raises:
        ValueError: If an argument is out of range.
        ImportError: If matplotlib is not installed.
        TypeError: At run time, if the outputs have no logits or the batch has no true classes.

    References:
        Fawcett, "An introduction to ROC analysis", 2006.

    Example:
        >>> import fxtrain as fx
        >>> callback = fx.compose(curves(2))
        >>> state = fx.attach(fx.init(torch.nn.Linear(1, 1)), callback)
        >>> batch = {"y": torch.tensor([0, 1])}
        >>> event = fx.EvalStep(step=1, index=0, batch=batch, metrics={}, outputs=torch.tensor([[9.0, 0], [0, 9]]))
        >>> state, _ = callback(state, event)
        >>> _, control = callback(state, fx.EvalEnd(step=1, metrics={}))
        >>> control.log["curves/auc"].value
        1.0
    """
    _check_classes(classes, labels)
    check_int("bins", bins, minimum=2)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("curves requires matplotlib. Install it: pip install 'fxtrain[plot]'.") from error

    def update(state: TrainState, event: Seen, slot: Tensor) -> tuple[Tensor, Control]:
        if isinstance(event, EvalBegin):
            return torch.zeros_like(slot), Control()
        if isinstance(event, EvalEnd):
            return slot, Control(log=_figures(name, slot.cpu(), labels or [str(i) for i in range(classes)]))
        scores = class_scores(name, event.outputs, logits)
        bucket = (scores * bins).long().clamp(max=bins - 1)
        true = _one_hot(true_classes(name, event.batch, truth), classes)
        row_weights = _row_weights(event.batch).to(torch.int64)[:, None].expand_as(bucket)
        place = (true.long() * classes + torch.arange(classes, device=bucket.device)) * bins + bucket
        counts = torch.zeros(slot.numel(), dtype=torch.int64, device=slot.device)
        return slot + counts.index_add(0, place.reshape(-1), row_weights.reshape(-1)).view_as(slot), Control()

    return stateful(name, lambda state: _zeros(state, 2, classes, bins), update)


def _figures(name: str, counts: Tensor, labels: Sequence[str]) -> dict[str, Figure | float]:
    """Returns the figures and scalars for counts, int64 [negative or positive, classes, bins]."""
    from matplotlib.figure import Figure as Canvas

    # Cumulative counts, from the highest threshold down.
    negatives, positives = counts.flip(-1).cumsum(-1).double()
    occurs = (positives[:, -1] > 0) & (negatives[:, -1] > 0)
    tpr = positives / positives[:, -1:].clamp(min=1)
    fpr = negatives / negatives[:, -1:].clamp(min=1)
    precision = positives / (positives + negatives).clamp(min=1)
    start = torch.zeros(len(tpr), 1, dtype=torch.float64)
    tpr_from, fpr_from = torch.cat([start, tpr], 1), torch.cat([start, fpr], 1)
    auc = torch.trapezoid(tpr_from, fpr_from, dim=1)
    average = (precision * tpr_from.diff(dim=1)).sum(1)
    log: dict[str, Figure | float] = {}
    if occurs.any():
        log = {f"{name}/auc": float(auc[occurs].mean()), f"{name}/average_precision": float(average[occurs].mean())}
    drawings = {
        "roc": ("false positive rate", fpr_from, "true positive rate", tpr_from, auc),
        "precision_recall": ("recall", tpr, "precision", precision, average),
    }
    for kind, (x_name, x, y_name, y, area) in drawings.items():
        canvas = Canvas(figsize=(5, 5), layout="constrained")
        axes = canvas.subplots()
        for index in occurs.nonzero()[:, 0].tolist():
            axes.plot(x[index], y[index], label=f"{labels[index]}  {area[index]:.3f}")
        axes.set(xlabel=x_name, ylabel=y_name, xlim=(0, 1), ylim=(0, 1.02), aspect="equal")
        if occurs.any():
            axes.legend(fontsize="small", title="class and area")
        log[f"{name}/{kind}"] = Figure(canvas)
    return log


def _check_classes(classes: int, labels: Sequence[str]) -> None:
    check_int("classes", classes, minimum=2)
    if labels and len(labels) != classes:
        raise ValueError(f"expected one label for each of the {classes} classes, got {len(labels)} labels.")


def _zeros(state: TrainState, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=state.step.device)


def _one_hot(classes: Tensor, count: int) -> Tensor:
    """bool [N, C]."""
    return classes[:, None] == torch.arange(count, device=classes.device)


def true_classes(name: str, batch: Batch, truth: str) -> Tensor:
    """Returns the true classes in a batch, int64 [N].

    Args:
        name: The callback's name, for errors.
        batch: The batch.
        truth: Their key.

    Raises:
        TypeError: If the batch has no such classes.
    """
    found = batch.get(truth) if isinstance(batch, Mapping) else None
    if not isinstance(found, Tensor) or found.ndim != 1 or found.is_floating_point():
        raise TypeError(
            f"expected classes, int64 [N], as batch[{truth!r}] for {name}, got {describe(found)}. Give their key as "
            "truth=."
        )
    return found


def mask_of(batch: Batch) -> Tensor | None:
    """Returns the mask of a batch, bool [N], or None if it has none."""
    mask = batch.get("mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == 1 else None


def _row_weights(batch: Batch) -> Tensor:
    """Returns the weight of each row, float64 [N]: the mask, or 1 without one."""
    mask = mask_of(batch)
    if mask is not None:
        return mask.double()
    first = next(leaf for leaf in batch.values() if isinstance(leaf, Tensor))
    return torch.ones(len(first), dtype=torch.float64, device=first.device)
