"""Text and HTML of a data source: its sizes, and the shapes and dtypes of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fxtrain import tree
from fxtrain.core import dtype_name, format_bytes, pluralize
from fxtrain.core._html import Html, Number, element, left_out, table, view
from fxtrain.data._placeholders import for_step
from fxtrain.data._sizes import data_sizes

if TYPE_CHECKING:
    from fxtrain.core import Batch
    from fxtrain.data._source import Source

_MAX_SHOWN = 40  # tensors of a batch


def source_text(source: Source) -> str:
    """Returns the sizes of a source on one line."""
    return f"<{type(source).__name__}: {', '.join(_sizes(source))}>"


def source_view(source: Source) -> str:
    """Returns the HTML of a source."""
    return view(type(source).__name__, *_batch(source), note=", ".join(_sizes(source)))


def _sizes(source: Source) -> list[str]:
    # Of a subclass whose own __init__ sets them later, they may be missing.
    length, num_shapes = getattr(source, "epoch_length", None), getattr(source, "num_shapes", None)
    sizes = data_sizes(source)
    known = [
        f"{pluralize(length, 'batch', 'batches')} per epoch" if length is not None else "epochs of unknown length",
        f"{pluralize(sizes.batch_size, 'example')} per batch" if sizes.batch_size is not None else "",
        pluralize(sizes.num_examples, "example") if sizes.num_examples is not None else "",
        pluralize(sizes.num_tokens, "token") if sizes.num_tokens is not None else "",
        f"{num_shapes} batch shapes" if (num_shapes or 1) > 1 else "",
    ]
    return [text for text in known if text]


def _batch(source: Source) -> list[Html]:
    batch = _known_batch(source)
    if batch is None:
        return [element("p", element("small", "The shapes of a batch are known once one is read, such as data[0]."))]
    leaves = tree.leaves(batch)
    named = list(zip(tree.paths(batch, "batch"), leaves, strict=True))
    rows = [
        (path, str(list(leaf.shape)), dtype_name(leaf.dtype), Number(format_bytes(leaf.nbytes)))
        if isinstance(leaf, Tensor)
        else (path, "", type(leaf).__name__, "")
        for path, leaf in named[:_MAX_SHOWN]
    ]
    return [table(("", "shape", "dtype", "size"), rows), left_out(len(named) - _MAX_SHOWN, "tensor")]


def _known_batch(source: Source) -> Batch | None:
    """Returns a batch whose shapes are known without reading files or running functions of the user, or None."""
    like: tuple[int, int | None, Batch] | None = getattr(source, "_like", None)
    if like is not None:
        return like[2]
    return for_step(source.fetch(0)) if source.is_in_memory else None
