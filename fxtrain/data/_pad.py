"""Padding of examples to one batch, with a mask of the real positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fxtrain.core import check_choice, check_positive_int, describe, did_you_mean
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.data._examples import columns_of, length_of
from fxtrain.data._types import Example, Values

Side = Literal["right", "left"]

_WIDENED_DTYPES = (torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64)
_DEFAULT_VALUES = {"labels": -100}  # ignored by cross_entropy and transformers models


@with_short_traceback
def pad(
    examples: Sequence[Example],
    *,
    multiple: int = 1,
    max_length: int | None = None,
    truncate: Side | None = None,
    side: Side = "right",
    value: float | Mapping[str, float] = 0,
    mask: str | Mapping[str, str] = "mask",
    columns: Sequence[str] | None = None,
    variable: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Pads examples of different lengths to the longest one, and combines them into a batch.

    With ``functools.partial`` it serves as the ``collate_fn`` of a ``DataLoader``. Such a loader has one batch shape
    for each longest length, and each shape compiles a graph. ``padded`` and ``bucketed`` declare their shapes in
    advance.

    Integers of 16 bits or more become int64, as embeddings and losses require. Other dtypes are kept.

    Args:
        examples: Dicts of arrays, lists and numbers; arrays [length, ...], which become the column ``"x"``; or tuples,
            with parts named by ``columns``.
        multiple: The batch length is rounded up to a multiple of this.
        max_length: Maximum length of an example.
        truncate: The side on which longer examples are cut. By default they raise an error.
        side: The side on which padding is added.
        value: The padding value, or values by column. By default -100 in the column ``"labels"``, and 0 in others.
        mask: Name of the mask, bool [batch, length], True at real positions. Columns whose lengths differ within an
            example, as in translation, need separate masks: a dict of mask names by column.
        columns: The columns to use, or names for the parts of tuples.
        variable: The columns to pad. By default all that have a length. Other columns are stacked.

    Returns:
        The columns as [batch, length, ...] or [batch, ...], and the masks.

    Raises:
        TypeError: If a value is not an array, list or number.
        ValueError: If an example is empty or too long, or examples do not match.

    Example:
        >>> batch = pad([{"text": [1, 2, 3], "class": 0}, {"text": [4], "class": 1}], multiple=4)
        >>> batch["text"], batch["class"], batch["mask"].sum(1)
        (tensor([[1, 2, 3, 0],
                [4, 0, 0, 0]]), tensor([0, 1]), tensor([3, 1]))
    """
    if not len(examples):
        raise ValueError("expected at least one example, got none.")
    rows = [columns_of(example, columns) for example in examples]
    if variable is None:
        variable = [name for name, part in rows[0].items() if length_of(part) is not None]
    layout = PadLayout(variable, max_length=max_length, truncate=truncate, side=side, value=value, mask=mask)
    lengths = layout.cut({name: np.array([length_of(row[name]) or 0 for row in rows]) for name in variable})
    check_positive_int("multiple", multiple)
    sizes = {name: int(-(-each.max() // multiple) * multiple) for name, each in lengths.items()}
    return layout.batch(rows, sizes, len(rows))


class PadLayout:
    """The layout of examples in a batch. The options are those of ``pad``.

    Args:
        variable: The columns to pad.
    """

    def __init__(
        self,
        variable: Iterable[str],
        *,
        max_length: int | None = None,
        truncate: Side | None = None,
        side: Side = "right",
        value: float | Mapping[str, float] = 0,
        mask: str | Mapping[str, str] = "mask",
    ) -> None:
        check_choice("side", side, ("right", "left"))
        check_choice("truncate", truncate, (None, "right", "left"))
        if max_length is not None:
            check_positive_int("max_length", max_length)
        self.variable = tuple(variable)
        if not self.variable:
            raise TypeError("expected a column of arrays or lists to pad, got none. Name the columns: variable=(...).")
        self.max_length, self.truncate, self.side = max_length, truncate, side
        self._values = {name: _value(value, name) for name in self.variable}
        self._one_mask = isinstance(mask, str)
        self.masks = {mask: self.variable[0]} if isinstance(mask, str) else {name: of for of, name in mask.items()}
        """The column of each mask, by mask name."""
        for column in self.masks.values():
            if column not in self.variable:
                raise ValueError(
                    f"expected mask to have keys among the columns {self.variable}, got {column!r}."
                    f"{did_you_mean(column, self.variable)}"
                )

    def cut(self, lengths: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the lengths by column after truncation.

        Raises:
            ValueError: If an example is empty or too long, or columns with one mask differ in length.
        """
        for name, found in lengths.items():
            if self.max_length is not None and self.truncate is None and found.max() > self.max_length:
                raise ValueError(
                    f"expected at most {self.max_length} positions in an example, got {found.max()} in column {name!r} "
                    f'at index {found.argmax()}. Raise the limit, or cut examples with truncate="right".'
                )
        self._refuse_unless_whole(lengths)
        limit = self.max_length
        return dict(lengths) if limit is None else {name: np.minimum(each, limit) for name, each in lengths.items()}

    def _refuse_unless_whole(self, lengths: Mapping[str, np.ndarray]) -> None:
        first, *others = lengths.items()
        for name, found in lengths.items():
            if not found.all():
                raise ValueError(
                    f"expected non-empty examples, got length 0 in column {name!r} at index {found.argmin()}. Filter "
                    "empty examples out of the data."
                )
        for name, found in others if self._one_mask else ():
            if not np.array_equal(found, first[1]):
                at = int(np.flatnonzero(found != first[1])[0])
                raise ValueError(
                    f"expected columns that share a mask to have equal lengths, got {first[1][at]} in {first[0]!r} and "
                    f"{found[at]} in {name!r} at index {at}. Name a mask for each, "
                    f'mask={{"{first[0]}": "{first[0]}_mask", "{name}": "{name}_mask"}}, or leave a fixed-size column '
                    "out of variable=(...)."
                )

    def batch(self, examples: Sequence[Mapping[str, Values]], sizes: Mapping[str, int], rows: int) -> dict[str, Tensor]:
        """Returns a batch of the examples, with rows of padding up to ``rows``."""
        columns = list(examples[0])
        taken = next((name for name in self.masks if name in columns), None)
        if taken is not None:
            raise ValueError(f"expected a mask name that is not a column, got {taken!r}. Choose another name: mask=.")
        made: dict[str, Tensor] = {}
        lengths: dict[str, np.ndarray] = {}
        for name in columns:
            values = [self._column(example[name], name) for example in examples]
            if name in self.variable:
                lengths[name] = np.array([length_of(value) or 0 for value in values])
            refuse_unless_alike(values, name, is_variable=name in self.variable)
            shape = (sizes[name], *values[0].shape[1:]) if name in self.variable else values[0].shape
            made[name] = self._filled(values, rows, shape, name)
        self._refuse_unless_whole(lengths)
        for name, column in self.masks.items():
            ends = torch.tensor([*lengths[column].tolist(), *[0] * (rows - len(examples))])
            real = torch.arange(sizes[column]) < ends[:, None]
            made[name] = real if self.side == "right" else real.flip(1)
        return made

    def columns(self, example: Mapping[str, Values]) -> dict[str, Tensor]:
        """Returns an example's columns as tensors, truncated."""
        return {name: self._column(value, name) for name, value in example.items()}

    def _column(self, value: Values, name: str) -> Tensor:
        made, limit = _as_tensor(value, name), self.max_length
        if self.truncate is None or limit is None or name not in self.variable or not made.ndim or len(made) <= limit:
            return made
        return made[:limit] if self.truncate == "right" else made[-limit:]

    def _filled(self, values: Sequence[Tensor], rows: int, shape: Sequence[int], name: str) -> Tensor:
        if name not in self.variable:
            made = torch.stack(list(values))
            return made if len(made) == rows else torch.cat([made, made.new_zeros(rows - len(made), *shape)])
        filler, dtype, size = self._values[name], values[0].dtype, shape[0]
        if not dtype.is_floating_point and not dtype.is_complex and torch.tensor(filler).to(dtype).item() != filler:
            raise ValueError(f"expected a {dtype} value to pad column {name!r}, got {filler!r}. Choose another value=.")
        made = values[0].new_full((rows, *shape), filler)
        for row, value in zip(made, values, strict=False):
            if len(value) > size:
                raise ValueError(
                    f"expected at most {size} positions in column {name!r}, as measured before, got {len(value)}. "
                    "Return the same length on each read."
                )
            (row[: len(value)] if self.side == "right" else row[size - len(value) :]).copy_(value)
        return made


def _value(value: float | Mapping[str, float], name: str) -> float:
    if isinstance(value, Mapping):
        return value.get(name, _DEFAULT_VALUES.get(name, 0))
    return value or _DEFAULT_VALUES.get(name, 0)


def _as_tensor(value: Values, name: str) -> Tensor:
    try:
        if isinstance(value, float):
            made = torch.tensor(value, dtype=torch.float64)  # like torch's default collation
        elif isinstance(value, np.ndarray) and not value.flags.writeable:
            made = torch.from_numpy(value.copy())  # tensors cannot be read-only
        elif isinstance(value, list) and value and isinstance(value[0], np.ndarray | np.generic):
            made = torch.from_numpy(np.array(value))  # torch converts such lists slowly
        else:
            made = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"expected arrays, lists of numbers or numbers in column {name!r}, got {describe(value)}. Convert it "
            "first, or exclude the column with columns=(...)."
        ) from None
    return made.to(torch.int64) if made.dtype in _WIDENED_DTYPES else made


def refuse_unless_alike(values: Sequence[Tensor], name: str, *, is_variable: bool) -> None:
    """Raises unless values of a column agree in dtype and shape, except for the first dimension of variable columns."""
    like = values[0]
    for value in values:
        shape, first = (value.shape[1:], like.shape[1:]) if is_variable else (value.shape, like.shape)
        if value.dtype != like.dtype or value.ndim != like.ndim or shape != first:
            hint = "" if is_variable else " Name the columns to pad: variable=(...)."
            what = "equal dtype, and equal shape after the first dimension," if is_variable else "equal dtype and shape"
            raise ValueError(
                f"expected arrays of {what} in column {name!r}, got {value.dtype} {list(value.shape)} and "
                f"{like.dtype} {list(like.shape)}.{hint}"
            )
