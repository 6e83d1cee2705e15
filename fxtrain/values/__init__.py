"""Values: what can be logged beside numbers, and what an event publishes.

A number or a 0-d tensor is logged as it is. Anything else is wrapped in one of the classes here, which say what kind
of thing it is, and check its shape and dtype at once. Tensors stay on their device until a writer needs them; that
they are in range is found out there.
"""

from fxtrain.values.backlog import Backlog as Backlog
from fxtrain.values.backlog import Waiting as Waiting
from fxtrain.values.backlog import on_host_copy as on_host_copy
from fxtrain.values.confusion import ConfusionMatrix as ConfusionMatrix
from fxtrain.values.figure import Figure as Figure
from fxtrain.values.handing import KINDS as KINDS
from fxtrain.values.handing import hand_over as hand_over
from fxtrain.values.handing import hold_back as hold_back
from fxtrain.values.handing import kept_by as kept_by
from fxtrain.values.handing import kind_of as kind_of
from fxtrain.values.handing import settle as settle
from fxtrain.values.handing import share as share
from fxtrain.values.handing import take_back as take_back
from fxtrain.values.handing import try_all as try_all
from fxtrain.values.histogram import Histogram as Histogram
from fxtrain.values.media import Audio as Audio
from fxtrain.values.media import Image as Image
from fxtrain.values.media import Video as Video
from fxtrain.values.outlet import Outlet as Outlet
from fxtrain.values.outlet import outlet_of as outlet_of
from fxtrain.values.plain import plain as plain
from fxtrain.values.points import PointCloud as PointCloud
from fxtrain.values.published import named_after as named_after
from fxtrain.values.published import published as published
from fxtrain.values.table import Table as Table
from fxtrain.values.text import HParams as HParams
from fxtrain.values.text import Scalar as Scalar
from fxtrain.values.text import Text as Text
