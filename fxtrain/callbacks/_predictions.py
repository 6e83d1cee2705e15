"""A table of examples of each evaluation, with the predictions of a classifier."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fxtrain import rng, tree
from fxtrain.callbacks._classification import Logits, Seen, class_scores, mask_of, true_classes
from fxtrain.core import (
    Batch,
    Control,
    EvalBegin,
    EvalEnd,
    EvalStep,
    TrainState,
    Tree,
    check_callable,
    check_choice,
    check_int,
    check_positive_int,
)
from fxtrain.core._bits import reinterpreted
from fxtrain.fold import Handler, stateful
from fxtrain.values import Audio, Image, Table, Video

_EMPTY = 2**63 - 1  # priority of a row without an example, after all others
_IMAGE, _TEXT, _JSON, _FLOAT, _INT, _BOOL = range(6)  # kinds of stored inputs
_MIN_BYTES = 64

Shown = Sequence[object] | Tensor | Image
Slot = dict[str, Tensor]


def predictions(
    show: Callable[[Batch], Shown],
    *,
    truth: str = "y",
    logits: Logits | None = None,
    labels: Sequence[str] = (),
    limit: int = 16,
    sample: Literal["first", "random"] = "first",
    batch: int | None = None,
    input_bytes: int = 2**14,
    name: str = "predictions",
) -> Handler:
    """Logs a table of examples of each evaluation, with input, prediction, truth and confidence.

        prediction = argmax(logits), confidence = max(softmax(logits))

    The evaluation step must return the logits as its outputs: ``fx.eval_step(measure, outputs=True)``. Rows that the
    batch's ``"mask"``, bool [N], excludes are left out. A random sample depends only on the seed, the step and the
    order of the evaluation's batches. A slot keeps the examples, so that an interrupted evaluation continues with them.

    Args:
        show: Maps a batch to the input column, one entry per example: strings, scalars, or ``fxtrain.values.Image``.
            With ``sample="first"``, the batch is cut to at most ``limit`` examples, unless it has a mask.
        truth: Key of the true classes in the batch, int64 [N].
        logits: Maps the evaluation step's outputs to logits [N, C]. By default the outputs are the logits, or a dict
            with the key ``"logits"``.
        labels: Class names; class indices by default.
        limit: Maximum number of examples, 1 or more, from as many evaluation batches as it takes.
        sample: ``"first"``, or ``"random"`` for a random subset of all examples of the evaluation.
        batch: Index of the only evaluation batch to show, from 0; None for all.
        input_bytes: Memory for each input in the slot, 64 bytes or more. Larger images are averaged down by an integer
            factor, and longer texts are cut. Pixels are clipped to their limits.
        name: Name of the slot and of the logged table.

    Raises:
        ValueError: If an argument is out of range, or, at run time, if ``show`` returns another number of inputs.
        TypeError: At run time, if the outputs have no logits, or the batch has no true classes.

    Example:
        >>> import torch, fxtrain as fx
        >>> callback = fx.compose(predictions(lambda batch: batch["x"][:, 0], labels=("cat", "dog")))
        >>> state = fx.attach(fx.init(torch.nn.Linear(1, 1)), callback)
        >>> batch = {"x": torch.tensor([[1.0], [2.0]]), "y": torch.tensor([0, 1])}
        >>> event = fx.EvalStep(step=10, index=0, batch=batch, metrics={}, outputs=torch.tensor([[0.0, 9], [0, 9]]))
        >>> state, _ = callback(state, event)
        >>> _, control = callback(state, fx.EvalEnd(step=10, metrics={}))
        >>> print(control.log["predictions"].value.markdown())
        | input | prediction | truth | confidence |
        | --- | --- | --- | --- |
        | 1 | dog | cat | 0.9999 |
        | 2 | dog | dog | 0.9999 |
    """
    check_callable("show", show, "(batch) -> values")
    check_positive_int("limit", limit)
    check_choice("sample", sample, ("first", "random"))
    check_int("input_bytes", input_bytes, minimum=_MIN_BYTES)
    if batch is not None:
        check_int("batch", batch, minimum=0)

    def update(state: TrainState, event: Seen, slot: Slot) -> tuple[Slot, Control]:
        if isinstance(event, EvalBegin):
            return _empty(state, limit, input_bytes), Control()
        if isinstance(event, EvalEnd):
            table = _table(slot, labels)
            return slot, Control(log={} if table is None else {name: table})
        if batch is not None and event.index != batch:
            return slot, Control()
        added = examples(state, event)
        joined = {part: torch.cat([kept, added[part].to(kept)]) for part, kept in slot.items()}
        # A stable sort keeps the order of equal priorities on every device.
        first = joined["priority"].sort(stable=True).indices[:limit]
        return {part: values[first] for part, values in joined.items()}, Control()

    def examples(state: TrainState, event: EvalStep) -> Slot:
        """Returns the rows of a batch, as the slot stores them."""
        scores, rows, mask = class_scores(name, event.outputs, logits), event.batch, mask_of(event.batch)
        if sample == "first" and mask is None:
            scores, rows = scores[:limit], _first_rows(rows, limit)
        confidence, predicted = scores.max(-1)
        inputs, shapes = _stored(show(rows), len(scores), input_bytes, scores.device)
        position = (event.index << 32) + torch.arange(len(scores), device=scores.device)
        priority = position
        if sample == "random":
            key = rng.key(state.seed, stream=rng.Stream.SAMPLE, step=event.step, microbatch=event.index)
            priority = rng.bits(key, [len(scores)], site=1, width=64, device=scores.device) & (_EMPTY >> 1)
        if mask is not None:
            priority = priority.masked_fill(~mask.to(scores.device), _EMPTY)
        return {
            "priority": priority,
            "position": position,
            "prediction": predicted,
            "truth": true_classes(name, rows, truth),
            "confidence": confidence,
            "input": inputs,
            "shape": shapes,
        }

    return stateful(name, lambda state: _empty(state, limit, input_bytes), update)


def _empty(state: TrainState, limit: int, input_bytes: int) -> Slot:
    device = state.step.device
    numbers = {
        part: torch.zeros(limit, dtype=torch.int64, device=device) for part in ("position", "prediction", "truth")
    }
    return {
        "priority": torch.full((limit,), _EMPTY, device=device),
        **numbers,
        "confidence": torch.zeros(limit, device=device),
        "input": torch.zeros(limit, input_bytes, dtype=torch.uint8, device=device),
        "shape": torch.zeros(limit, 4, dtype=torch.int64, device=device),  # kind and sizes of the input
    }


def _table(slot: Slot, labels: Sequence[str]) -> Table | None:
    """Returns the stored rows in the order of the evaluation, or None if there are none."""
    host = {part: values.cpu().numpy() for part, values in slot.items()}
    count = int((host["priority"] < _EMPTY).sum())
    order = np.argsort(host["position"][:count], kind="stable")
    if not count:
        return None
    found = {part: values[order] for part, values in host.items()}
    inputs = [_restored(stored, shape.tolist()) for stored, shape in zip(found["input"], found["shape"], strict=True)]
    return Table(
        {
            "input": inputs,
            "prediction": _named(found["prediction"], labels),
            "truth": _named(found["truth"], labels),
            "confidence": found["confidence"],
        }
    )


def _stored(shown: Shown, count: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns inputs as bytes, uint8 [count, size], and their kinds and sizes, int64 [count, 4]."""
    column = Table({"input": shown}).columns["input"]  # pyright: ignore[reportArgumentType] -- checked there
    if isinstance(column, Video | Audio):
        raise TypeError(f"expected show to return strings, scalars or one Image, got {column!r}. Log it by itself.")
    found = column.count if isinstance(column, Image) else len(column)
    if found != count:
        raise ValueError(f"expected show to return {count} inputs, one for each example, got {found}.")
    if isinstance(column, Image):
        pixels = _shrunk(column.bytes_tensor(), size)
        stored, shape = pixels.flatten(1), [_IMAGE, *pixels.shape[1:]]
    elif isinstance(column, Tensor):
        kind = _FLOAT if column.is_floating_point() else _BOOL if column.dtype == torch.bool else _INT
        wide = column.double() if kind == _FLOAT else column.long()
        stored, shape = reinterpreted(wide.contiguous()[:, None], torch.uint8), [kind, 0, 0, 0]
    else:
        cells = [_encoded(cell, size) for cell in column]
        stored = torch.zeros(count, size, dtype=torch.uint8)
        for row, (_, content) in zip(stored, cells, strict=True):
            row[: len(content)] = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)[: len(content)]
        shapes = torch.tensor([[kind, len(content), 0, 0] for kind, content in cells])
        return stored.to(device), shapes.to(device)
    padded = torch.nn.functional.pad(stored.to(device), (0, size - stored.shape[1]))
    return padded, torch.tensor(shape, device=device).expand(count, 4)


def _shrunk(pixels: Tensor, size: int) -> Tensor:
    """Averages images, uint8 [N, H, W, C], over squares so that each fits into ``size`` bytes."""
    _, height, width, channels = pixels.shape
    factor = 1
    while math.ceil(height / factor) * math.ceil(width / factor) * channels > size:
        factor += 1
    if factor == 1:
        return pixels
    channels_first = pixels.movedim(-1, 1).float()
    small = torch.nn.functional.avg_pool2d(channels_first, factor, ceil_mode=True, count_include_pad=False)
    return small.round().to(torch.uint8).movedim(1, -1).contiguous()


def _encoded(cell: object, size: int) -> tuple[int, bytes]:
    if isinstance(cell, str):
        return _TEXT, cell.encode()[:size]
    if not isinstance(cell, int | float | None):
        raise TypeError(
            f"expected show to return strings, scalars or one Image, got {cell!r} in a list. Return one Image of all."
        )
    return _JSON, json.dumps(cell).encode()[:size]


def _restored(stored: np.ndarray, shape: Sequence[int]) -> str | float | bool | Image | None:
    kind, *sizes = shape
    match kind:
        case 0:  # _IMAGE
            return Image(stored[: math.prod(sizes)].reshape(sizes))
        case 1:  # _TEXT
            return stored[: sizes[0]].tobytes().decode(errors="ignore")
        case 2:  # _JSON
            return json.loads(stored[: sizes[0]].tobytes())
        case _:
            number = stored[:8].view(np.float64 if kind == _FLOAT else np.int64)[0].item()
            return bool(number) if kind == _BOOL else number


def _first_rows(batch: Batch, limit: int) -> Batch:
    """Returns the first rows of a batch. Lists without tensors, such as texts, are columns too."""

    def is_column(part: object) -> bool:
        return isinstance(part, list | tuple) and not any(isinstance(leaf, Tensor) for leaf in tree.leaves(part))

    def cut(part: Tree) -> Tree:
        is_cut = is_column(part) or (isinstance(part, Tensor | np.ndarray) and part.ndim > 0)
        return part[:limit] if is_cut else part

    return tree.map(cut, batch, is_leaf=is_column)


def _named(classes: np.ndarray, labels: Sequence[str]) -> list[str | int]:
    indices: list[int] = classes.tolist()
    return [labels[index] if 0 <= index < len(labels) else index for index in indices]
