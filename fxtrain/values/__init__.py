"""Value types that can be logged besides scalars, and the values that an event publishes.

Scalars and 0-d tensors are logged as they are. Everything else is wrapped in one of the classes here, which state its
kind and immediately check its shape and dtype. Tensors stay on their device until a writer needs them, and their range
is checked then.
"""

from fxtrain.values._confusion import ConfusionMatrix
from fxtrain.values._figure import Figure
from fxtrain.values._histogram import Histogram
from fxtrain.values._json import jsonable as jsonable
from fxtrain.values._kinds import KINDS as KINDS
from fxtrain.values._kinds import Kind as Kind
from fxtrain.values._kinds import Value
from fxtrain.values._kinds import kind_of as kind_of
from fxtrain.values._kinds import plain_number as plain_number
from fxtrain.values._kinds import simplified as simplified
from fxtrain.values._media import Audio, Image, Video
from fxtrain.values._point_cloud import PointCloud
from fxtrain.values._published import named_after as named_after
from fxtrain.values._published import published as published
from fxtrain.values._table import Table
from fxtrain.values._text import HParams, Scalar, Text

__all__ = [
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
