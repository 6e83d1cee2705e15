"""Value types that can be logged besides scalars, and the values that an event publishes.

Scalars and 0-d tensors are logged as they are. Everything else is wrapped in one of the classes here, which state its
kind and immediately check its shape and dtype. Tensors stay on their device until a writer needs them, and their range
is checked then.
"""

from fxtrain.values._artifact import Artifact
from fxtrain.values._figure import Figure
from fxtrain.values._histogram import Histogram
from fxtrain.values._kinds import (
    KINDS,
    KINDS_BY_NAME,
    METRIC_PREFIXES,
    Kind,
    Value,
    check_loggable,
    is_kept,
    jsonable,
    kind_of,
    named_after,
    plain_number,
    published,
    simplified,
)
from fxtrain.values._media import Audio, PointCloud
from fxtrain.values._pixels import Image, Video
from fxtrain.values._table import ConfusionMatrix, Table
from fxtrain.values._text import HParams, Scalar, Text

__all__ = [
    "Artifact",
    "Audio",
    "ConfusionMatrix",
    "Figure",
    "HParams",
    "Histogram",
    "Image",
    "PointCloud",
    "Scalar",
    "Table",
    "Text",
    "Value",
    "Video",
]
