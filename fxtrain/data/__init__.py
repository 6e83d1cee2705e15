"""Sources of training batches, addressed by position.

A batch is a function of (seed, position), so a run resumes at the batch where it stopped. The loop reads ``data[0]``,
``data[1]``, ... across all epochs. For most sources, a checkpoint stores only the position.

A batch is a pytree. Its tensors enter the step, and numpy arrays, numbers and lists of numbers enter it as tensors.
Text, bytes, paths, dates and other non-numeric values stay out of the step: callbacks read them in ``event.batch``, the
step receives placeholders, and a changed text does not recompile. Containers keep their class: dicts and their
subclasses, named tuples, dataclasses, Hugging Face encodings, torch_geometric graphs, and classes registered with
optree or torch's pytree.

Graphs, and lists of tensors inside a batch, may change size from batch to batch. An uncompiled step takes them as they
are. A compiled step recompiles for each size: use ``fxtrain.compile(step, dynamic=True)``, or pad to a few sizes with
``data.map``.
"""

from fxtrain.data._as_source import as_source, sequence
from fxtrain.data._as_tensors import map_tensors, to_device
from fxtrain.data._batch_checks import check_batch, checksum
from fxtrain.data._batches import batches
from fxtrain.data._bucketed import bucketed
from fxtrain.data._data_loaders import from_loader
from fxtrain.data._indexed_batches import windows
from fxtrain.data._iterables import from_iterable
from fxtrain.data._packed import attention_mask, next_tokens, packed
from fxtrain.data._pad import pad
from fxtrain.data._padded import padded
from fxtrain.data._placeholders import Placeholder, for_step
from fxtrain.data._prefetch import prefetch
from fxtrain.data._source import Exhausted, Source
from fxtrain.data._stateful_loaders import from_stateful_loader
from fxtrain.data._types import Batches, SourceLike

__all__ = [
    "Batches",
    "Exhausted",
    "Source",
    "SourceLike",
    "as_source",
    "attention_mask",
    "batches",
    "bucketed",
    "from_iterable",
    "from_loader",
    "from_stateful_loader",
    "next_tokens",
    "packed",
    "pad",
    "padded",
    "prefetch",
    "sequence",
    "windows",
]
