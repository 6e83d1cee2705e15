"""Mergeable metrics as pytrees, in the manner of clu.

A metric holds sufficient statistics: merging the metrics of two batches gives the metric of both. Its leaves are
tensors, so a metric works inside a compiled step, under ``vmap``, and in a state. Those of this package are 0-d and
float64, so that sums over hundreds of millions of values do not lose precision; devices without float64 (MPS) use
float32. ``fxtrain.interop.torchmetric`` makes metrics of those of torchmetrics. ``compute`` returns
torch's default dtype, or float32 if that is wider. Averages that ``lift`` makes of float64 values stay float64.
"""

from fxtrain.metrics._by_name import compute, lift, merge
from fxtrain.metrics._metric import Collection, Metric
from fxtrain.metrics._statistics import Accuracy, Average, LastValue, Std, Sum

__all__ = [
    "Accuracy",
    "Average",
    "Collection",
    "LastValue",
    "Metric",
    "Std",
    "Sum",
    "compute",
    "lift",
    "merge",
]
