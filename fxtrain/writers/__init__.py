"""Writers of the values that a run publishes, one backend per file, with the methods of clu's ``MetricWriter``."""

from fxtrain.writers._asynchronous import asynchronous as asynchronous
from fxtrain.writers._console import console as console
from fxtrain.writers._csv_rows import csv as csv
from fxtrain.writers._interface import Backend as Backend
from fxtrain.writers._interface import Writer as Writer
from fxtrain.writers._jsonl import jsonl as jsonl
from fxtrain.writers._media import media as media
from fxtrain.writers._mlflow_runs import mlflow as mlflow
from fxtrain.writers._multi import multi as multi
from fxtrain.writers._tensorboard import tensorboard as tensorboard
from fxtrain.writers._weights_and_biases import wandb as wandb
