"""Writers: where what a run publishes is kept. One backend a file; all have the verbs of clu's ``MetricWriter``."""

from fxtrain.writers.interface import Writer as Writer
from fxtrain.writers.jsonl import jsonl as jsonl
from fxtrain.writers.multi import multi as multi
from fxtrain.writers.tensorboard import tensorboard as tensorboard
