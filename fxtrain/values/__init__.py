"""Value types that can be logged besides scalars, and the values that an event publishes.

Scalars and 0-d tensors are logged as they are. Everything else is wrapped in one of the classes here, which state its
kind and immediately check its shape and dtype. Tensors stay on their device until a writer needs them, and their range
is checked then.
"""

from fxtrain.values._backlog import Backlog as Backlog
from fxtrain.values._backlog import Waiting as Waiting
from fxtrain.values._backlog import on_host_copy as on_host_copy
from fxtrain.values._confusion import ConfusionMatrix
from fxtrain.values._figure import Figure
from fxtrain.values._histogram import Histogram
from fxtrain.values._log import KINDS as KINDS
from fxtrain.values._log import hand_over as hand_over
from fxtrain.values._log import hold_back as hold_back
from fxtrain.values._log import kept_by as kept_by
from fxtrain.values._log import kind_of as kind_of
from fxtrain.values._log import settle as settle
from fxtrain.values._log import share as share
from fxtrain.values._log import take_back as take_back
from fxtrain.values._log import try_all as try_all
from fxtrain.values._media import Audio, Image, Video
from fxtrain.values._outlet import Outlet as Outlet
from fxtrain.values._outlet import outlet_of as outlet_of
from fxtrain.values._plain import plain as plain
from fxtrain.values._points import PointCloud
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
    "Video",
]
