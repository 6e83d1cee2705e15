"""Writers: where what a run publishes is kept. One backend a file; all have the verbs of clu's ``MetricWriter``."""

from fxtrain.writers.asynchronous import asynchronous as asynchronous
from fxtrain.writers.console import console as console
from fxtrain.writers.csv_rows import csv as csv
from fxtrain.writers.interface import Backend as Backend
from fxtrain.writers.interface import Writer as Writer
from fxtrain.writers.jsonl import jsonl as jsonl
from fxtrain.writers.media import media as media
from fxtrain.writers.mlflow_runs import mlflow as mlflow
from fxtrain.writers.multi import multi as multi
from fxtrain.writers.tensorboard import tensorboard as tensorboard
from fxtrain.writers.weights_and_biases import wandb as wandb
