"""Writers of the values that a run publishes, one backend per file, with the methods of clu's ``MetricWriter``."""

from fxtrain.writers._asynchronous import asynchronous
from fxtrain.writers._console import console
from fxtrain.writers._csv_rows import csv, read_csv
from fxtrain.writers._interface import Backend, Writer
from fxtrain.writers._jsonl import jsonl, read_jsonl
from fxtrain.writers._media import media, read_media
from fxtrain.writers._mlflow_runs import mlflow
from fxtrain.writers._multi import multi
from fxtrain.writers._tensorboard import tensorboard
from fxtrain.writers._weights_and_biases import wandb

__all__ = [
    "Backend",
    "Writer",
    "asynchronous",
    "console",
    "csv",
    "jsonl",
    "media",
    "mlflow",
    "multi",
    "read_csv",
    "read_jsonl",
    "read_media",
    "tensorboard",
    "wandb",
]
